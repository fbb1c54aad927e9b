"""Which objects are next to which, and on which side, by their boxes. Needs no torch, so that data can compute the truth of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeAlias

import numpy as np

Boxes: TypeAlias = Sequence[Sequence[float]] | np.ndarray
SIDES = ("left", "right", "top", "bottom")
NEAR = 0.12  # of the image's longer side: the widest gap between neighbours, where several are asked for


def gaps(boxes_xyxy: Boxes, selected: Collection[int]) -> np.ndarray:
    """Return float [N]: the shortest distance in pixels from each box to a selected one, 0 where they touch, infinite for the selected."""
    boxes = np.asarray(boxes_xyxy, float).reshape(-1, 4)
    found = np.full(len(boxes), np.inf)
    for n in selected:
        apart = np.maximum(0, np.maximum(boxes[n, :2] - boxes[:, 2:], boxes[:, :2] - boxes[n, 2:]))
        found = np.minimum(found, np.hypot(*apart.T))
    found[list(selected)] = np.inf
    return found


def centre_distances(boxes_xyxy: Boxes, selected: Collection[int]) -> np.ndarray:
    """Return float [N]: the shortest distance in pixels from the centre of each box to that of a selected one."""
    boxes = np.asarray(boxes_xyxy, float).reshape(-1, 4)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    found = np.full(len(boxes), np.inf)
    for n in selected:
        found = np.minimum(found, np.hypot(*(centres - centres[n]).T))
    return found


def leads(boxes_xyxy: Boxes, selected: Collection[int], side: str) -> np.ndarray:
    """Return float [N]: how many pixels the centre of each box lies beyond those of all selected ones on a side (left, right, top, bottom).

    Negative where it does not.
    """
    boxes = np.asarray(boxes_xyxy, float).reshape(-1, 4)
    axis = 0 if side in ("left", "right") else 1
    centres = (boxes[:, axis] + boxes[:, axis + 2]) / 2
    chosen = centres[list(selected)]
    return chosen.min() - centres if side in ("left", "top") else centres - chosen.max()


def by_nearness(boxes_xyxy: Boxes, selected: Collection[int], candidates: Sequence[int]) -> list[int]:
    """Return the candidates, the nearest to the selected ones first: by the gap between boxes, then by that of their centres."""
    gap, distance = gaps(boxes_xyxy, selected), centre_distances(boxes_xyxy, selected)
    return sorted(candidates, key=lambda n: (gap[n], distance[n]))
