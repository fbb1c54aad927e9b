"""Which batch belongs to which step: a pure function of (seed, step, rank), so that runs resume exactly and workers cannot matter."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from grex_mllm.errors import GrexError, fault
from grex_mllm.training.interrupt import ignore_signals
from grex_mllm.types import Batch

DATA_STREAM, MODEL_STREAM, ORDER_STREAM = 2, 3, 4  # keep the uses of one seed apart
WORD = (1 << 64) - 1


class BatchSource(Protocol):
    """Batches by number. `at` depends on its argument only; `share` gives what one of several processes sees of every batch.

    `going_on` gives the source for a run that has read `batches` batches of `images` images in all, maybe of another size.
    """

    def at(self, index: int) -> Batch: ...

    def share(self, rank: int, num_ranks: int) -> BatchSource: ...

    def going_on(self, batches: int, images: int) -> BatchSource: ...


class BatchStream:
    """Batches of `batch_images` images each, made by a function from image positions.

    Positions count 0, 1, 2, ... without gaps, so a finite dataset is passed through evenly. Rank r of n takes positions r, r + n, ... of a
    batch. first: where batch 0 begins; other than 0 after batches of another size (`going_on`).
    """

    def __init__(self, make: Callable[[list[int]], Batch], batch_images: int, rank: int = 0, num_ranks: int = 1, *, first: int = 0) -> None:
        if batch_images < 1 or batch_images % num_ranks:
            raise fault(f"train.batch_images is {batch_images}", f"a multiple of the {num_ranks} processes", "change one")
        self.make, self.batch_images, self.rank, self.num_ranks, self.first = make, batch_images, rank, num_ranks, first

    def share(self, rank: int, num_ranks: int) -> BatchStream:
        """Return the source that process `rank` of `num_ranks` reads."""
        return BatchStream(self.make, self.batch_images, rank, num_ranks, first=self.first)

    def going_on(self, batches: int, images: int) -> BatchStream:
        """Return the source whose batch number `batches` begins at position `images`."""
        return BatchStream(self.make, self.batch_images, self.rank, self.num_ranks, first=images - batches * self.batch_images)

    def positions(self, index: int) -> list[int]:
        """List the image positions that this process takes of a batch."""
        start = self.first + index * self.batch_images
        return list(range(start + self.rank, start + self.batch_images, self.num_ranks))

    def at(self, index: int) -> Batch:
        """Make batch number `index`."""
        return self.make(self.positions(index))


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


def stream(source: BatchSource, start: int, stop: int, num_workers: int, *, seed: int, rank: int = 0) -> Iterator[Batch]:
    """Yield the batches start .. stop - 1 in order, made by `num_workers` processes (0: by this one).

    Raises:
        GrexError: what the data raised, with its own message also from a worker.
    """
    steps = _Steps(source, start, stop, seed, rank=rank, packed=num_workers > 0)
    loader: DataLoader[Any] = DataLoader(
        steps,
        batch_size=None,
        shuffle=False,
        num_workers=num_workers,
        collate_fn=_same,
        prefetch_factor=2 if num_workers else None,
        worker_init_fn=ignore_signals,
    )
    for item in loader:
        if isinstance(item, GrexError):
            raise item
        yield map_tensors(item, torch.from_numpy, np.ndarray) if num_workers else item


def map_tensors(tree: Any, change: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """Apply `change` to every tensor (or other `kind`) of nested dataclasses, dictionaries, lists and tuples."""
    if isinstance(tree, kind):
        return change(tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{f.name: map_tensors(getattr(tree, f.name), change, kind) for f in fields(tree) if f.init})
    if isinstance(tree, dict):
        return {key: map_tensors(value, change, kind) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        values = [map_tensors(value, change, kind) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return tree


class _Steps(Dataset[Any]):
    """A map-style dataset over steps; the sequential sampler of the loader keeps their order."""

    def __init__(self, source: BatchSource, start: int, stop: int, seed: int, *, rank: int, packed: bool) -> None:
        self.source, self.start, self.stop, self.seed, self.rank, self.packed = source, start, stop, seed, rank, packed

    def __len__(self) -> int:
        return max(self.stop - self.start, 0)

    def __getitem__(self, offset: int) -> Any:
        index = self.start + offset
        # a library in the data path that draws from a global generator is thereby a function of the step, too
        seed_all(self.seed, DATA_STREAM, index, self.rank)
        try:
            batch = self.source.at(index)
        except GrexError as error:
            return error
        # A batch holds hundreds of small tensors. Sent as tensors, each takes a file descriptor and shared memory, and both run
        # out; arrays go through a pipe.
        return map_tensors(batch, lambda tensor: tensor.numpy()) if self.packed else batch


def _same(item: Any) -> Any:
    return item
