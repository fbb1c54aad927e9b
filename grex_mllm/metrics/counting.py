"""Entry "count" of METRICS: N_O over {0, 1, 2, 3, 4, 5, >5} (GREx article): accuracy, mean absolute error, confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from grex_mllm.errors import fault
from grex_mllm.metrics.columns import Column
from grex_mllm.metrics.sums import IntegerSums, ratio
from grex_mllm.metrics.truth import Truth
from grex_mllm.types import MORE_THAN_FIVE

NUM_CLASSES = MORE_THAN_FIVE + 1
LABELS = ("0", "1", "2", "3", "4", "5", ">5")
TITLE = "Counts"
NEEDS = {"strict": ("count",)}
COLUMNS = (
    Column("accuracy", "count acc", lambda row, num_targets: (row["count_class"] == min(num_targets, MORE_THAN_FIVE), 1.0)),
    Column("mae", "count MAE", format="number", higher_is_better=False, shown=("table", "compare")),
)


@dataclass(frozen=True)
class Rules:
    """Accuracy over {0..5, >5}: nothing to choose."""


def row(prediction: dict[str, Any] | None, truth: Truth, rules: Rules, protocol: str) -> dict[str, Any]:
    """Return count_class: 0..6, where 6 is ">5", and 7 is no answer."""
    value = None if prediction is None else prediction.get("count")
    if prediction is not None and (type(value) is not int or value < 0):
        raise fault(f"{truth.name}: count {value!r}", "a whole number >= 0", "fix the line")
    return {"count_class": NUM_CLASSES if value is None else min(value, MORE_THAN_FIVE)}


def sums(rules: Rules, protocol: str) -> Count:
    """Return empty sums."""
    return Count()


def baselines(columns: dict[str, np.ndarray], rules: Rules) -> dict[str, dict[str, np.ndarray]]:
    """Return the columns of counting nothing, and of counting right."""
    num = columns["num_targets"]
    return {
        name: columns | {"count_class": np.minimum(pred, MORE_THAN_FIVE)} for name, pred in (("always_empty", num * 0), ("oracle", num))
    }


class Count(IntegerSums):
    """Accumulate the confusion matrix [wanted, predicted]; a last column holds answers that are missing or unreadable.

    Numbers above five are one class: they count as 6 for the error too. A missing answer is counted as wrong by the largest error possible.
    """

    def __init__(self) -> None:
        super().__init__((NUM_CLASSES, NUM_CLASSES + 1))

    def update(self, pred_count: Any, gt_count: Any, wrong: Any = None) -> None:
        """Add counts, integers [E] or one each (NumPy, tensor or plain). wrong: bool [E].

        Raises:
            GrexError: a negative or fractional count.
        """
        pred, gt = _whole(pred_count), _whole(gt_count)
        if wrong is not None:
            pred = np.where(np.atleast_1d(np.asarray(wrong, bool)), NUM_CLASSES, pred)
        self.update_rows({"num_targets": gt, "count_class": pred})

    def update_rows(self, columns: dict[str, np.ndarray]) -> None:
        """Add rows of the scorer."""
        np.add.at(self._sums, (np.minimum(columns["num_targets"], MORE_THAN_FIVE), columns["count_class"]), 1)

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
