"""Entry "rec" of METRICS: classic referring comprehension, the best-scored box over expressions with one target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from grex_mllm.metrics.columns import Column, mean_of
from grex_mllm.metrics.detection import check_scores, checked, pair_iou, plain, prediction_boxes
from grex_mllm.metrics.sums import IntegerSums, ratio
from grex_mllm.metrics.truth import Truth

TITLE = "Boxes (REC)"
NEEDS = {"strict": ("boxes_xyxy",)}
LEFT_OUT = "have no or several targets"
COLUMNS = (Column("Pr@0.5", "REC Pr@0.5", mean_of("rec_correct")),)


@dataclass(frozen=True)
class Rules:
    """iou_threshold: of the best-scored box with the one target; expressions with no or several targets are left out."""

    iou_threshold: float = 0.5


def row(prediction: dict[str, Any] | None, truth: Truth, rules: Rules, protocol: str) -> dict[str, Any] | None:
    """Return rec_correct; None unless there is one target."""
    if truth.num_targets != 1:
        return None
    return {"rec_correct": prediction is not None and sums(rules, protocol).right(*prediction_boxes(prediction), truth.boxes[0])}


def sums(rules: Rules, protocol: str) -> REC:
    """Return empty sums."""
    return REC(rules.iou_threshold)


def baselines(columns: dict[str, np.ndarray], rules: Rules) -> dict[str, dict[str, np.ndarray]]:
    """Return the columns of an answer without boxes, and of the right one."""
    num = columns["num_targets"]
    return {"always_empty": {"rec_correct": num != 1}, "oracle": {"rec_correct": num == 1}}


class REC(IntegerSums):
    """Accumulate classic REC: share of expressions whose best-scored box overlaps the one target by IoU >= 0.5."""

    def __init__(self, iou_threshold: float = 0.5) -> None:
        super().__init__(2, (iou_threshold,))
        self.iou_threshold = iou_threshold

    def update(self, pred_boxes_xyxy: Any, pred_scores: Any, gt_box_xyxy: Any) -> bool:
        """Add one expression: boxes [n, 4], scores [n], the ground-truth box [4]; return whether it is right."""
        right = self.right(pred_boxes_xyxy, pred_scores, gt_box_xyxy)
        self.update_rows({"rec_correct": np.array([right])})
        return right

    def right(self, pred_boxes_xyxy: Any, pred_scores: Any, gt_box_xyxy: Any) -> bool:
        """Tell whether an expression is answered right, without adding it; among equal scores the box that sorts last is the answer.

        Raises:
            GrexError: NaN in scores or boxes, inverted boxes, or unequal numbers of boxes and scores.
        """
        boxes, scores = plain(pred_boxes_xyxy), plain(pred_scores)
        check_scores(boxes, scores)
        if not boxes:
            return False
        best = checked(np.array([max(zip(scores, boxes, strict=True))[1]], np.float64))
        return bool(pair_iou(best, checked(np.array([plain(gt_box_xyxy)], np.float64)))[0] >= self.iou_threshold)

    def update_rows(self, columns: dict[str, np.ndarray]) -> None:
        """Add rows of the scorer."""
        self._sums = self._sums + np.array([columns["rec_correct"].size, columns["rec_correct"].sum()], np.int64)

    def compute(self) -> dict[str, Any]:
        """Return num_samples and Pr@<threshold>."""
        return {"num_samples": int(self._sums[0]), f"Pr@{self.iou_threshold:g}": ratio(self._sums[1], self._sums[0])}
