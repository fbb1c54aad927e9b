"""Coordinate frames of multimodal language models; see `grex_mllm.ops.frames`."""

from __future__ import annotations

from grex_mllm.ops.frames import (
    CELLS,
    DECIMALS,
    FRAMES,
    ORDERS,
    boxes_from_pixels,
    boxes_to_pixels,
    points_from_pixels,
    points_to_pixels,
    step,
)

__all__ = [
    "CELLS",
    "DECIMALS",
    "FRAMES",
    "ORDERS",
    "boxes_from_pixels",
    "boxes_to_pixels",
    "points_from_pixels",
    "points_to_pixels",
    "step",
]
