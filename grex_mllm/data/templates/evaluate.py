"""What a meaning denotes in a scene: annotation ids, none of them, or undecided where a person would hesitate.

- A singular denotes its only match, nothing where there is none, and is undecided where there are several. A stated number likewise; a
plural without one needs two.
- "On the left" is a half of the picture, or, of two or three objects that stand clearly apart, the leftmost; where both readings say
something, they must agree. "On the left side of the picture" is the half alone.
- Places and orders hold by margins: MARGIN of the image's side for centres and centroids of masks, and edges in the same order.
- In front is what reaches further down and looks larger (things stand on the ground); behind is the converse, within one category.
- "A and B" and "A except B" are undecided where a part denotes nothing, B is no part of A, or A and B overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter

from grex_mllm.data.templates.meaning import PLURAL, SIDES, Meaning, Phrase, Pick, Relation, Union, Where
from grex_mllm.data.templates.places import decide_relation, decide_where, is_far, ranked_apart
from grex_mllm.data.templates.scene import Scene, Thing

MARGIN = 0.05  # of the image's side, between the last that is meant and the first that is not
WIDE_MARGIN = 0.1  # where "on the left" is said of the leftmost
MARGIN_SIZE = 1.4  # ratio of areas
MARGIN_DEPTH = 0.06  # of the image's height, between lower edges
MARGIN_NEAR = 0.08  # of the image's diagonal, between distances
MOST_COMPARED = 12  # larger groups are neither counted nor compared
SIDE_GROUP = 3  # "on the left" may mean the leftmost among so many

Found = tuple[Thing, ...] | None  # None = undecided


def evaluate(meaning: Meaning, scene: Scene) -> frozenset[str] | None:
    """Return the annotation ids that a meaning denotes, empty for none, None where the image does not decide it."""
    found = _denoted(meaning, scene)
    if found is None:
        return None
    ids = frozenset(thing.annotation_id for thing in found)
    seen = scene.without_specks()
    if seen is not None:
        again = _denoted(meaning, seen)
        if again is None or frozenset(thing.annotation_id for thing in again) != ids:
            return None
    return ids


def _denoted(meaning: Meaning, scene: Scene) -> Found:
    if isinstance(meaning, Phrase):
        return _phrase(meaning, scene)
    if isinstance(meaning, Union):
        return _union([_denoted(part, scene) for part in meaning.parts])
    base, minus = _phrase(meaning.base, scene), _denoted(meaning.minus, scene)
    if base is None or not base:
        return base
    if not minus or not set(minus) < set(base):
        return None
    return tuple(thing for thing in base if thing not in minus)


def _union(parts: list[Found]) -> Found:
    known = [part for part in parts if part is not None]
    together = [thing for part in known for thing in part]
    if len(known) < len(parts) or len(set(together)) < len(together):
        return None
    return None if together and not all(known) else tuple(together)


def _phrase(phrase: Phrase, scene: Scene) -> Found:
    things = scene.of(phrase.categories)
    if things and phrase.colour:
        things = _coloured(things, phrase.colour, phrase.negated_colour)
    if not things:
        return things
    relations = [condition for condition in phrase.conditions if isinstance(condition, Relation)]
    places = [condition for condition in phrase.conditions if isinstance(condition, Where)]
    for relation in relations:
        anchor = _denoted(relation.anchor, scene)
        if anchor is None or len(anchor) != 1:
            return () if anchor == () else None
        things = tuple(thing for thing in things if thing is not anchor[0])
    checks: list[Callable[[Thing], bool | None]] = []
    checks += [_relation_check(relation, _one(relation.anchor, scene), scene) for relation in relations]
    if len(places) == 1 and not (places[0].frame or places[0].negated or phrase.pick):
        kept = _filtered(things, checks)
        found = kept if not kept else _side(kept, places[0], phrase.number)
    else:
        kept = _filtered(things, [*checks, *map(_where_check, places)])
        found = kept if not kept or phrase.pick else _counted(kept, phrase.number)
    if found == () and places and not all(_is_clear(thing, places, checks) for thing in things):
        return None
    return found if not kept or phrase.pick is None else _picked(kept, phrase.pick, phrase.number, scene)


def _is_clear(thing: Thing, places: list[Where], checks: list[Callable[[Thing], bool | None]]) -> bool:
    """Tell whether nobody hesitates about a thing: it is there, or clearly somewhere else."""
    if any(is_far(thing, place) for place in places) or any(check(thing) is False for check in checks):
        return True
    return all(decide_where(thing, place) for place in places)


def _where_check(place: Where) -> Callable[[Thing], bool | None]:
    return lambda thing: decide_where(thing, place)


def _relation_check(relation: Relation, anchor: Thing, scene: Scene) -> Callable[[Thing], bool | None]:
    return lambda thing: decide_relation(thing, relation.kind, anchor, scene.aspect)


def _one(meaning: Meaning, scene: Scene) -> Thing:
    found = _denoted(meaning, scene)
    assert found is not None and len(found) == 1
    return found[0]


def _coloured(things: tuple[Thing, ...], colour: str, negated: bool) -> Found:
    if any(thing.colours is None for thing in things):
        return None
    if any(colour in (thing.colours or ()) and len(thing.colours or ()) > 1 for thing in things):
        return None
    return tuple(thing for thing in things if (colour in (thing.colours or ())) != negated)


def _filtered(things: Iterable[Thing], checks: list[Callable[[Thing], bool | None]]) -> Found:
    """Return what fulfils all conditions; undecided where something may or may not."""
    kept = []
    for thing in things:
        said = [check(thing) for check in checks]
        if False in said:
            continue
        if None in said:
            return None
        kept.append(thing)
    return tuple(kept)


def _counted(things: tuple[Thing, ...], number: int) -> Found:
    found = len(things)
    if number == PLURAL:
        return None if found == 1 else things
    if found == number or not found:
        return things
    return () if found < number <= MOST_COMPARED else None


def _side(things: tuple[Thing, ...], place: Where, number: int) -> Found:
    """Read "on the left" as a half of the picture and, of few objects, as the outermost; both must agree."""
    inside, several = _filtered(things, [_where_check(place)]), len(things) > 1
    if not several or number == PLURAL or place.side not in SIDES:
        if inside is None or (several and not inside and place.side in SIDES and place.side != "middle"):
            return None  # of several, the outer ones may be meant
        return _counted(inside, number)
    if len(things) < number:
        return ()
    if inside == () and place.side == "middle" and len(things) < SIDE_GROUP:
        return ()
    outer = _outermost(things, place.side, number)
    if not inside or len(inside) == len(things) > number:
        return outer
    if len(inside) != number:
        return None
    return inside if outer is None or set(inside) == set(outer) else None


def _outermost(things: tuple[Thing, ...], side: str, number: int) -> Found:
    if side == "middle":
        if number != 1 or len(things) != SIDE_GROUP:
            return None
        ranked = ranked_apart(things, "left", WIDE_MARGIN)
        return None if ranked is None else (ranked[1],)
    if number >= len(things) or len(things) > max(SIDE_GROUP, number + 1):
        return None
    return _first(things, side, number, WIDE_MARGIN)


def _picked(things: tuple[Thing, ...], pick: Pick, number: int, scene: Scene) -> Found:
    if len(things) > MOST_COMPARED or number == PLURAL:
        return None
    if pick.rank:
        ranked = ranked_apart(things, pick.by, MARGIN)
        if pick.rank > len(things):
            return ()
        return None if ranked is None else (ranked[pick.rank - 1],)
    if number >= len(things):
        return things if number == len(things) == 1 else None
    if pick.by == "nearest":
        return _nearest(things, pick, number, scene)
    return _first(things, pick.by, number, MARGIN)


def _first(things: tuple[Thing, ...], by: str, number: int, margin: float) -> Found:
    """Return the first so many in an order, where they stand clearly before all others."""
    if by in ("largest", "smallest"):
        ranked = sorted(things, key=lambda thing: -thing.area if by == "largest" else thing.area)
        last, after = ranked[number - 1].area, ranked[number].area
        return tuple(ranked[:number]) if max(last, after) >= MARGIN_SIZE * min(last, after) else None
    if by in ("front", "back"):
        sign = -1 if by == "front" else 1
        ranked = sorted(things, key=lambda thing: sign * thing.high[1])
        inside, outside = ranked[:number], ranked[number:]
        edges = min(sign * thing.high[1] for thing in outside) - max(sign * thing.high[1] for thing in inside)
        areas = [thing.area for thing in inside], [thing.area for thing in outside]
        ratio = min(areas[0]) / max(areas[1]) if by == "front" else min(areas[1]) / max(areas[0])
        return tuple(inside) if edges >= MARGIN_DEPTH and ratio >= MARGIN_SIZE else None
    axis, sign = (0 if by in ("left", "right") else 1), (1 if by in ("left", "top") else -1)
    ranked = sorted(things, key=lambda thing: sign * thing.centre(axis))
    inside, outside = ranked[:number], ranked[number:]
    centres = min(sign * thing.centre(axis) for thing in outside) - max(sign * thing.centre(axis) for thing in inside)
    centroids = min(sign * thing.centroid[axis] for thing in outside) - max(sign * thing.centroid[axis] for thing in inside)
    outer = attrgetter("low" if sign == 1 else "high")
    sides = (outer,) if axis == 0 else (attrgetter("low"), attrgetter("high"))  # who is upright is not "topmost" among the seated
    ordered = all(min(sign * edge(thing)[axis] for thing in outside) >= max(sign * edge(thing)[axis] for thing in inside) for edge in sides)
    return tuple(inside) if min(centres, centroids) >= margin and ordered else None


def _nearest(things: tuple[Thing, ...], pick: Pick, number: int, scene: Scene) -> Found:
    anchor = None if pick.anchor is None else _denoted(pick.anchor, scene)
    if anchor is None or len(anchor) != 1:
        return () if anchor == () else None
    others = tuple(thing for thing in things if thing is not anchor[0])
    if number >= len(others):
        return None
    gaps, steps = [[distance(thing, anchor[0], scene.aspect) for thing in others] for distance in (_gap, _step)]
    order = sorted(range(len(others)), key=gaps.__getitem__)
    inside, outside = order[:number], order[number:]
    clear = all(
        min(values[n] for n in outside) - max(values[n] for n in inside) >= margin for values, margin in ((gaps, MARGIN_NEAR), (steps, 0.0))
    )
    return tuple(others[n] for n in inside) if clear else None


def _gap(one: Thing, other: Thing, aspect: float) -> float:
    """Return the distance of two boxes as a share of the image's diagonal."""
    dx, dy = (max(0.0, one.low[axis] - other.high[axis], other.low[axis] - one.high[axis]) for axis in (0, 1))
    return float(((dx * aspect) ** 2 + dy**2) ** 0.5 / (aspect**2 + 1) ** 0.5)


def _step(one: Thing, other: Thing, aspect: float) -> float:
    """Return the distance of two centroids as a share of the image's diagonal."""
    dx, dy = (one.centroid[axis] - other.centroid[axis] for axis in (0, 1))
    return float(((dx * aspect) ** 2 + dy**2) ** 0.5 / (aspect**2 + 1) ** 0.5)
