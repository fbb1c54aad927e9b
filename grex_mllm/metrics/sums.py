"""Exact sums of fractions: the same total in any order, on any device, split over any number of processes.

A float sum depends on its order. Every fraction of two counts below 2**31 is a whole number of 2**-84, so it is cut into three whole
numbers of 28 bits each; these add up in int64 without loss for 2**35 samples. `mean` rounds once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Self

import numpy as np

from grex_mllm.errors import fault

BITS = 28
NUM_LIMBS = 3


def limb_sums(values: Any) -> list[Any]:
    """Return the sums of the three limbs, high to low, of float64 values [E] in [0, 1] (NumPy array or tensor; so are the sums)."""
    sums, rest = [], values
    for _ in range(NUM_LIMBS):
        rest = rest * float(1 << BITS)
        limb = rest.floor() if hasattr(rest, "floor") else np.floor(rest)
        rest = rest - limb
        sums.append(limb.long().sum() if hasattr(limb, "long") else limb.astype(np.int64).sum())
    return sums


def mean(limbs: Any, count: int) -> float | None:
    """Return the correctly rounded mean of the values whose limb sums are given; None without values."""
    if count == 0:
        return None
    total = 0
    for limb in limbs:
        total = (total << BITS) + int(limb)
    return float(Fraction(total, count << (BITS * NUM_LIMBS)))


def ratio(part: int, whole: int) -> float | None:
    """Return part / whole, or None where the whole is 0."""
    return int(part) / int(whole) if int(whole) else None


def half(first: float | None, second: float | None) -> float | None:
    """Return the mean of two numbers, None where one is missing."""
    return None if first is None or second is None else (first + second) / 2


class IntegerSums:
    """A vector (or matrix) of whole numbers, `_sums`, that adds up: what most metrics keep. settings: must agree to merge."""

    def __init__(self, shape: int | tuple[int, ...], settings: tuple[Any, ...] = ()) -> None:
        self._sums, self.settings = np.zeros(shape, np.int64), settings

    def merge(self, other: Any) -> Self:
        """Add the sums of another object with the same settings."""
        if (type(self), self.settings) != (type(other), other.settings):
            raise fault(f"merging {other.settings}", f"the same settings, {self.settings}", "use one protocol for all shards")
        self._sums = self._whole() + other._whole()
        return self

    def state(self) -> list[Any]:
        """Return the sums as plain integers: what processes exchange."""
        return list(self._whole().tolist())

    def load_state(self, state: Sequence[Any]) -> Self:
        """Replace the sums by those of `state()`."""
        self._sums = np.array(state, np.int64).reshape(self._sums.shape)
        return self

    def _whole(self) -> np.ndarray:
        return self._sums


class Means(IntegerSums):
    """Means of some numbers of the rows, any finite floats; exact as long as their sizes stay below 2**27."""

    def __init__(self, *names: str) -> None:
        super().__init__((len(names), 2 + NUM_LIMBS), names)

    def update_rows(self, columns: dict[str, np.ndarray]) -> None:
        """Add rows: an array [n] for each name (others are ignored)."""
        for number, name in enumerate(self.settings):
            values = columns[name].astype(np.float64)
            if not np.isfinite(values).all():
                raise fault(f'a value of "{name}" that is no finite number', "finite numbers", "fix the row of the metric")
            whole = np.floor(values)
            self._sums[number] += np.array([len(values), whole.astype(np.int64).sum(), *limb_sums(values - whole)], np.int64)

    def compute(self) -> dict[str, Any]:
        """Return num_samples and each mean, None without samples."""
        found: dict[str, Any] = {"num_samples": int(self._sums[0, 0])}
        for name, (count, whole, *limbs) in zip(self.settings, self._sums.tolist(), strict=True):
            found[name] = mean([(whole << BITS) + limbs[0], *limbs[1:]], count)
        return found


class KeptRows:
    """Keeps all rows for `finish(rows, rules)`: for numbers of the whole that no sums can express."""

    def __init__(self, finish: Callable[[list[dict[str, Any]], Any], dict[str, Any]], rules: Any) -> None:
        self.finish, self.rules, self.rows = finish, rules, list[dict[str, Any]]()

    def update_rows(self, columns: dict[str, np.ndarray]) -> None:
        """Add rows, here as they are: an array [n] of dicts under "row"."""
        self.rows += columns["row"].tolist()

    def merge(self, other: KeptRows) -> Self:
        """Add the rows of another object with the same rules."""
        if self.rules != other.rules:
            raise fault(f"merging {other.rules}", f"the same rules, {self.rules}", "use one protocol for all shards")
        self.rows += other.rows
        return self

    def state(self) -> list[dict[str, Any]]:
        """Return the rows."""
        return self.rows

    def load_state(self, state: list[dict[str, Any]]) -> Self:
        """Replace the rows."""
        self.rows = state
        return self

    def compute(self) -> dict[str, Any]:
        """Return what the metric makes of all rows."""
        return self.finish(self.rows, self.rules)


def empty_sums(entry: Any, rules: Any, protocol: str) -> Any:
    """Return the sums of an entry of METRICS, or what keeps its rows where it has `finish`."""
    return KeptRows(entry.finish, rules) if hasattr(entry, "finish") else entry.sums(rules, protocol)


def stacked(entry: Any, rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return rows as columns, what `update_rows` takes: an array [n] for each key, or the rows themselves for `finish`."""
    if hasattr(entry, "finish"):
        return {"row": np.fromiter(rows, object, len(rows))}
    return {key: np.array([row[key] for row in rows]) for key in rows[0]} if rows else {}
