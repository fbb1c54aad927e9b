"""Objects that a user selected, as masks; boxes of masks and masks of boxes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from grex_mllm.errors import fault


def mask_boxes(masks: Tensor) -> Tensor:
    """Return int64 [N, 4] xyxy (right and bottom exclusive) around bool masks [N, H, W]; zeros for an empty mask."""
    columns, rows = masks.any(1), masks.any(2)
    found = rows.any(1)
    left, top = columns.int().argmax(1), rows.int().argmax(1)
    right = columns.shape[1] - columns.flip(1).int().argmax(1)
    bottom = rows.shape[1] - rows.flip(1).int().argmax(1)
    return torch.stack([left, top, right, bottom], 1) * found[:, None]


def boxes_to_masks(boxes_xyxy: Tensor, height: int, width: int) -> Tensor:
    """Return bool [n, H, W]: the pixels that xyxy boxes touch, at least one each."""
    boxes = boxes_xyxy.double()
    x, y = torch.arange(width, device=boxes.device), torch.arange(height, device=boxes.device)
    left, top = boxes[:, 0].floor().clamp(0, width - 1), boxes[:, 1].floor().clamp(0, height - 1)
    right, bottom = torch.maximum(boxes[:, 2].ceil(), left + 1), torch.maximum(boxes[:, 3].ceil(), top + 1)
    columns = (x >= left[:, None]) & (x < right[:, None])
    rows = (y >= top[:, None]) & (y < bottom[:, None])
    return rows[:, :, None] & columns[:, None, :]


def selection_masks(
    height: int, width: int, masks: Sequence[np.ndarray | Tensor] | None = None, boxes_xyxy: Sequence[Sequence[float]] | None = None
) -> Tensor:
    """Check one object set that a user selected and return it as bool [n, H, W] at the image's size. Give masks or boxes, not both.

    Raises:
        GrexError: nothing selected, both kinds given, a mask of another size or without a pixel, a box outside the image or without area.
    """
    if (masks is None) == (boxes_xyxy is None):
        raise fault(
            "masks and boxes both given" if masks is not None else "neither masks nor boxes", "one of them", "select objects one way"
        )
    chosen = masks if masks is not None else boxes_xyxy
    assert chosen is not None
    if len(chosen) == 0:
        raise fault("an empty object set", "at least one object", "select one or more objects")
    if boxes_xyxy is not None:
        for i, box in enumerate(boxes_xyxy):
            _check_box(i, [float(v) for v in box], height, width)
        return boxes_to_masks(torch.tensor([[float(v) for v in box] for box in boxes_xyxy], dtype=torch.float64), height, width)
    out = []
    for i, given in enumerate([] if masks is None else masks):
        mask = torch.as_tensor(given)
        if tuple(mask.shape) != (height, width):
            size = "x".join(str(n) for n in mask.shape)
            raise fault(f"mask {i} is {size}", f"{height}x{width} (height x width of the image)", "pass masks at the image's own size")
        if not bool(mask.bool().any()):
            raise fault(f"mask {i} has no pixel set", "at least one pixel", "leave the empty mask out")
        out.append(mask.bool())
    return torch.stack(out)


def _check_box(index: int, box: list[float], height: int, width: int) -> None:
    if len(box) != 4 or not all(math.isfinite(v) for v in box):
        raise fault(f"box {index} is {box}", "four finite numbers x1, y1, x2, y2 in pixels", "fix the box")
    x1, y1, x2, y2 = box
    if x2 <= x1 or y2 <= y1:
        raise fault(f"box {index} {box} has no area", "x1 < x2 and y1 < y2", "give the corners left, top, right, bottom")
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        raise fault(
            f"box {index} {box} reaches outside the image", f"0 <= x <= {width} and 0 <= y <= {height}", "clip the box to the image"
        )
