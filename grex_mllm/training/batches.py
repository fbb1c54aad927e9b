"""Which batch belongs to which step: a pure function of (seed, step, rank), so that runs resume exactly and workers cannot matter."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from grex_mllm.errors import GrexError, fault
from grex_mllm.types import Batch

GROUND, GENERATE = "ground", "generate"
TASK_STREAM, DATA_STREAM, MODEL_STREAM = 1, 2, 3  # keep the uses of one seed apart
BLOCK = 4096
WORD = (1 << 64) - 1


class BatchSource(Protocol):
    """Batches by number. `at` depends on its argument only; `share` gives what one of several processes sees of every batch."""

    def at(self, index: int) -> tuple[str, Batch]: ...

    def share(self, rank: int, num_ranks: int) -> BatchSource: ...


class TaskMixture:
    """Mix grounding and generation batches with a given ratio.

    make: task -> function from image positions to a Batch. Positions of one task count 0, 1, 2, ... without gaps over its
    batches, so a finite dataset is passed through evenly (as `data.dataset` does). Rank r of n takes positions r, r + n, ... of a batch.
    """

    def __init__(
        self,
        make: Mapping[str, Callable[[list[int]], Batch]],
        batch_images: int,
        ground_ratio: float,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if not 0 <= ground_ratio <= 1:
            raise fault(f"train.ground_ratio is {ground_ratio}", "a share between 0 and 1", "give 1 for grounding only")
        if batch_images < 1 or batch_images % num_ranks:
            raise fault(f"train.batch_images is {batch_images}", f"a multiple of the {num_ranks} processes", "change one")
        needed = {GROUND} if ground_ratio == 1 else {GENERATE} if ground_ratio == 0 else {GROUND, GENERATE}
        if missing := needed - make.keys():
            raise fault(
                f"train.ground_ratio is {ground_ratio} but there is no data for {', '.join(sorted(missing))}",
                "data for each task of the mixture",
                "set train.ground_ratio to 1 (no generator) or give data",
            )
        self.make, self.batch_images, self.ground_ratio, self.seed = make, batch_images, ground_ratio, seed
        self.rank, self.num_ranks = rank, num_ranks
        self._totals = [0]

    def share(self, rank: int, num_ranks: int) -> TaskMixture:
        """Return the source that process `rank` of `num_ranks` reads."""
        return TaskMixture(self.make, self.batch_images, self.ground_ratio, self.seed, rank, num_ranks)

    def task(self, index: int) -> str:
        """Draw the task of a batch."""
        return GROUND if self._is_ground(index, index + 1)[0] else GENERATE

    def positions(self, index: int) -> list[int]:
        """List the image positions, counted within the task, that this process takes of a batch."""
        before = self._ground_before(index)
        batch = before if self.task(index) == GROUND else index - before
        return list(range(batch * self.batch_images + self.rank, (batch + 1) * self.batch_images, self.num_ranks))

    def at(self, index: int) -> tuple[str, Batch]:
        """Make batch number `index`."""
        task = self.task(index)
        return task, self.make[task](self.positions(index))

    def _is_ground(self, start: int, stop: int) -> np.ndarray:
        """bool [stop - start]: which batches are grounding batches."""
        uniform = (_hash(np.arange(start, stop, dtype=np.uint64), mix(self.seed, TASK_STREAM)) >> np.uint64(11)) * 2.0**-53
        return uniform < self.ground_ratio

    def _ground_before(self, index: int) -> int:
        """Count the grounding batches among 0 .. index - 1; whole blocks are counted once."""
        block = index // BLOCK
        while len(self._totals) <= block:
            start = (len(self._totals) - 1) * BLOCK
            self._totals.append(self._totals[-1] + int(self._is_ground(start, start + BLOCK).sum()))
        return self._totals[block] + int(self._is_ground(block * BLOCK, index).sum())


def mix(*numbers: int) -> int:
    """Hash integers into one of 64 bits (splitmix64), the same on every machine and process."""
    state = 0
    for number in numbers:
        state = int(_hash(np.array([number & WORD], dtype=np.uint64), state)[0])
    return state


def _hash(values: np.ndarray, salt: int) -> np.ndarray:
    """splitmix64's finaliser over values + salt; uint64 arrays wrap silently."""
    x = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(salt)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def seed_all(*numbers: int) -> None:
    """Seed python, numpy and torch (all devices) from a hash of the numbers."""
    seed = mix(*numbers)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed & (WORD >> 1))


def stream(source: BatchSource, start: int, stop: int, num_workers: int, seed: int, rank: int = 0) -> Iterator[tuple[str, Batch]]:
    """Yield the batches start .. stop - 1 in order, made by `num_workers` processes (0: by this one).

    Raises:
        GrexError: what the data raised, with its own message also from a worker.
    """
    steps = _Steps(source, start, stop, seed, rank, packed=num_workers > 0)
    loader: DataLoader[Any] = DataLoader(
        steps, batch_size=None, shuffle=False, num_workers=num_workers, collate_fn=_same, prefetch_factor=2 if num_workers else None
    )
    for item in loader:
        if isinstance(item, GrexError):
            raise item
        task, batch = item
        yield task, map_tensors(batch, torch.from_numpy, np.ndarray) if num_workers else batch


def map_tensors(tree: Any, change: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """Apply `change` to every tensor (or other `kind`) of nested dataclasses, dictionaries, lists and tuples."""
    if isinstance(tree, kind):
        return change(tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{f.name: map_tensors(getattr(tree, f.name), change, kind) for f in fields(tree) if f.init})
    if isinstance(tree, dict):
        return {key: map_tensors(value, change, kind) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(value, change, kind) for value in tree)
    return tree


class _Steps(Dataset[Any]):
    """A map-style dataset over steps; the sequential sampler of the loader keeps their order."""

    def __init__(self, source: BatchSource, start: int, stop: int, seed: int, rank: int, packed: bool) -> None:
        self.source, self.start, self.stop, self.seed, self.rank, self.packed = source, start, stop, seed, rank, packed

    def __len__(self) -> int:
        return max(self.stop - self.start, 0)

    def __getitem__(self, offset: int) -> Any:
        index = self.start + offset
        # a library in the data path that draws from a global generator is thereby a function of the step, too
        seed_all(self.seed, DATA_STREAM, index, self.rank)
        try:
            task, batch = self.source.at(index)
        except GrexError as error:
            return error
        # A batch holds hundreds of small tensors. Sent as tensors, each takes a file descriptor and shared memory, and both run
        # out; arrays go through a pipe.
        return task, map_tensors(batch, lambda tensor: tensor.numpy()) if self.packed else batch


def _same(item: Any) -> Any:
    return item
