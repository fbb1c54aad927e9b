"""Ground truth of one split of a dataset folder, streamed: byte offsets are held, records are parsed when they are scored."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from grex_mllm.data.records import EXPRESSIONS, IMAGES, INFO, ImageTable, decode_line, expression_findings, read_info, read_lines
from grex_mllm.errors import GrexError, fault
from grex_mllm.metrics.truth import Truth, target_mask
from grex_mllm.ops.rle import Rle
from grex_mllm.score.identity import id_number, sha256_of
from grex_mllm.types import ExpressionRecord, ImageRecord

IMAGES_HELD = 64
MASKS_HELD = 512


@dataclass
class TruthFolder:
    """One split. offsets, numbers: of its expressions in file order (int64, uint64 [N]); other_numbers: of all other splits."""

    folder: Path
    split: str
    info: dict[str, Any]
    offsets: np.ndarray
    numbers: np.ndarray
    other_numbers: np.ndarray
    images: ImageTable

    def __post_init__(self) -> None:
        self._held_image = lru_cache(IMAGES_HELD)(self.images.__getitem__)
        self._held_mask = lru_cache(MASKS_HELD)(lambda image_id, targets, size: target_mask(self.image(image_id), list(targets), size))

    def __len__(self) -> int:
        return len(self.offsets)

    def expressions(self, start: int = 0, stop: int | None = None) -> Iterator[ExpressionRecord]:
        """Yield the records at positions start..stop of the split."""
        with (self.folder / EXPRESSIONS).open("rb") as file:
            for offset in self.offsets[start:stop]:
                if file.tell() != offset:
                    file.seek(offset)
                yield ExpressionRecord(**decode_line(file.readline())[0])

    def id_at(self, position: int) -> str:
        """Return the id of one expression of the split."""
        return next(self.expressions(position, position + 1)).expression_id

    def image(self, image_id: str) -> ImageRecord:
        """Return an image record; the last few are held."""
        if image_id not in self.images:
            raise fault(f'image "{image_id}"', f"the id of a line of {self.folder / IMAGES}", "fix expressions.jsonl")
        return self._held_image(image_id)

    def about(self, record: ExpressionRecord, tasks: dict[str, Any]) -> Truth:
        """Return what is true of an expression, for the metrics of a protocol (`tasks`: their rules)."""
        find = partial(self.image, record.image_id)
        return Truth(record.expression_id, record.targets, find, [record.expression], record.ref_id, tasks, self.mask)

    def mask(self, image_id: str, targets: list[str], size: tuple[int, int] | None = None) -> Rle | None:
        """Return `target_mask` of an image; the last few are held."""
        return self._held_mask(image_id, tuple(targets), size)

    def provenance(self) -> dict[str, Any]:
        """Return name, split, SHA-256 of the three files, and the folder's own counts."""
        sums = {name: sha256_of(self.folder / name) for name in (IMAGES, EXPRESSIONS, INFO)}
        return {"name": self.info.get("name"), "split": self.split, "sha256": sums, "counts": self.info.get("counts")}


def open_truth(folder: str | Path, split: str) -> TruthFolder:
    """Index a split of a dataset folder; every line of expressions.jsonl is checked for its form.

    Raises:
        GrexError: folder or file missing, a malformed line, a repeated expression id, or a split that is not there.
    """
    folder = Path(folder)
    info = read_info(folder)
    offsets, numbers, others = array("q"), array("Q"), array("Q")
    splits: Counter[str] = Counter()
    path = folder / EXPRESSIONS
    for line, offset, value in read_lines(path):
        for finding in expression_findings(value):
            raise GrexError(f"{path} line {line}, field {finding[0]}: {finding[1]}; expected {finding[2]}; fix the line")
        number = id_number(value["expression_id"])
        splits[value["split"]] += 1
        (numbers if value["split"] == split else others).append(number)
        if value["split"] == split:
            offsets.append(offset)
    if not offsets:
        named = ", ".join(f"{name} ({count})" for name, count in splits.items()) or "none: the file is empty"
        raise fault(f'split "{split}" of {folder}', f"one of its splits: {named}", "name one of these")
    here, elsewhere = np.array(numbers, np.uint64), np.array(others, np.uint64)
    repeated = len(here) + len(elsewhere) - len(np.unique(np.concatenate([here, elsewhere])))
    if repeated:
        raise fault(f"{path} with {repeated} repeated expression ids", "ids of their own", "run grex data check")
    return TruthFolder(folder, split, info, np.array(offsets, np.int64), here, elsewhere, ImageTable(folder / IMAGES))
