"""Entry "rvos" of METRICS: region similarity J, contour accuracy F, their mean J&F (Perazzi et al., CVPR 2016, sections 3.1 and 3.2).

Averaged over the frames of an expression first, then over expressions. Frames where neither side has a pixel count as right (J = F = 1).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from grex_mllm.errors import fault
from grex_mllm.metrics.columns import Column
from grex_mllm.metrics.segmentation import checked_mask
from grex_mllm.metrics.sums import NUM_LIMBS, half, limb_sums, mean
from grex_mllm.metrics.truth import Truth

TOLERANCE = 0.008  # of the image diagonal: how far a contour may lie off (the benchmark's own value)
TITLE = "Video (RVOS)"
NEEDS = {"strict": ("mask_rle", "gt_mask")}
COLUMNS = (Column("J&F", "J&F"), Column("J", "J"), Column("F", "F"))


@dataclass(frozen=True)
class Rules:
    """tolerance: of the contours, as a share of the image diagonal."""

    tolerance: float = TOLERANCE


def row(prediction: dict[str, Any] | None, truth: Truth, rules: Rules, protocol: str) -> dict[str, Any] | None:
    """Return J and F of one frame, and its expression over the video; None in box-only data."""
    from grex_mllm.ops.masks import decode_rle

    gt = truth.mask()
    if gt is None or prediction is None:
        return None if gt is None else {"video": truth.ref_id, "J": 0.0, "F": 0.0}
    pixels = decode_rle(checked_mask(prediction, truth)), decode_rle(gt)
    return {"video": truth.ref_id, "J": region(*pixels), "F": contour(*pixels, rules.tolerance)}


def sums(rules: Rules, protocol: str) -> RVOS:
    """Return empty sums."""
    return RVOS(rules.tolerance)


class RVOS:
    """Accumulate J and F by expression. tolerance: share of the image diagonal within which contours match."""

    def __init__(self, tolerance: float = TOLERANCE) -> None:
        self.tolerance = tolerance
        self._sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(1 + 2 * NUM_LIMBS, np.int64))  # frames, limbs of J, limbs of F

    def update(self, pred_masks: Any, gt_masks: Any, expression_id: str) -> None:
        """Add frames of one expression over one video: bool [T, H, W] (or one frame [H, W]), NumPy or tensors.

        Raises:
            GrexError: shapes differ.
        """
        pred, gt = _frames(pred_masks), _frames(gt_masks)
        if pred.shape != gt.shape:
            raise fault(f"predicted masks {pred.shape}", f"the shape of the ground truth, {gt.shape}", "resize the prediction")
        frames = zip(pred, gt, strict=True)
        self.update_frames(
            [expression_id] * len(pred), *zip(*((region(p, g), contour(p, g, self.tolerance)) for p, g in frames), strict=True)
        )

    def update_rows(self, columns: dict[str, np.ndarray]) -> None:
        """Add rows of the scorer."""
        self.update_frames(columns["video"].tolist(), columns["J"].tolist(), columns["F"].tolist())

    def update_frames(self, expression_ids: Sequence[str], j: Sequence[float], f: Sequence[float]) -> None:
        """Add frames by their J and F in [0, 1]."""
        for key, one_j, one_f in zip(expression_ids, j, f, strict=True):
            self._sums[key] += np.array([1, *limb_sums(np.array([one_j])), *limb_sums(np.array([one_f]))])

    def merge(self, other: RVOS) -> Self:
        """Add the sums of another object; an expression's frames may lie in both."""
        for key, parts in other._sums.items():
            self._sums[key] += parts
        return self

    def state(self) -> dict[str, list[int]]:
        """Return the sums as plain integers."""
        return {key: parts.tolist() for key, parts in self._sums.items()}

    def load_state(self, state: dict[str, list[int]]) -> Self:
        """Replace the sums by those of `state()`."""
        self._sums.clear()
        self._sums.update({key: np.array(parts, np.int64) for key, parts in state.items()})
        return self

    def compute(self) -> dict[str, Any]:
        """Return num_expressions, num_frames, J, F and J&F."""
        rows = [self._sums[key].tolist() for key in sorted(self._sums)]
        j = [mean(row[1 : 1 + NUM_LIMBS], row[0]) or 0.0 for row in rows]
        f = [mean(row[1 + NUM_LIMBS :], row[0]) or 0.0 for row in rows]
        mean_j = math.fsum(j) / len(j) if j else None
        mean_f = math.fsum(f) / len(f) if f else None
        return {
            "num_expressions": len(rows),
            "num_frames": sum(row[0] for row in rows),
            "J": mean_j,
            "F": mean_f,
            "J&F": half(mean_j, mean_f),
        }


def region(pred: np.ndarray, gt: np.ndarray) -> float:
    """Return J of one frame: IoU of bool masks [H, W], 1 where both are empty."""
    union = int(np.count_nonzero(pred | gt))
    return int(np.count_nonzero(pred & gt)) / union if union else 1.0


def contour(pred: np.ndarray, gt: np.ndarray, tolerance: float = TOLERANCE) -> float:
    """Return F of one frame: harmonic mean of the shares of contour pixels that lie within the tolerance of the other contour."""
    from scipy.ndimage import distance_transform_edt

    radius = math.ceil(tolerance * math.hypot(*pred.shape))
    edge_p, edge_g = boundary(pred), boundary(gt)
    num_p, num_g = int(edge_p.sum()), int(edge_g.sum())
    if num_p == 0 or num_g == 0:
        return 1.0 if num_p == num_g else 0.0
    precision = int((edge_p & (distance_transform_edt(~edge_g) <= radius)).sum()) / num_p
    recall = int((edge_g & (distance_transform_edt(~edge_p) <= radius)).sum()) / num_g
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """Return the contour pixels, bool [H, W]: those that differ from the pixel to the right, below, or right below."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    edge: np.ndarray = (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])
    return edge


def _frames(masks: Any) -> np.ndarray:
    array = np.asarray(masks.cpu() if hasattr(masks, "cpu") else masks).astype(bool)
    return array[None] if array.ndim == 2 else array
