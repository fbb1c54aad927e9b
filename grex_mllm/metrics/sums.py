"""Exact sums of fractions: the same total in any order, on any device, split over any number of processes.

A float sum depends on its order. Every fraction of two counts below 2**31 is a whole number of 2**-84, so it is cut into three whole
numbers of 28 bits each; these add up in int64 without loss for 2**35 samples. `mean` rounds once, at the end.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

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
