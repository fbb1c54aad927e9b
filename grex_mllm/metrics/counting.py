"""Count metrics: N_O over {0, 1, 2, 3, 4, 5, >5} (GREx article): accuracy, mean absolute error, confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from grex_mllm.errors import fault
from grex_mllm.metrics.sums import ratio

NUM_CLASSES = 7
LABELS = ("0", "1", "2", "3", "4", "5", ">5")


class Count:
    """Accumulate the confusion matrix [wanted, predicted]; a last column holds answers that are missing or unreadable.

    Numbers above five are one class: they count as 6 for the error too. A missing answer is counted as wrong by the largest error possible.
    """

    def __init__(self) -> None:
        self._sums = np.zeros((NUM_CLASSES, NUM_CLASSES + 1), np.int64)

    def update(self, pred_count: Any, gt_count: Any, wrong: Any = None) -> None:
        """Add counts, integers [E] or one each (NumPy, tensor or plain). wrong: bool [E].

        Raises:
            GrexError: a negative or fractional count.
        """
        pred, gt = _whole(pred_count), _whole(gt_count)
        if wrong is not None:
            pred = np.where(np.atleast_1d(np.asarray(wrong, bool)), NUM_CLASSES, pred)
        np.add.at(self._sums, (gt, pred), 1)

    def merge(self, other: Count) -> Self:
        """Add the matrix of another object."""
        self._sums = self._sums + other._sums
        return self

    def state(self) -> list[int]:
        """Return the matrix as plain integers, row by row."""
        return [int(v) for v in self._sums.reshape(-1)]

    def load_state(self, state: Sequence[int]) -> Self:
        """Replace the matrix by that of `state()`."""
        self._sums = np.array(state, np.int64).reshape(NUM_CLASSES, NUM_CLASSES + 1)
        return self

    def compute(self) -> dict[str, Any]:
        """Return num_samples, accuracy, mae, and confusion (7 rows wanted x 7 columns predicted + 1 unanswered)."""
        num = int(self._sums.sum())
        classes = np.arange(NUM_CLASSES)
        errors = np.abs(classes[:, None] - classes[None])
        errors = np.concatenate([errors, np.maximum(classes, NUM_CLASSES - 1 - classes)[:, None]], axis=1)
        return {
            "num_samples": num,
            "accuracy": ratio(int(np.trace(self._sums)), num),
            "mae": ratio(int((self._sums * errors).sum()), num),
            "confusion": self._sums.tolist(),
        }


def _whole(counts: Any) -> np.ndarray:
    values = np.atleast_1d(np.asarray(counts.cpu() if hasattr(counts, "cpu") else counts))
    if len(values) and (not np.isfinite(values).all() or (values < 0).any() or (values != np.floor(values)).any()):
        raise fault(f"counts {values[:5].tolist()}", "whole numbers >= 0", "clip and round the predicted counts")
    return np.minimum(values, NUM_CLASSES - 1).astype(np.int64)
