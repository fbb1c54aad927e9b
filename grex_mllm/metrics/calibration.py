"""Entry "calibration" of METRICS: how far the no-target probability can be trusted.

Expected calibration error, reliability bins, threshold and risk-coverage curves.

The probability axis is cut into NUM_BINS fine bins; counts add up exactly, so shards merge and memory is constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from grex_mllm.errors import fault
from grex_mllm.metrics.columns import Column
from grex_mllm.metrics.segmentation import no_target_probability
from grex_mllm.metrics.sums import IntegerSums, ratio
from grex_mllm.metrics.truth import Truth

NUM_BINS = 1000
RELIABILITY_BINS = 10
SCALE = 1 << 40  # probabilities are summed as whole multiples of 2**-40
TITLE = "No-target probability"
NEEDS = {"strict": ("no_target_prob",)}
COLUMNS = (Column("ECE", "ECE", higher_is_better=False),)


@dataclass(frozen=True)
class Rules:
    """Nothing to choose."""


def row(prediction: dict[str, Any] | None, truth: Truth, rules: Rules, protocol: str) -> dict[str, Any] | None:
    """Return the probability; None where there is none."""
    if prediction is None or prediction.get("no_target_prob") is None:
        return None
    return {"no_target_prob": no_target_probability(prediction)}


def sums(rules: Rules, protocol: str) -> Calibration:
    """Return empty sums."""
    return Calibration()


class Calibration(IntegerSums):
    """Accumulate (no-target probability, truly no target) pairs."""

    def __init__(self) -> None:
        super().__init__((3, NUM_BINS))  # samples, no-target samples, sum of probabilities * SCALE

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

    def update_rows(self, columns: dict[str, np.ndarray]) -> None:
        """Add rows of the scorer."""
        self.update(columns["no_target_prob"], columns["num_targets"] == 0)

    def compute(self) -> dict[str, Any]:
        """Return num_samples, ECE (10 equal bins), `reliability` (mean probability against share of no-target, by bin) and `curve`.

        curve: for thresholds 0, 0.05 ... 1, N_acc and T_acc if "no target" were said at probability >= threshold, and, for a system that
        abstains there (answers only below the threshold), coverage = share answered and risk = share of these that have no target.
        """
        count = int(self._sums[0].sum())
        reliability, error = [], 0.0
        for n, none, total in self._sums.reshape(3, RELIABILITY_BINS, -1).sum(2).T.tolist():
            confidence, share = None if n == 0 else total / SCALE / n, ratio(none, n)
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
