"""Dataset folders as samples: every order and every choice is a pure function of (seed, position).

A training dataset is a stream: position p = 0, 1, 2, ... without end. Position p lies in epoch p // len, and an epoch is a permutation
drawn from (seed, epoch) that holds every expression once. So a run that stops after k batches resumes at position k * batch size, and
neither the number of loader workers nor the number of processes changes what is seen. An epoch's end cuts nothing off: where its samples
are no multiple of a batch, one batch holds the last of this epoch and the first of the next. An evaluation dataset is a list: every
expression once, in file order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from grex_mllm.data.images import load_image, resolve_image
from grex_mllm.data.records import EXPRESSIONS, IMAGES, INFO, Dataset, load_dataset
from grex_mllm.errors import GrexError, fault
from grex_mllm.types import ExpressionRecord, Sample

MIXTURE_BLOCK = 1000  # positions over which a mixture keeps its ratio exactly
EXACT, RELEASED = SAMPLINGS = ("exact", "released")
SAME_ORIENTATION = 6  # samples in a row with images of one orientation under RELEASED: a GPU's images, 48 on 8 GPUs


def read_once(folder: str | Path, image_root: str | Path | None = None) -> Dataset:
    """Return what `load_dataset` gives; a folder whose files are unchanged is not parsed again by this process."""
    files = [Path(folder).resolve() / name for name in (INFO, IMAGES, EXPRESSIONS)]
    state = tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file())
    return _read(Path(folder), image_root, state)


@lru_cache(maxsize=4)
def _read(folder: Path, image_root: str | Path | None, _state: tuple[tuple[Path, int, int], ...]) -> Dataset:
    return load_dataset(folder, image_root)


class SampleSource(Protocol):
    """What the loop reads: samples by position. Folders, mixtures and synthetic scenes all are."""

    def __len__(self) -> int:
        """Number of samples of an epoch."""

    def __getitem__(self, position: int) -> Sample:
        """Sample at a position; a training source has no last position."""


class Epochs:
    """Which expressions of which image stand at a position of a stream: every expression exactly once in each epoch.

    An image with n expressions gives ceil(n / most) samples, of sizes that differ by one at most; which expressions go together, and in
    which order, is drawn anew in each epoch, and so is the order of all samples. Every epoch has the same number of samples.

    sizes: expressions of each image, all above 0.  most: expressions of a sample.
    wide: for each image, whether it is wider than high; None = any order. With it a sample waits until SAME_ORIENTATION of
    its orientation can come in a row, as in the loader of the released ReLA (detectron2's `AspectRatioGroupedDataset`). There each GPU
    sorts a share of its own, and what is left over at the end of an epoch waits for the next; here it comes last.
    """

    def __init__(self, sizes: Sequence[int], most: int, seed: int = 0, wide: Sequence[bool] | None = None) -> None:
        self.sizes, self.seed = np.asarray(sizes, np.int64), seed
        self.parts = -(-self.sizes // most)
        self.image = np.repeat(np.arange(len(self.sizes)), self.parts)  # of each sample of an epoch
        self.first = np.cumsum(self.parts) - self.parts  # sample of each image
        self.wide = None if wide is None else np.asarray(wide, bool)[self.image]
        self._rows: tuple[int, np.ndarray] | None = None  # the last epoch asked for, and the places in its order

    def __len__(self) -> int:
        """Number of samples of an epoch."""
        return len(self.image)

    def at(self, position: int) -> tuple[int, list[int]]:
        """Return the image and the places of its expressions at a position."""
        epoch, sample = epoch_index(self._in_rows(position), len(self), self.seed)
        image = int(self.image[sample])
        size, parts, part = int(self.sizes[image]), int(self.parts[image]), sample - int(self.first[image])
        drawn = np.random.default_rng([self.seed, epoch, image]).permutation(size)
        return image, drawn[size * part // parts : size * (part + 1) // parts].tolist()

    def _in_rows(self, position: int) -> int:
        """Return the position in the plain order whose sample comes here."""
        if self.wide is None:
            return position
        epoch, place = divmod(position, len(self))
        if self._rows is None or self._rows[0] != epoch:
            self._rows = epoch, rows_of_one_orientation(self.wide[_permutation(len(self), self.seed, epoch)])
        return epoch * len(self) + int(self._rows[1][place])


def rows_of_one_orientation(wide: np.ndarray) -> np.ndarray:
    """Return the places of samples in an order in which SAME_ORIENTATION of one orientation are neighbours; what is left over comes last.

    wide: bool for each sample, whether its image is wider than high.
    """
    turn = np.zeros(len(wide), np.int64)  # the place at which a sample's row is complete
    for side in (True, False):
        places = np.flatnonzero(wide == side)
        complete = len(places) - len(places) % SAME_ORIENTATION
        turn[places[:complete]] = np.repeat(places[:complete][SAME_ORIENTATION - 1 :: SAME_ORIENTATION], SAME_ORIENTATION)
        turn[places[complete:]] = len(wide) + side
    return np.argsort(turn, kind="stable")


class FolderDataset:
    """Samples of one split of a dataset folder: an image with up to `expressions_per_image` of its expressions.

    An image with more than `expressions_per_image` comes several times.  training: a stream in shuffled order, see `Epochs`; otherwise
    all expressions in file order.  sampling: of a training, "exact" or "released" (see `data.sampling`).
    targeted_only: leave no-target expressions out (for generation).  num_images: take only the first images, to overfit or to try.
    groups: the expressions of each sample; of a training, of each image.

    Raises:
        GrexError: at construction for folder, split and records; at access for images that cannot be read or have another size than stated.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        expressions_per_image: int = 8,
        *,
        training: bool = False,
        seed: int = 0,
        sampling: str = EXACT,
        targeted_only: bool = False,
        num_images: int | None = None,
        image_root: str | Path | None = None,
    ) -> None:
        if expressions_per_image < 1:
            raise fault(f"expressions_per_image {expressions_per_image}", "at least 1", "fix data.expressions_per_image")
        self.dataset = read_once(folder, image_root)
        self.split, self.training = split, training
        self.expressions = self.dataset.expressions_of(split)
        if targeted_only:
            self.expressions = [record for record in self.expressions if record.targets]
            if not self.expressions:
                raise fault(f'split "{split}" of {folder} without any target', "an expression with a target", "give another split")
        by_image: dict[str, list[ExpressionRecord]] = {}
        for record in self.expressions:
            by_image.setdefault(record.image_id, []).append(record)
        self.groups = list(by_image.values())[:num_images]
        n = expressions_per_image
        if training:
            images = self.dataset.images
            wide = [images.is_wide(group[0].image_id) for group in self.groups] if sampling == RELEASED else None
            self.epochs = Epochs([len(group) for group in self.groups], n, seed, wide)
        else:
            self.groups = [group[start : start + n] for group in self.groups for start in range(0, len(group), n)]

    def __len__(self) -> int:
        return len(self.epochs if self.training else self.groups)

    def __getitem__(self, position: int) -> Sample:
        if self.training:
            image, chosen = self.epochs.at(position)
            return self.sample_of([self.groups[image][place] for place in chosen])
        if not 0 <= position < len(self):
            raise IndexError(position)
        return self.sample_of(self.groups[position])

    def __iter__(self) -> Iterator[Sample]:
        return (self[position] for position in range(len(self)))

    def sample_of(self, expressions: list[ExpressionRecord]) -> Sample:
        """Read the image of some expressions of one image, and return it with them.

        Raises:
            GrexError: an image that cannot be read or has another size than stated, or targets that are none of its instances.
        """
        images = self.dataset.images
        record = images[expressions[0].image_id]
        place = f"{self.dataset.folder / IMAGES} line {images.line_of(record.image_id)}"
        try:
            image = load_image(resolve_image(self.dataset.image_root, record.file))
        except GrexError as error:
            raise GrexError(f"{place}: {error}") from None
        if image.shape[:2] != (record.height, record.width):
            raise GrexError(
                f"{place}: image {record.image_id} is stated as {record.height}x{record.width} (height x width) but {record.file} has "
                f"{image.shape[0]}x{image.shape[1]}; expected the same; check the height/width order of the record"
            )
        known = {instance.annotation_id: instance.iscrowd for instance in record.instances}
        for expression in expressions:
            for target in expression.targets:
                if known.get(target, True):
                    problem = "is a crowd region" if target in known else f"is none of its image's annotations ({place})"
                    raise GrexError(
                        f'expression {expression.expression_id}: target "{target}" of field targets {problem}; expected the id of an '
                        "instance of the image; fix expressions.jsonl"
                    )
        return Sample(image, record, expressions, view=f"{self.dataset.folder}/{record.image_id}")


class Mixture:
    """Several training sources in a fixed ratio: of every MIXTURE_BLOCK positions each source gets its share exactly, in shuffled order.

    A source is read at its positions 0, 1, 2, ... in turn: it passes through its own epochs exactly, each at a pace of its own, and an
    epoch of one may end in the middle of another's. The mixture has none of its own; its length is the sum of theirs.
    """

    def __init__(self, sources: Sequence[SampleSource], weights: Sequence[float], seed: int = 0) -> None:
        if len(sources) == 0 or len(sources) != len(weights) or min(weights) <= 0:
            raise fault(f"{len(sources)} datasets with weights {list(weights)}", "one weight above 0 for each dataset", "fix the mixture")
        self.sources, self.seed = list(sources), seed
        self.shares = _apportion(weights, MIXTURE_BLOCK)

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def __getitem__(self, position: int) -> Sample:
        block, place = divmod(position, MIXTURE_BLOCK)
        owner, rank = _mixture_block(self.shares, self.seed, block)
        which = int(owner[place])
        return self.sources[which][block * self.shares[which] + int(rank[place])]


def epoch_index(position: int, length: int, seed: int) -> tuple[int, int]:
    """Map a position 0, 1, 2, ... to (epoch, index of a sample): every epoch is another permutation drawn from (seed, epoch)."""
    epoch, place = divmod(position, length)
    return epoch, int(_permutation(length, seed, epoch)[place])


@lru_cache(maxsize=16)  # a mixture reads its sources in turn
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)


@lru_cache(maxsize=8)
def _mixture_block(shares: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    owner = np.repeat(np.arange(len(shares)), shares)
    np.random.default_rng([seed, block]).shuffle(owner)
    rank = np.zeros(len(owner), np.int64)
    for which in range(len(shares)):
        rank[owner == which] = np.arange(shares[which])
    return owner, rank


def _apportion(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Share out `total` in the ratio of the weights, whole numbers, largest remainders first, at least one each."""
    exact = np.asarray(weights, np.float64) / sum(weights) * total
    shares = np.maximum(1, np.floor(exact)).astype(np.int64)
    while shares.sum() != total:
        step = 1 if shares.sum() < total else -1
        shares[int(np.argmax((exact - shares) * step))] += step
    return tuple(int(share) for share in shares)
