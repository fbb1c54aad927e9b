"""Boxes: conversions, areas and overlaps, for numpy arrays and torch tensors alike (the result is of the kind that was given).

`xyxy` is (left, top, right, bottom), `cxcywh` centre and size, `xywh` left, top and size (as COCO publishes). The unit is the caller's:
absolute pixels, or [0, 1] for names that end in `_norm`. Overlap functions take integers too and answer in floating point.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

Array = TypeVar("Array", bound=Any)  # np.ndarray or torch.Tensor
SMALLEST_AREA = 1e-9  # keeps 0 / 0 of degenerate boxes, and its gradient, finite; far below any real box, also in [0, 1]


def xyxy_to_cxcywh(boxes: Array) -> Array:
    """Convert [..., 4] xyxy to cxcywh in the same unit."""
    x1, y1, x2, y2 = (boxes[..., i] for i in range(4))
    return _stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])


def cxcywh_to_xyxy(boxes: Array) -> Array:
    """Convert [..., 4] cxcywh to xyxy in the same unit."""
    cx, cy, w, h = (boxes[..., i] for i in range(4))
    return _stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])


def xywh_to_xyxy(boxes: Array) -> Array:
    """Convert [..., 4] COCO boxes (left, top, width, height) to xyxy."""
    x, y, w, h = (boxes[..., i] for i in range(4))
    return _stack([x, y, x + w, y + h])


def box_area(boxes_xyxy: Array) -> Array:
    """Return areas [...] of xyxy boxes [..., 4]; an inverted box has area 0."""
    return _at_least(boxes_xyxy[..., 2] - boxes_xyxy[..., 0], 0) * _at_least(boxes_xyxy[..., 3] - boxes_xyxy[..., 1], 0)


def clip_boxes(boxes_xyxy: Array, height: float, width: float) -> Array:
    """Move the corners of xyxy boxes [..., 4] into [0, width] x [0, height]."""
    limits = (width, height, width, height)
    return _stack([boxes_xyxy[..., i].clip(0, limits[i]) for i in range(4)])


def box_iou(first_xyxy: Array, second_xyxy: Array) -> Array:
    """Return the intersection over union [N, M] of every pair of xyxy boxes [N, 4], [M, 4]; 0 where the union is empty."""
    intersection, union = _intersection_and_union(first_xyxy[:, None], second_xyxy[None])
    return intersection / _at_least(union, SMALLEST_AREA)


def generalized_iou(first_xyxy: Array, second_xyxy: Array) -> Array:
    """Return the generalized IoU [...] in [-1, 1] of xyxy boxes [..., 4] that are broadcast against each other.

    Rezatofighi et al. 2019, equation 3: IoU - (|C| - |union|) / |C| with C the smallest enclosing box. Differentiable; degenerate boxes
    give finite values.
    """
    intersection, union = _intersection_and_union(first_xyxy, second_xyxy)
    corner_low = _minimum(first_xyxy[..., :2], second_xyxy[..., :2])
    corner_high = _maximum(first_xyxy[..., 2:], second_xyxy[..., 2:])
    size = _at_least(corner_high - corner_low, 0)
    enclosing = size[..., 0] * size[..., 1]
    return intersection / _at_least(union, SMALLEST_AREA) - (enclosing - union) / _at_least(enclosing, SMALLEST_AREA)


def _intersection_and_union(first: Array, second: Array) -> tuple[Array, Array]:
    size = _at_least(_minimum(first[..., 2:], second[..., 2:]) - _maximum(first[..., :2], second[..., :2]), 0)
    intersection = size[..., 0] * size[..., 1]
    return intersection, box_area(first) + box_area(second) - intersection


def _at_least(values: Any, low: float) -> Any:
    return np.maximum(values, low) if isinstance(values, np.ndarray | np.generic) else values.clamp(min=low)


def _minimum(a: Any, b: Any) -> Any:
    return np.minimum(a, b) if isinstance(a, np.ndarray) else a.minimum(b)


def _maximum(a: Any, b: Any) -> Any:
    return np.maximum(a, b) if isinstance(a, np.ndarray) else a.maximum(b)


def _stack(columns: list[Any]) -> Any:
    if isinstance(columns[0], np.ndarray | np.generic):
        return np.stack(columns, axis=-1)
    import torch

    return torch.stack(columns, dim=-1)
