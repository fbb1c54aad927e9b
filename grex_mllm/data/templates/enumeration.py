"""Everything that can be asked about a scene: candidate meanings by kind. `evaluate.py` tells which are true, and of what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from grex_mllm.data.templates.colours import names_for
from grex_mllm.data.templates.evaluate import MOST_COMPARED
from grex_mllm.data.templates.meaning import CORNERS, PLURAL, SIDES, Phrase, Pick, Relation, Where
from grex_mllm.data.templates.scene import KINDS, Scene

MOST_NAMED = 8  # nobody counts more at a glance
MOST_RANKED = 5
MOST_ANCHORS = 4
FEW = 2
SAID_RELATIONS = ("left of", "right of", "in front of", "behind")  # what is above in the picture need not be above on the ground
SAID_OF_EACH_OTHER = ("person", "cat", "dog", "car")

Candidate = tuple[str, Phrase]  # kind, meaning


def candidates(scene: Scene, category: str) -> Iterator[Candidate]:
    """Yield what may be said of the objects of one category, the plainest first."""
    group = scene.groups.get(category, ())
    names, num = (category,), len(group)
    yield "category", Phrase(names, 1 if num == 1 else PLURAL)
    if num <= FEW:
        yield from _sides(names, (1,))
    if 1 < num <= MOST_COMPARED:
        yield from _positions(names, num, ("left", "right"))
    yield from _sides(names, (1, PLURAL) if num > FEW else (PLURAL,))
    if 1 < num <= MOST_COMPARED:
        yield from (("size", Phrase(names, 1, pick=Pick(by))) for by in ("largest", "smallest"))
        yield from _orders(names, num, ("left", "right"))
        yield from _positions(names, num, ("top", "bottom"))
        yield from _orders(names, num, ("top", "bottom"))
        if num > FEW:
            yield from (("size", Phrase(names, 2, pick=Pick(by))) for by in ("largest", "smallest"))
    yield from _corners(names)
    if any(thing.colours is not None for thing in group):
        yield from _colours(names, scene)
    if 1 < num <= MOST_COMPARED:
        yield from (("depth", Phrase(names, 1, pick=Pick(by))) for by in ("front", "back"))
    yield from _relations(scene, category)
    if num <= MOST_NAMED:
        yield from (("count", Phrase(names, number)) for number in range(2, num + 4))
        yield from _counted_sides(names)
    if num > FEW:
        yield from _negations(names)
    yield from _in_the_picture(names)


def several_categories(scene: Scene) -> Iterator[Candidate]:
    """Yield what may be said of categories together ("the vehicles"), where two of them are there."""
    for members in KINDS.values():
        if sum(name in scene.groups for name in members) > 1 and scene.of(members):
            yield "category", Phrase(members, PLURAL)
            yield from (("side", Phrase(members, PLURAL, conditions=(Where(side),))) for side in ("left", "right"))


def absent(category: str) -> Iterator[Candidate]:
    """Yield what may be said of a category that is not there."""
    names = (category,)
    yield "absent_category", Phrase(names, 1)
    yield "absent_category", Phrase(names, PLURAL)
    yield "absent_category", Phrase(names, 2)
    for side in ("left", "right"):
        yield "absent_category", Phrase(names, 1, conditions=(Where(side),))
        yield "absent_category", Phrase(names, PLURAL, conditions=(Where(side),))
        yield "absent_category", Phrase(names, 1, pick=Pick(side))
    yield "absent_category", Phrase(names, 1, pick=Pick("largest"))


def _sides(names: tuple[str, ...], numbers: Sequence[int]) -> Iterator[Candidate]:
    for number in numbers:
        yield from (("side", Phrase(names, number, conditions=(Where(side),))) for side in SIDES)


def _positions(names: tuple[str, ...], num: int, sides: Sequence[str]) -> Iterator[Candidate]:
    for number in (1, 2, 3):
        if number < num:
            yield from (("position", Phrase(names, number, pick=Pick(side))) for side in sides)


def _orders(names: tuple[str, ...], num: int, sides: Sequence[str]) -> Iterator[Candidate]:
    for rank in range(2, min(num + 2, MOST_RANKED) + 1):
        if rank == num or (rank > num and "top" in sides):  # the outermost from the other side; people count from left to right
            continue
        yield from (("order", Phrase(names, 1, pick=Pick(side, rank))) for side in sides)


def _corners(names: tuple[str, ...]) -> Iterator[Candidate]:
    for number in (1, PLURAL):
        yield from (("side", Phrase(names, number, conditions=(Where(side),))) for side in CORNERS)


def _colours(names: tuple[str, ...], scene: Scene) -> Iterator[Candidate]:
    for name in names_for(names[0]):
        yield from (("colour", Phrase(names, number, name)) for number in (1, PLURAL, 2, 3))
        for side in ("left", "right"):
            yield from (("colour", Phrase(names, number, name, conditions=(Where(side),))) for number in (1, PLURAL))
        if sum(thing.colours == {name} for thing in scene.groups[names[0]]) != 1:  # of one, nobody says that it is the largest
            yield from (("colour", Phrase(names, 1, name, pick=Pick(by))) for by in ("left", "right", "largest"))


def _relations(scene: Scene, category: str) -> Iterator[Candidate]:
    single = [name for name, things in scene.groups.items() if len(things) == 1 and name != category]
    single.sort(key=lambda name: -scene.groups[name][0].area)
    anchors = [Phrase((name,), 1) for name in single[:MOST_ANCHORS]]
    if category in SAID_OF_EACH_OTHER and len(scene.groups.get(category, ())) > FEW:
        anchors.append(Phrase((category,), 1, pick=Pick("largest")))
    for anchor in anchors:
        own = anchor.categories == (category,)
        for kind in SAID_RELATIONS:
            yield from (("relation", Phrase((category,), n, conditions=(Relation(kind, anchor),))) for n in ((1,) if own else (1, PLURAL)))
        if len(scene.groups.get(category, ())) > 1:
            yield "relation", Phrase((category,), 1, pick=Pick("nearest", anchor=anchor))


def _counted_sides(names: tuple[str, ...]) -> Iterator[Candidate]:
    for number in (2, 3):
        yield from (("side", Phrase(names, number, conditions=(Where(side),))) for side in ("left", "right", "top", "bottom"))


def _negations(names: tuple[str, ...]) -> Iterator[Candidate]:
    for side in ("left", "right"):
        yield from (("negation", Phrase(names, number, conditions=(Where(side, negated=True),))) for number in (1, PLURAL))
    yield from (("negation", Phrase(names, number, name, True)) for name in ("black", "white", "orange", "red") for number in (1, PLURAL))


def _in_the_picture(names: tuple[str, ...]) -> Iterator[Candidate]:
    for side in SIDES:
        yield from (("side", Phrase(names, number, conditions=(Where(side, frame=True),))) for number in (1, PLURAL))


def all_candidates(scene: Scene) -> Iterable[Candidate]:
    """Yield what may be said of every category that can be named."""
    for category in scene.groups:
        yield from candidates(scene, category)
    yield from several_categories(scene)
