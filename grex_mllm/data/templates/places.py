"""Where a thing is: places in the picture and beside other things, each True, False or None where a person would hesitate."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from grex_mllm.data.templates.meaning import Where
from grex_mllm.data.templates.scene import Thing

INSIDE = 0.42  # centre and centroid of what is on the left lie left of this, in shares of the width
EDGE = 0.58  # and all of it left of this
OUTSIDE = 0.5  # what is not on the left has centre and centroid right of this
MIDDLE = (0.42, 0.58)  # of what is in the middle
FAR_FROM_MIDDLE = 0.72
NOT_MIDDLE = (0.33, 0.67)  # of what is not
ELSEWHERE = 0.04  # of the image's side, between the centres of what is certainly not beside each other on that side
TOUCH = 0.01  # of the image's side: by so much may boxes overlap that lie beside each other
SHARED = 0.3  # share of the lower height that two things have in common that lie beside each other
BEFORE = 0.6  # share of the width that a thing has in common with what it stands before
ASIDE = 0.15  # of the width, between boxes of things of which none is before the other
DEPTH = 0.04  # of the image's height, between lower edges
FURTHER_AWAY = 1.4  # ratio of areas of two things of a category, of which one is behind the other
GROUND = frozenset({"person", "bicycle", "car", "motorcycle", "bus", "train", "truck"})  # what stands before each other on one ground


def decide_where(thing: Thing, place: Where) -> bool | None:
    """Tell whether a thing is at a place of the picture."""
    said = [_decide_side(thing, word) for word in place.side.split()]
    found = False if False in said else None if None in said else True
    return found if found is None else found != place.negated


def is_far(thing: Thing, place: Where) -> bool:
    """Tell whether nobody would look for a thing at a place: it lies clearly elsewhere."""
    if place.negated:
        return decide_where(thing, place) is False
    for word in place.side.split():
        axis = 0 if word in ("left", "right", "middle") else 1
        values = (thing.centre(axis), thing.centroid[axis])
        if word == "middle" and (max(values) < 1 - FAR_FROM_MIDDLE or min(values) > FAR_FROM_MIDDLE):
            return True
        if (word in ("left", "top") and min(values) >= 1 - INSIDE) or (word in ("right", "bottom") and max(values) <= INSIDE):
            return True
    return False


def _decide_side(thing: Thing, side: str) -> bool | None:
    if side == "middle":
        values = (thing.centre(0), thing.centroid[0])
        if all(MIDDLE[0] <= value <= MIDDLE[1] for value in values):
            return True
        return False if max(values) < NOT_MIDDLE[0] or min(values) > NOT_MIDDLE[1] else None
    axis = 0 if side in ("left", "right") else 1
    values = (thing.centre(axis), thing.centroid[axis])
    edge = thing.high[axis]
    if side in ("right", "bottom"):  # the same, mirrored
        values, edge = (1 - values[0], 1 - values[1]), 1 - thing.low[axis]
    if max(values) <= INSIDE and edge <= EDGE:
        return True
    return False if min(values) >= OUTSIDE else None


def ranked_apart(things: Sequence[Thing], by: str, margin: float) -> list[Thing] | None:
    """Return things in an order (left, right, top, bottom) where each is clearly after the one before, None otherwise."""
    axis, sign = (0 if by in ("left", "right") else 1), (1 if by in ("left", "top") else -1)
    ranked = sorted(things, key=lambda thing: sign * thing.centre(axis))
    for one, other in pairwise(ranked):
        steps = (other.centre(axis) - one.centre(axis), other.centroid[axis] - one.centroid[axis])
        if min(sign * step for step in steps) < margin:
            return None
        if (other.low[axis] - one.low[axis]) * sign < 0 or (other.high[axis] - one.high[axis]) * sign < 0:
            return None
    return ranked


def decide_relation(thing: Thing, kind: str, anchor: Thing, aspect: float) -> bool | None:
    """Tell whether a thing stands in a relation (`meaning.RELATIONS`) to another. aspect: width / height of the image."""
    if kind in ("left of", "right of", "above", "below"):
        axis = 0 if kind in ("left of", "right of") else 1
        return _beside(thing, anchor, axis) if kind in ("left of", "above") else _beside(anchor, thing, axis)
    if kind == "in front of":
        return _before(thing, anchor)
    return _before(anchor, thing) if thing.category == anchor.category else None


def _beside(one: Thing, other: Thing, axis: int) -> bool | None:
    """Tell whether one lies left of (axis 0) or above (axis 1) the other, at a comparable height or place."""
    if min(one.centre(axis) - other.centre(axis), one.centroid[axis] - other.centroid[axis]) >= ELSEWHERE:
        return False
    across = 1 - axis
    if one.high[axis] > other.low[axis] + TOUCH:
        return None
    return True if _common(one, other, across) >= SHARED else None


def _before(one: Thing, other: Thing) -> bool | None:
    """Tell whether one stands before the other: it reaches further down, and lies largely across it."""
    if max(one.low[0] - other.high[0], other.low[0] - one.high[0]) > ASIDE or other.high[1] - one.high[1] > DEPTH:
        return False
    if one.category != other.category and not {one.category, other.category} <= GROUND:
        return None
    if one.high[1] - other.high[1] < DEPTH or _common(one, other, 0) < BEFORE or _common(one, other, 1) < SHARED:
        return None
    if one.category == other.category:
        return True if one.area >= FURTHER_AWAY * other.area else None
    return True if other.low[1] - TOUCH <= one.low[1] or one.area >= other.area else None


def _common(one: Thing, other: Thing, axis: int) -> float:
    """Return the extent that two things have in common, as a share of the lesser one."""
    both = min(one.high[axis], other.high[axis]) - max(one.low[axis], other.low[axis])
    return max(0.0, both) / max(min(one.high[axis] - one.low[axis], other.high[axis] - other.low[axis]), 1e-6)
