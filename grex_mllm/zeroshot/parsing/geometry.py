"""From numbers of a frame to boxes, points and polygons inside the picture (rules H to L)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from grex_mllm.ops.frames import boxes_to_pixels, points_to_pixels
from grex_mllm.zeroshot.base import View
from grex_mllm.zeroshot.parsing.items import Found, Item

MAX_OBJECTS = 100
SAME = 1.0  # pixels: corners that near are of the same object
GREATEST = 1e7  # a number beyond is no coordinate
_FRACTIONS = ("unit", "unit_pad")


def frame_of(found: Found, frame: str) -> tuple[str, tuple[str, ...]]:
    """Return the frame of the answer's numbers and flags: as declared, but for per cent signs and for numbers within 0 and 1 alone.

    Numbers are within 0 and 1 where a fraction is among them; nothing else about their size decides (rule H).
    """
    numbers = [n for item in (*found.boxes, *found.points, *found.polygons) if not item.frame for n in item.numbers]
    if any(n.percent for n in numbers):
        return "pct", () if frame == "pct" else ("percent",)
    if frame not in _FRACTIONS and numbers and all(0 <= n.value <= 1 for n in numbers) and any(n.fraction for n in numbers):
        return "unit", ("unit",)
    return frame, ()


Whole = tuple[Item, np.ndarray]  # an item, and its upright box, maybe over the edge


def boxes_in(items: Iterable[Item], frame: str, order: str, view: View) -> tuple[np.ndarray, int, tuple[str, ...], list[Whole]]:
    """Return boxes [N, 4] inside the picture, how many items were faulty, flags, and what each box comes from."""
    kept: list[np.ndarray] = []
    whole: list[Whole] = []
    kept_array = np.zeros((0, 4))
    faulty, flags = 0, set()
    for item in items:
        values = np.array([n.value for n in item.numbers])
        if len(values) != 4 or not np.isfinite(values).all() or np.abs(values).max() > GREATEST:
            faulty += 1
            continue
        box = _pixels(values, item.frame or frame, item.order or order, view)
        upright = np.array([*np.minimum(box[:2], box[2:]), *np.maximum(box[:2], box[2:])])
        inside = upright.clip(0, (view.width, view.height) * 2)
        if (inside[2:] <= inside[:2]).any():
            faulty += 1
            continue
        flags |= {name for name, differs in (("swapped", upright != box), ("clipped", inside != upright)) if differs.any()}
        if len(kept) and (np.abs(kept_array - inside).max(axis=1) <= SAME).any():
            flags.add("duplicates")
            continue
        if len(kept) == MAX_OBJECTS:
            flags.add("many")
            break
        kept.append(inside)
        whole.append((item, upright))
        kept_array = np.stack(kept)
    return kept_array, faulty, tuple(sorted(flags)), whole


def points_in(items: Iterable[Item], frame: str, order: str, view: View) -> tuple[np.ndarray, int, tuple[str, ...]]:
    """Return points [N, 2] inside the picture, how many items were faulty, and flags."""
    kept: list[np.ndarray] = []
    faulty, flags = 0, set()
    for item in items:
        point = _polygon(item, frame, order, view)
        if point is None or len(point) != 1 or (point < 0).any() or (point > (view.width, view.height)).any():
            faulty += 1
            continue
        if any(np.abs(point[0] - other).max() <= SAME for other in kept):
            flags.add("duplicates")
            continue
        if len(kept) == MAX_OBJECTS:
            flags.add("many")
            break
        kept.append(point[0])
    return np.stack(kept) if kept else np.zeros((0, 2)), faulty, tuple(sorted(flags))


def polygons_in(items: Iterable[Item], frame: str, order: str, view: View) -> tuple[list[np.ndarray], int, tuple[str, ...]]:
    """Return polygons [P, 2] inside the picture, how many items were faulty, and flags."""
    kept: list[np.ndarray] = []
    faulty, flags = 0, set()
    for item in items:
        points = _polygon(item, frame, order, view)
        if points is None or len(points) < 3:
            faulty += 1
            continue
        inside = points.clip(0, (view.width, view.height))
        if (inside.max(axis=0) <= inside.min(axis=0)).any():
            faulty += 1
            continue
        flags |= {"clipped"} if (inside != points).any() else set()
        if any(len(inside) == len(other) and np.abs(inside - other).max() <= SAME for other in kept):
            flags.add("duplicates")
            continue
        if len(kept) == MAX_OBJECTS:
            flags.add("many")
            break
        kept.append(inside)
    return kept, faulty, tuple(sorted(flags))


def bounds(polygons: list[np.ndarray]) -> np.ndarray:
    """Return the boxes [N, 4] around polygons."""
    return np.array([[*p.min(axis=0), *p.max(axis=0)] for p in polygons]).reshape(-1, 4)


def all_zero(items: list[Item]) -> bool:
    """Whether there are boxes and all of them are exactly 0, 0, 0, 0 (rule N)."""
    return bool(items) and all(all(n.value == 0 for n in item.numbers) for item in items)


def _pixels(values: np.ndarray, frame: str, order: str, view: View) -> np.ndarray:
    if order == "xywh":
        values = np.array([*values[:2], *(values[:2] + values[2:])])
    elif order == "cxcywh":
        values = np.array([*(values[:2] - values[2:] / 2), *(values[:2] + values[2:] / 2)])
    elif order == "yxyx":
        values = values[[1, 0, 3, 2]]
    if frame == "patch32":  # cells are read by their upright order
        values = np.array([*np.minimum(values[:2], values[2:]), *np.maximum(values[:2], values[2:])])
    return boxes_to_pixels(values[None], frame, view)[0]


def _polygon(item: Item, frame: str, order: str, view: View) -> np.ndarray | None:
    """Return the points [P, 2] of an item in pixels; None where a number is none."""
    values = np.array([n.value for n in item.numbers])
    if len(values) % 2 or not len(values) or not np.isfinite(values).all() or np.abs(values).max() > GREATEST:
        return None
    points = values.reshape(-1, 2)
    points = points[:, ::-1] if (item.order or order) == "yxyx" else points
    return points_to_pixels(points, item.frame or frame, view)
