"""Image records under a flip and under a cut: polygons stay polygons, whatever happens to the picture.

pycocotools rasterises a polygon that is shifted by whole pixels to the same shifted pixels, so nothing is lost by moving coordinates.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from grex_mllm.ops.masks import decode_rle, encode_rle, mask_to_box_xyxy, segmentation_to_mask, usable_polygons
from grex_mllm.types import ImageRecord, Instance

LEAST_AREA = 0.25  # square pixels of a polygon's remainder that is kept


class Window(NamedTuple):
    """A part of an image in whole pixels: columns left .. right - 1, rows top .. bottom - 1."""

    left: int
    top: int
    right: int
    bottom: int


def mirror_record(record: ImageRecord) -> ImageRecord:
    """Return the record of the image flipped from left to right."""
    return replace(record, instances=[_mirrored(instance, record.width) for instance in record.instances])


def crop_record(record: ImageRecord, window: Window) -> ImageRecord:
    """Return the record of a window of the image. What the window cuts is clipped; what has no pixel in it is left out."""
    cut = (_cut(instance, record, window) for instance in record.instances)
    kept = [instance for instance in cut if instance is not None]
    return replace(record, height=window.bottom - window.top, width=window.right - window.left, instances=kept)


def clip_polygon(points: np.ndarray, width: float, height: float) -> np.ndarray:
    """Return the part of a polygon float [K, 2] within [0, width] x [0, height], float [M, 2] with M = 0 where nothing is left.

    Sutherland and Hodgman 1974. A concave polygon that falls apart keeps bridges along the border, which hold no area.
    """
    for axis, limit, sign in ((0, 0.0, 1), (0, width, -1), (1, 0.0, 1), (1, height, -1)):
        inside = sign * (points[:, axis] - limit)  # >= 0 where kept
        if len(points) == 0 or (inside >= 0).all():
            continue
        following, beyond = np.roll(points, -1, axis=0), np.roll(inside, -1)
        crosses = (inside >= 0) != (beyond >= 0)
        span = np.where(crosses, inside - beyond, 1.0)
        crossing = points + (inside / span)[:, None] * (following - points)
        crossing[:, axis] = limit
        # each point that is inside, then the crossing on the way to the next
        both = np.stack([points, crossing], axis=1).reshape(-1, 2)
        points = both[np.stack([inside >= 0, crosses], axis=1).reshape(-1)]
    return points


def polygon_area(points: np.ndarray) -> float:
    """Return the area of a polygon float [K, 2]."""
    x, y = points[:, 0], points[:, 1]
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def instance_area(instance: Instance) -> float:
    """Return the area of an instance in square pixels: of its polygons (overlaps count twice), its mask, or its box."""
    segmentation = instance.segmentation
    if instance.mask is not None:
        return float(np.count_nonzero(instance.mask))
    if isinstance(segmentation, list):
        return sum(polygon_area(_points(polygon)) for polygon in usable_polygons(segmentation))
    if segmentation is not None:
        return float(np.count_nonzero(decode_rle(segmentation)))
    x1, y1, x2, y2 = instance.box_xyxy
    return max(x2 - x1, 0.0) * max(y2 - y1, 0.0)


def _points(polygon: Any) -> np.ndarray:
    return np.asarray(polygon, np.float64).reshape(-1, 2)


def _mirrored(instance: Instance, width: int) -> Instance:
    x1, y1, x2, y2 = instance.box_xyxy
    segmentation, mask = instance.segmentation, instance.mask
    if mask is not None:
        mask = mask[:, ::-1]
    if isinstance(segmentation, list):
        segmentation = [(_points(polygon) * [-1, 1] + [width, 0]).reshape(-1).tolist() for polygon in usable_polygons(segmentation)]
    elif segmentation is not None:
        segmentation = encode_rle(decode_rle(segmentation)[:, ::-1])
    return replace(instance, box_xyxy=[width - x2, y1, width - x1, y2], segmentation=segmentation, mask=mask)


def _cut(instance: Instance, record: ImageRecord, window: Window) -> Instance | None:
    """Return the instance in the window's coordinates; None where nothing of it is left."""
    left, top, right, bottom = window
    x1, y1, x2, y2 = instance.box_xyxy
    box = [max(x1 - left, 0.0), max(y1 - top, 0.0), min(x2, right) - left, min(y2, bottom) - top]
    if instance.mask is not None or isinstance(instance.segmentation, dict):
        mask = instance.mask if instance.mask is not None else decode_rle(instance.segmentation, record.height, record.width)
        mask = mask[top:bottom, left:right]
        if not mask.any():
            return None
        box = box if _within(instance, window) else mask_to_box_xyxy(mask)
        if instance.mask is not None:
            return replace(instance, box_xyxy=box, mask=mask)
        return replace(instance, box_xyxy=box, segmentation=encode_rle(mask))
    if instance.segmentation is None:
        return replace(instance, box_xyxy=box) if box[0] < box[2] and box[1] < box[3] else None
    return _cut_polygons(instance, window, box)


def _cut_polygons(instance: Instance, window: Window, box: list[float]) -> Instance | None:
    width, height = window.right - window.left, window.bottom - window.top
    shifted = [_points(polygon) - [window.left, window.top] for polygon in usable_polygons(instance.segmentation)]
    everything = np.concatenate(shifted) if shifted else np.zeros((0, 2))
    whole = bool((everything >= 0).all() and (everything <= [width, height]).all())
    if not whole:
        clipped = [clip_polygon(points, width, height) for points in shifted]
        shifted = [points for points in clipped if len(points) > 2 and polygon_area(points) >= LEAST_AREA]
    if not shifted:
        return None
    polygons = [points.reshape(-1).tolist() for points in shifted]
    if whole and _within(instance, window):
        return replace(instance, box_xyxy=box, segmentation=polygons)
    mask = segmentation_to_mask(polygons, height, width)  # the corners would not do: bridges reach beyond the parts
    return replace(instance, box_xyxy=mask_to_box_xyxy(mask), segmentation=polygons) if mask.any() else None


def _within(instance: Instance, window: Window) -> bool:
    x1, y1, x2, y2 = instance.box_xyxy
    return x1 >= window.left and y1 >= window.top and x2 <= window.right and y2 <= window.bottom
