"""A folder of images that can be searched: built once, brought up to date when it is opened, asked any number of times."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grex_mllm.config import to_dict
from grex_mllm.data.images import resolve_image
from grex_mllm.errors import GrexError, fault
from grex_mllm.models.grex import GrexModel
from grex_mllm.precision import pick_device
from grex_mllm.progress import progress_bar
from grex_mllm.search.folder import ImageFile, list_images, read_image, short_reason
from grex_mllm.search.parts import parts_of
from grex_mllm.search.scoring import (
    PAIRS_AT_ONCE,
    Scores,
    compact,
    encode_expressions,
    from_rows,
    in_batches,
    layout_of,
    row_bytes,
    score_images,
    to_rows,
)
from grex_mllm.search.store import Entry, IndexStore
from grex_mllm.types import Grounding

INDEX_FOLDER = ".grex_index"  # beside the images, where no other folder is given
IMAGES_AT_ONCE = 16
# of two parts of a union, what the union has
WORST: dict[str, Any] = {"score": np.minimum, "no_target_prob": np.maximum, "region_score": np.minimum, "no_target": np.logical_or}


@dataclass(frozen=True)
class Hit:
    """An image for an expression. file: relative to the folder.  no_target: what the model decides; the rest as in `Scores`."""

    file: str
    score: float
    no_target_prob: float
    region_score: float
    no_target: bool


@dataclass
class Update:
    """What bringing an index up to date did, in numbers of files. refused: all that are refused now, with their reasons."""

    added: int
    changed: int
    removed: int
    kept: int
    refused: dict[str, str]


class SearchIndex:
    """Images of a folder with a model to ask about them; `open_index` makes it. updated: what the last update did, or None."""

    def __init__(self, model: GrexModel, images: str | Path, folder: str | Path, *, rebuild: bool = False) -> None:
        self.model, self.images = model, Path(images)
        self.parts = layout_of(model)
        head = {"model": fingerprint(model), "parts": [[part.name, list(part.shape), part.kept] for part in self.parts]}
        self.store = IndexStore(folder, head, row_bytes(self.parts), rebuild=rebuild)
        self.updated: Update | None = None

    def __len__(self) -> int:
        return len(self.store.indexed)

    @property
    def files(self) -> list[str]:
        """The images that are searched, in the order of their names."""
        return [entry.file for entry in self.store.indexed]

    def update(self) -> Update:
        """Index what is new or changed, and forget what is gone. What was done before a process was killed stays done.

        Raises:
            GrexError: another process writes this index.
        """
        listing = list_images(self.images)
        with self.store.lock():
            known = dict(self.store.entries)
            there = {item.file: item for item in listing.files}
            gone = [name for name in known if name not in there]
            self.store.note([], removed=gone)
            todo = [item for name, item in there.items() if not _same(known.get(name), item)]
            with progress_bar(f"indexing {self.images}") as advance:
                for some in in_batches(len(todo), IMAGES_AT_ONCE):
                    self._add(todo[some])
                    advance(some.stop / len(todo), f"{some.stop:,} of {len(todo):,}")
            self.store.tidy()
        changed = sum(item.file in known for item in todo)
        refused = listing.refused | {entry.file: entry.refused for entry in self.store.entries.values() if entry.refused}
        self.updated = Update(len(todo) - changed, changed, len(gone), len(there) - len(todo), refused)
        return self.updated

    def scores(self, expressions: str | Sequence[str], *, divide: bool = True) -> Scores:
        """Score expressions against all images, in the order of `files`.

        A union ("the dog and two cats") is as good as its worst part: an image that lacks one does not contain what is said.
        divide: False asks for it as a whole.
        """
        asked = [expressions] if isinstance(expressions, str) else list(expressions)
        parts = [parts_of(expression) if divide else [expression] for expression in asked]
        texts = list(dict.fromkeys(part for some in parts for part in some))
        scores, rows = self._scores(texts), [[texts.index(part) for part in some] for some in parts]
        columns = {name: getattr(scores, name) for name in WORST}
        return Scores(**{name: np.stack([WORST[name].reduce(column[some]) for some in rows]) for name, column in columns.items()})

    def _scores(self, expressions: Sequence[str], among: Sequence[int] | None = None) -> Scores:
        text = encode_expressions(self.model, expressions)
        indexed = self.store.indexed
        places = [indexed[i].row for i in (range(len(indexed)) if among is None else among)]
        found = []
        for some in in_batches(len(places), PAIRS_AT_ONCE):
            found.append(asdict(score_images(self.model, text, from_rows(self.store.rows(places[some]), self.parts))))
        if not found:
            nothing = np.zeros((len(text.tokens), 0), np.float32)
            return Scores(nothing, nothing, nothing, nothing.astype(bool))
        return Scores(**{name: np.concatenate([part[name] for part in found], axis=1) for name in found[0]})

    def rank(self, expressions: str | Sequence[str]) -> Any:
        """Return every image as a `Hit`, best first: a list for one expression, a list of lists for several. Equals keep their order."""
        scores, files = self.scores(expressions), self.files
        ranked = []
        for e in range(len(scores.score)):
            order = np.argsort(-scores.score[e], kind="stable")
            columns = (scores.score[e], scores.no_target_prob[e], scores.region_score[e], scores.no_target[e])
            ranked.append([Hit(files[i], *(column[i].item() for column in columns)) for i in order])
        return ranked[0] if isinstance(expressions, str) else ranked

    def found(self, expression: str) -> list[Hit]:
        """Return the images in which the model finds a target, best first, as `rank` has them.

        The second part of a union is looked for only where the first one is, and so on.
        """
        among, columns = np.arange(len(self)), dict[str, np.ndarray]()
        for part in parts_of(expression):
            new = {name: column[0] for name, column in asdict(self._scores([part], among.tolist())).items()}
            columns = {name: WORST[name](columns[name], column) if columns else column for name, column in new.items()}
            there = ~columns["no_target"]
            among, columns = among[there], {name: column[there] for name, column in columns.items()}
        files = self.files
        order = np.argsort(-columns["score"], kind="stable")
        return [Hit(files[among[i]], **{name: column[i].item() for name, column in columns.items()}) for i in order]

    def search(self, expressions: str | Sequence[str], top: int = 10) -> Any:
        """Return at most `top` images in which the model finds a target, best first; lists as in `rank`.

        Raises:
            GrexError: an expression that no model answers, or `top` below 1.
        """
        if top < 1:
            raise fault(f"top is {top}", "at least 1", "ask for one image or more")
        chosen = [self.found(expression)[:top] for expression in ([expressions] if isinstance(expressions, str) else expressions)]
        return chosen[0] if isinstance(expressions, str) else chosen

    def read(self, file: str) -> np.ndarray:
        """Return an indexed image, uint8 [H, W, 3].

        Raises:
            GrexError: a file that is not in the index, or can no longer be read.
        """
        if file not in self.store.entries:
            raise fault(f"{file}, which is not in the index", "one of its files", "open the index again")
        resolve_image(self.images, file)
        return read_image(self.images, file)

    def ground(self, file: str, expression: str) -> Grounding:
        """Answer an expression for one image of the folder with masks, from the image itself."""
        return self.model.ground(self.read(file), expression)

    def _add(self, items: Sequence[ImageFile]) -> None:
        images, good, refused = [], [], []
        for item in items:
            entry = Entry(item.file, item.size_bytes, item.mtime_ns)
            try:
                images.append(read_image(self.images, item.file))
                good.append(entry)
            except (GrexError, OSError) as error:
                refused.append(Entry(item.file, item.size_bytes, item.mtime_ns, refused=short_reason(error)))
        if good:
            self.store.add(good, to_rows(compact(self.model, images), self.parts))
        self.store.note(refused)


def open_index(
    model: str | Path | GrexModel,
    images: str | Path,
    index: str | Path | None = None,
    *,
    device: str = "auto",
    update: bool = True,
    rebuild: bool = False,
) -> SearchIndex:
    """Open the index of a folder of images; build it, or bring it up to date, unless `update` is false.

    model: a loaded one, a model folder or a hub id.  index: folder of the index; None = .grex_index in `images`.
    device: auto | cpu | cuda, of a model that is loaded here.  rebuild: throw away what is there, of another model too.

    Raises:
        GrexError: a model that cannot be searched with (`check_model`), no such folder, or an index of another model.
    """
    if not Path(images).is_dir():
        raise fault(f"--images {images}, which is no folder", "a folder of images", "check the path")
    if not isinstance(model, GrexModel):
        model = GrexModel.from_pretrained(model, device=pick_device(device), precision="fp32")
    opened = SearchIndex(model, images, index if index is not None else Path(images) / INDEX_FOLDER, rebuild=rebuild)
    if update:
        done = opened.update()
        counts = f"{done.added} new, {done.changed} changed, {done.removed} removed, {done.kept} kept, {len(done.refused)} refused"
        print(f"index of {images}: {len(opened)} images ({counts})", file=sys.stderr)
    return opened


def fingerprint(model: GrexModel) -> str:
    """Return a hash of all that decides what is kept of an image; text encoder and language part have no say in it."""
    config = model.config
    decoder = {name: value for name, value in to_dict(config.model.decoder).items() if name != "loss"}
    vision = {name: value for name, value in to_dict(config.model.vision).items() if name != "weights"}
    settings = [vision, to_dict(config.model.pixel_decoder), decoder, config.data.image_size, config.data.resize]
    hashed = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=20)
    grounding: Any = model.grounding
    for name, part in (("vision", grounding.vision), ("pixels", grounding.pixel_decoder), ("image", grounding.decoder.image_part)):
        for key, value in part.state_dict().items():
            hashed.update(f"{name}.{key} {value.dtype} {tuple(value.shape)}".encode())
            hashed.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def _same(entry: Entry | None, item: ImageFile) -> bool:
    return entry is not None and (entry.size_bytes, entry.mtime_ns) == (item.size_bytes, item.mtime_ns)
