"""How far the no-target probability can be trusted: expected calibration error, reliability bins, threshold and risk-coverage curves.

The probability axis is cut into NUM_BINS fine bins; counts add up exactly, so shards merge and memory is constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from grex_mllm.errors import fault
from grex_mllm.metrics.sums import ratio

NUM_BINS = 1000
RELIABILITY_BINS = 10
SCALE = 1 << 40  # probabilities are summed as whole multiples of 2**-40


class Calibration:
    """Accumulate (no-target probability, truly no target) pairs."""

    def __init__(self) -> None:
        self._sums = np.zeros((3, NUM_BINS), np.int64)  # samples, no-target samples, sum of probabilities * SCALE

    def update(self, no_target_prob: Any, gt_no_target: Any) -> None:
        """Add probabilities in [0, 1], [E], and flags, [E] (NumPy, tensors or lists).

        Raises:
            GrexError: a probability that is NaN or outside [0, 1].
        """
        prob = np.atleast_1d(np.asarray(no_target_prob.detach().cpu() if hasattr(no_target_prob, "detach") else no_target_prob, np.float64))
        truth = np.atleast_1d(np.asarray(gt_no_target.cpu() if hasattr(gt_no_target, "cpu") else gt_no_target)).astype(np.int64)
        if not ((prob >= 0) & (prob <= 1)).all():
            raise fault(f"no-target probabilities {prob[:5].tolist()}", "numbers in [0, 1]", "apply a softmax or sigmoid")
        at = np.minimum((prob * NUM_BINS + 1e-9).astype(np.int64), NUM_BINS - 1)
        np.add.at(self._sums[0], at, 1)
        np.add.at(self._sums[1], at, truth)
        np.add.at(self._sums[2], at, np.rint(prob * SCALE).astype(np.int64))

    def merge(self, other: Calibration) -> Self:
        """Add the counts of another object."""
        self._sums = self._sums + other._sums
        return self

    def state(self) -> list[list[int]]:
        """Return the counts as plain integers."""
        return [[int(v) for v in row] for row in self._sums]

    def load_state(self, state: Sequence[Sequence[int]]) -> Self:
        """Replace the counts by those of `state()`."""
        self._sums = np.array(state, np.int64)
        return self

    def compute(self) -> dict[str, Any]:
        """Return num_samples, ECE (10 equal bins), `reliability` (mean probability against share of no-target, by bin) and `curve`.

        curve: for thresholds 0, 0.05 ... 1, N_acc and T_acc if "no target" were said at probability >= threshold, and, for a system that
        abstains there (answers only below the threshold), coverage = share answered and risk = share of these that have no target.
        """
        num, none, total = self._sums
        count = int(num.sum())
        bins = [slice(k * NUM_BINS // RELIABILITY_BINS, (k + 1) * NUM_BINS // RELIABILITY_BINS) for k in range(RELIABILITY_BINS)]
        reliability, error = [], 0.0
        for part in bins:
            n = int(num[part].sum())
            confidence = None if n == 0 else int(total[part].sum()) / SCALE / n
            share = ratio(int(none[part].sum()), n)
            reliability.append({"num_samples": n, "mean_probability": confidence, "no_target_share": share})
            if confidence is not None and share is not None:
                error += abs(confidence - share) * n
        return {
            "num_samples": count,
            "ECE": error / count if count else None,
            "reliability": reliability,
            "curve": [self._at(k * NUM_BINS // 20) for k in range(21)],
        }

    def _at(self, first: int) -> dict[str, Any]:
        num, none = self._sums[0], self._sums[1]
        n_all, none_all = int(num.sum()), int(none.sum())
        below, none_below = int(num[:first].sum()), int(none[:first].sum())
        return {
            "threshold": first / NUM_BINS,
            "N_acc": ratio(none_all - none_below, none_all),
            "T_acc": ratio(below - none_below, n_all - none_all),
            "coverage": ratio(below, n_all),
            "risk": ratio(none_below, below),
        }
