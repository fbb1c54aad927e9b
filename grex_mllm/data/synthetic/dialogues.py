"""Dialogues about a scene with exact truth: an expression, then a follow-up that refers to what it selected.

A follow-up names an operation on the selected set (union, difference, restriction, neighbour, complement). Its truth is computed from the
scene, as that of the grammar is (`meaning.py`): whatever lies within a margin leaves the follow-up undetermined, and it is not asked.
What is described ("the red one") is looked for in the selection for difference and restriction, in the whole scene for union, beside the
selection for the others. A neighbour is the nearest other object by the gap between boxes (`ops/nearness.py`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from grex_mllm.data.synthetic.descriptions import SIDES, Draw, choose, keep, some_attributes
from grex_mllm.data.synthetic.expressions import mentions_held_out, sample_expression, word_expression
from grex_mllm.data.synthetic.grammar import ALL, EXTREMES, MOST, NUMBERS, SHAPE_PLURALS, SIZE_WORDS, Description, Reference
from grex_mllm.data.synthetic.meaning import matching
from grex_mllm.data.synthetic.scenes import HeldOut, Scene, bits
from grex_mllm.data.synthetic.shapes import COLOURS, SHAPE, SHAPES, TEXTURES
from grex_mllm.ops.nearness import NEAR, gaps, leads

UNION, DIFFERENCE, RESTRICTION, NEIGHBOUR, COMPLEMENT = OPERATIONS = ("union", "difference", "restriction", "neighbour", "complement")
PLAIN, NAMED, ORDERED, SIDED, SEVERAL = "plain", "named", "ordered", "sided", "several"  # forms of a follow-up, for tables
GAP_MARGIN, LEAD_MARGIN, NEAR_MARGIN = 0.04, 0.05, 0.02  # of the image's side
_TRIES = 24

_WORDINGS = {
    UNION: ("and {} too", "and {}", "also {}", "{} too", "{} as well", "add {}", "and also {}", "plus {}"),
    DIFFERENCE: ("not {}", "but not {}", "without {}", "except {}", "remove {}", "leave out {}", "all but {}", "no not {}"),
    RESTRICTION: ("only {}", "just {}", "{} of them", "keep {}", "only {} of them", "of those {}"),
}
_BESIDE = ("{} next to {}", "{} beside {}", "{} nearest to {}", "{} closest to {}")
_SIDE_PHRASES = {
    "left": ("{} to the left of {}", "{} left of {}"),
    "right": ("{} to the right of {}", "{} right of {}"),
    "top": ("{} above {}",),
    "bottom": ("{} below {}",),
}
_OTHERS = ("the others", "all the others", "everything else", "the rest", "the other ones", "all other objects")


@dataclass(frozen=True)
class DrawnDialogue:
    """first, targets: an expression and its objects as a bit mask.  follow_up, result: the same of what comes next.

    operation: of OPERATIONS.  form: what kind of follow-up it is, of its operation.
    """

    first: str
    targets: int
    follow_up: str
    result: int
    operation: str
    form: str


def draw_dialogue(
    scene: Scene, rng: random.Random, operation: str, held: HeldOut | None = None, empty: bool = False
) -> DrawnDialogue | None:
    """Draw a dialogue of an operation, or return None where the scene does not lend itself to one.

    held: attribute pairs that nothing may mention, as in `sample_expression`.  empty: of a restriction, one that leaves nothing.
    """
    for _ in range(_TRIES):
        tree, _, targets = sample_expression(scene, rng, 0.0, None, held)
        first = word_expression(tree, rng)
        if first is None:
            continue
        found = _BUILDERS[operation](scene, rng, targets, held) if not empty else _nothing_left(scene, rng, targets, held)
        if found is not None:
            follow_up, result, form = found
            return DrawnDialogue(first, targets, follow_up, result, operation, form)
    return None


def _union(scene: Scene, rng: random.Random, targets: int, held: HeldOut | None) -> tuple[str, int, str] | None:
    r = rng.random
    if r() < 0.4:
        named = _described(scene, r, scene.everything, scene.everything & ~targets, held, targets)
        if named is None or named[1] & targets:
            return None
        return _worded(UNION, named[0], r), targets | named[1], PLAIN if named[2] else NAMED
    tree, _, added = sample_expression(scene, rng, 0.0, {"category": 1, "attribute": 2, "extreme": 1, "ordinal": 1}, held)
    text = word_expression(tree, rng)
    if text is None or not added or added & targets or not text.startswith("the "):
        return None
    return _worded(UNION, text, r), targets | added, NAMED


def _part(scene: Scene, rng: random.Random, targets: int, held: HeldOut | None) -> tuple[str, int, str] | None:
    """Name a proper part of the selected objects: (text, part, form)."""
    r = rng.random
    if targets.bit_count() < 2:
        return None
    if r() < 0.3:
        ordered = _ordered(scene, r, targets)
        return None if ordered is None else (*ordered, ORDERED)
    named = _described(scene, r, targets, targets, held, targets)
    if named is None or named[1] == targets:
        return None
    return (*named[:2], PLAIN if named[2] else NAMED)


def _difference(scene: Scene, rng: random.Random, targets: int, held: HeldOut | None) -> tuple[str, int, str] | None:
    part = _part(scene, rng, targets, held)
    return None if part is None else (_worded(DIFFERENCE, part[0], rng.random), targets & ~part[1], part[2])


def _restriction(scene: Scene, rng: random.Random, targets: int, held: HeldOut | None) -> tuple[str, int, str] | None:
    part = _part(scene, rng, targets, held)
    return None if part is None else (_worded(RESTRICTION, part[0], rng.random), part[1], part[2])


def _nothing_left(scene: Scene, rng: random.Random, targets: int, held: HeldOut | None) -> tuple[str, int, str] | None:
    """Restrict the selection to what only other objects are."""
    r = rng.random
    named = _described(scene, r, scene.everything, scene.everything & ~targets, held, 0)
    if named is None or named[1] & targets:
        return None
    return _worded(RESTRICTION, named[0], r), 0, PLAIN if named[2] else NAMED


def _neighbour(scene: Scene, rng: random.Random, targets: int, held: HeldOut | None) -> tuple[str, int, str] | None:
    r = rng.random
    candidates, subject, several, form = scene.everything & ~targets, "the one", "the ones", PLAIN
    if r() < 0.4:
        named = _described(scene, r, scene.everything, candidates, held, targets, number_counts=False)
        if named is None:
            return None
        candidates, form = named[1] & ~targets, NAMED
        shape = "" if named[2] else SHAPES[_shape_of(scene, named[1])]
        words = named[0].removeprefix("the ").split()[:-1]
        subject, several = (" ".join(["the", *words, noun]) for noun in ((shape, _plural(shape)) if shape else ("one", "ones")))
    if not candidates:
        return None
    pronoun = "it" if targets.bit_count() == 1 else "them"
    if r() < 0.3:
        side = SIDES[int(r() * 4)]
        result = nearest(scene, targets, candidates, 1, side)
        return None if not result else (_pick(_SIDE_PHRASES[side], r).format(subject, pronoun), result, SIDED)
    if r() < 0.25:
        number = 2 if r() < 0.5 else None
        result = nearest(scene, targets, candidates, number)
        text = several.replace("the ", f"the {NUMBERS[0]} ", 1) if number else several
        return None if not result else (_pick(_BESIDE[:2], r).format(text, pronoun), result, SEVERAL)
    result = nearest(scene, targets, candidates, 1)
    return None if not result else (_pick(_BESIDE, r).format(subject, pronoun), result, form)


def nearest(scene: Scene, targets: int, candidates: int, number: int | None, side: str = "") -> int | None:
    """Return the bit mask of the nearest candidates: 0 for none, None where margins leave it open.

    number: how many, None = all within NEAR.  side: on which they lie of all targets, "" for any.
    """
    boxes, chosen, extent = [item.box for item in scene.objects], bits(targets), max(scene.width, scene.height)
    gap = gaps(boxes, chosen)
    members, unsure = bits(candidates & ~targets), []
    if side:
        lead = leads(boxes, chosen, side)
        unsure = [n for n in members if abs(lead[n]) < LEAD_MARGIN * extent]
        members = [n for n in members if lead[n] >= LEAD_MARGIN * extent]
    ranked = sorted(members, key=lambda n: gap[n])
    if number is None:
        if any(abs(gap[n] - NEAR * extent) < NEAR_MARGIN * extent for n in ranked) or unsure:
            return None
        return sum(1 << n for n in ranked if gap[n] < NEAR * extent)
    if len(ranked) < number:
        return None if unsure else 0
    last = gap[ranked[number - 1]] + GAP_MARGIN * extent
    if any(gap[n] < last for n in [*ranked[number:], *unsure]):
        return None
    return sum(1 << n for n in ranked[:number])


def _complement(scene: Scene, rng: random.Random, targets: int, held: HeldOut | None) -> tuple[str, int, str] | None:
    r = rng.random
    others = scene.everything & ~targets
    if not others:
        return None
    if r() < 0.5:
        return _pick(_OTHERS, r), others, PLAIN
    shape = scene.objects[choose(bits(others), r)].values[SHAPE]
    result = scene.masks[SHAPE][shape] & others
    if not scene.masks[SHAPE][shape] & targets:  # "the other circles" where none is selected
        return None
    if result.bit_count() == 1:
        return f"the other {SHAPES[shape]}", result, NAMED
    return _pick(("the other {}", "all other {}", "all the other {}"), r).format(SHAPE_PLURALS[shape]), result, NAMED


_BUILDERS: dict[str, Callable[[Scene, random.Random, int, HeldOut | None], tuple[str, int, str] | None]] = {
    UNION: _union,
    DIFFERENCE: _difference,
    RESTRICTION: _restriction,
    NEIGHBOUR: _neighbour,
    COMPLEMENT: _complement,
}


def _described(
    scene: Scene, r: Draw, among: int, of: int, held: HeldOut | None, spoken: int, number_counts: bool = True
) -> tuple[str, int, bool] | None:
    """Describe an object of `of` and return (text, all of `among` that fit, whether the noun is left out).

    The noun may be left out ("the red one"). Where all objects spoken of (a bit mask) have one shape, what fits must then have it, too:
    "the red ones" after "the circles" may mean the circles alone. number_counts: the text says one or several.
    """
    if not of:
        return None
    item = choose(bits(of), r)
    elliptic = r() < 0.6
    tree = keep(scene, item, some_attributes(r) if elliptic or r() < 0.5 else [])
    if not elliptic:
        tree = tree.having(SHAPE, scene.objects[item].values[SHAPE])
    found = matching(tree, scene) & among
    if elliptic and spoken:
        shapes = {scene.objects[n].values[SHAPE] for n in bits(spoken | found)}
        if len({scene.objects[n].values[SHAPE] for n in bits(spoken)}) == 1 and len(shapes) > 1:
            return None
    if not found or mentions_held_out(Reference(ALL, tree), scene, held):
        return None
    return f"the {_words(tree, found.bit_count() > 1 and number_counts, r)}", found, elliptic


def _words(tree: Description, plural: bool, r: Draw) -> str:
    shape, colour, size, texture = tree.values
    adjectives = [_pick(SIZE_WORDS[size], r)] if size is not None else []
    adjectives += [COLOURS[colour]] if colour is not None else []
    adjectives += [TEXTURES[texture]] if texture is not None else []
    if shape is None:
        return " ".join([*adjectives, "ones" if plural else "one"])
    return " ".join([*adjectives, SHAPE_PLURALS[shape] if plural else SHAPES[shape]])


def _ordered(scene: Scene, r: Draw, targets: int) -> tuple[str, int] | None:
    """Name the largest, the smallest or the outermost of the selected objects."""
    if r() < 0.5:
        largest = r() < 0.5
        found = scene.extreme(targets, largest)
        return (f"the {_pick(EXTREMES[largest], r)} one", found) if found else None
    side = SIDES[int(r() * 4)]
    found = scene.ranked(targets, side, 1)
    place = f"{'on' if side in ('left', 'right') else 'at'} the {side}"
    return (_pick((f"the {MOST[side]} one", f"the one {place}"), r), found) if found else None


def _worded(operation: str, text: str, r: Draw) -> str:
    return _pick(_WORDINGS[operation], r).format(text)


def _pick(options: tuple[str, ...], r: Draw) -> str:
    return options[int(r() * len(options))]


def _shape_of(scene: Scene, mask: int) -> int:
    return scene.objects[bits(mask)[0]].values[SHAPE]


def _plural(shape: str) -> str:
    return SHAPE_PLURALS[SHAPES.index(shape)]
