"""The evaluator: hand-made scenes for every kind, and brute force written from the definitions."""

from __future__ import annotations

import random

import pytest

from grex_mllm.data.synthetic import (
    KINDS,
    Scene,
    SyntheticDataset,
    check_expression,
    draw_scene,
    evaluate,
    grammar,
    parse,
    scene_from_record,
)
from grex_mllm.data.synthetic.expressions import sample_expression
from grex_mllm.data.synthetic.grammar import ALL, THE, Description, Exclusion, Expression, Extreme, Ordinal, Reference, Shared
from grex_mllm.data.synthetic.scenes import SceneObject
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.data.synthetic.shapes import COLOURS, DIAMETERS, SHAPES, SIZES, TEXTURES, full_area
from grex_mllm.errors import GrexError
from grex_mllm.types import ImageRecord, Instance


def thing(words: str, x: int, y: int, diameter: int) -> SceneObject:
    """Build "red star striped" around a centre."""
    colour, shape, texture = words.split()
    half = diameter // 2
    values = (SHAPES.index(shape), COLOURS.index(colour), int(diameter >= 20), TEXTURES.index(texture))
    return SceneObject(values, DIAMETERS.index(diameter), (x - half, y - half, x + half, y + half))


@pytest.fixture
def scene() -> Scene:
    return Scene(
        96,
        96,
        [
            thing("red circle plain", 15, 20, 28),  # 0
            thing("red circle striped", 40, 22, 13),  # 1
            thing("blue circle plain", 80, 20, 20),  # 2
            thing("blue star dotted", 20, 70, 24),  # 3
            thing("green bar plain", 47, 45, 28),  # 4
            thing("blue star striped", 78, 72, 15),  # 5
        ],
    )


AMBIGUOUS = None
CASES = [
    ("category", "all circles", {0, 1, 2}),
    ("category", "the bar", {4}),
    ("category", "the circle", AMBIGUOUS),
    ("category", "every cross", set()),
    ("category", "the circles on the left", {0, 1}),
    ("category", "the bars on the left", AMBIGUOUS),  # in the middle
    ("category", "everything", {0, 1, 2, 3, 4, 5}),
    ("category", "the stars at the top", set()),
    ("attribute", "the striped circle", {1}),
    ("attribute", "red shapes", {0, 1}),
    ("attribute", "the large blue star", {3}),
    ("attribute", "the stars that are blue", {3, 5}),
    ("attribute", "the red star", set()),
    ("attribute", "the left star", {3}),
    ("shared_attribute", "the blue circles and stars", {2, 3, 5}),
    ("shared_attribute", "the plain circles and bars", {0, 2, 4}),
    ("shared_attribute", "the plain circle and bar", AMBIGUOUS),
    ("shared_attribute", "the striped circle and star", {1, 5}),
    ("shared_attribute", "the circle and the star that are both striped", {1, 5}),
    ("shared_attribute", "the green circle and star", set()),
    ("shared_attribute", "the red circles and stars", AMBIGUOUS),  # no red star: half true
    ("separate_attributes", "the striped circle and the dotted star", {1, 3}),
    ("separate_attributes", "the right blue circle and the small blue star", {2, 5}),
    ("separate_attributes", "the dotted circle and the green star", set()),
    ("cardinal", "the two stars", {3, 5}),
    ("cardinal", "both red circles", {0, 1}),
    ("cardinal", "the four circles", set()),
    ("cardinal", "the two circles", AMBIGUOUS),  # which two of three
    ("cardinal", "the two circles on the left", {0, 1}),
    ("ordinal", "the second circle from the left", {1}),
    ("ordinal", "the rightmost circle", {2}),
    ("ordinal", "the first star from the right", {5}),
    ("ordinal", "the topmost circle", AMBIGUOUS),  # two of them at nearly one height
    ("ordinal", "the fourth circle from the left", set()),
    ("ordinal", "the second object from the bottom", AMBIGUOUS),
    ("extreme", "the largest star", {3}),
    ("extreme", "the smallest circle", {1}),
    ("extreme", "the largest green star", set()),
    ("extreme", "the biggest circle", {0}),
    ("relation", "the circles above the green bar", {0, 1, 2}),
    ("relation", "the stars to the right of the green bar", {5}),
    ("relation", "the star above the green bar", set()),
    ("relation", "the circle above the star", AMBIGUOUS),
    ("relation", "the circles above the red star", set()),
    ("relation", "all shapes left of the striped circle", {0, 3}),
    ("relation", "everything below the largest circle", AMBIGUOUS),  # the other circles stand level with it
    ("exclusion", "everything except the blue stars", {0, 1, 2, 4}),
    ("exclusion", "all circles but the smallest one", {0, 2}),
    ("exclusion", "all circles except for the blue one", {0, 1}),
    ("exclusion", "all stars except the blue ones", set()),
    ("exclusion", "all circles except the stars", AMBIGUOUS),
    ("exclusion", "all crosses except the red ones", set()),
    ("exclusion", "the circles but the leftmost one", {1, 2}),
    ("compound_and", "the green bar and the two stars", {3, 4, 5}),
    ("compound_and", "the largest star and the second circle from the left and the bar", {1, 3, 4}),
    ("compound_and", "the bar and the cross", AMBIGUOUS),
    ("compound_and", "the cross and the ring", set()),
    ("compound_with_or", "the stars with stripes or dots", {3, 5}),
    ("compound_with_or", "the circles that are blue or striped", {1, 2}),
    ("compound_with_or", "everything that is a bar or a star", {3, 4, 5}),
    ("compound_with_or", "all bars that are red or striped", set()),
    ("negation", "shapes that are not red", {2, 3, 4, 5}),
    ("negation", "the circle that is not red", {2}),
    ("negation", "the star without stripes", {3}),
    ("negation", "everything that is neither red nor blue", {4}),
    ("negation", "the stars that are not blue", set()),
]


@pytest.mark.parametrize(("kind", "text", "expected"), CASES)
def test_hand_made_scene(scene: Scene, kind: str, text: str, expected: set[int] | None) -> None:
    tree = parse(text)
    assert tree is not None, text
    assert evaluate(tree, scene) == (None if expected is None else frozenset(expected))


def test_hand_made_cases_cover_every_kind() -> None:
    assert {kind for kind, _, _ in CASES} == set(KINDS)
    for kind in KINDS:
        assert any(expected for k, _, expected in CASES if k == kind)
        assert any(expected == set() for k, _, expected in CASES if k == kind)


def fits(item: SceneObject, description: Description) -> bool:
    names = [(SHAPES, 0), (COLOURS, 1), (SIZES, 2), (TEXTURES, 3)]
    for (table, k), value in zip(names, description.values, strict=True):
        if value is not None and table[item.values[k]] != table[value]:
            return False
    condition = description.condition
    if condition is None:
        return True
    hits = [item.values[k] == value for k, value in condition.terms]
    return any(hits) if condition.kind == "either" else not any(hits)


def middle(item: SceneObject, side: str) -> float:
    """Distance from that side's far end, so that a larger number is nearer to the side."""
    x, y = (item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2
    return {"left": -x, "right": x, "top": -y, "bottom": y}[side]


def brute(tree: Expression, scene: Scene) -> set[int] | None:
    """Evaluate from the definitions, with sets and loops."""
    objects = scene.objects
    if isinstance(tree, grammar.Union):
        parts = [brute(part, scene) for part in tree.parts]
        return joined(parts)
    if isinstance(tree, Shared):
        parts = []
        for shape in tree.shapes:
            group = {k for k, item in enumerate(objects) if fits(item, tree.description) and item.values[0] == shape}
            parts.append(group if tree.quantifier == ALL or len(group) == 1 else set() if not group else None)
        return joined(parts)
    if isinstance(tree, Exclusion):
        base, minus = brute(tree.base, scene), brute(tree.minus, scene)
        if not base:
            return base
        return base - minus if minus and minus & base else None
    members = [k for k, item in enumerate(objects) if fits(item, tree.description)]
    if isinstance(tree, Extreme):
        areas = {k: full_area(objects[k].values[0], objects[k].scale) for k in members}
        if len(members) < 2:
            return set(members)
        order = sorted(members, key=lambda k: areas[k], reverse=tree.largest)
        ratio = areas[order[0]] / areas[order[1]]
        return {order[0]} if max(ratio, 1 / ratio) >= 1.3 else None
    if isinstance(tree, Ordinal):
        if len(members) < tree.rank:
            return set()
        order = sorted(members, key=lambda k: -middle(objects[k], tree.side))
        chosen = order[tree.rank - 1]
        gaps = [abs(middle(objects[k], tree.side) - middle(objects[chosen], tree.side)) for k in members if k != chosen]
        return {chosen} if all(gap >= 0.04 * 96 for gap in gaps) else None
    return brute_reference(tree, scene, members)


def joined(parts: list[set[int] | None]) -> set[int] | None:
    if any(part is None for part in parts):
        return None
    filled = [part for part in parts if part]
    return set().union(*filled) if len(filled) in (0, len(parts)) else None


def brute_reference(tree: Reference, scene: Scene, members: list[int]) -> set[int] | None:
    line: float | None = None
    margin = 0.0
    if tree.place is not None:
        line, margin, side = {"left": -48, "right": 48, "top": -48, "bottom": 48}[tree.place], 0.06 * 96, tree.place
    elif tree.relation is not None and members:
        anchor = brute(tree.relation.anchor, scene)
        if not anchor:
            return anchor
        (only,) = anchor
        members = [k for k in members if k != only]
        line, margin, side = middle(scene.objects[only], tree.relation.side), 0.05 * 96, tree.relation.side
    if line is not None:
        distances = {k: middle(scene.objects[k], side) - line for k in members}
        if any(abs(distance) < margin for distance in distances.values()):
            return None
        members = [k for k in members if distances[k] > 0]
    if tree.quantifier == ALL or len(members) == max(tree.quantifier, THE):
        return set(members)
    return set() if len(members) < tree.quantifier else None


def test_against_brute_force() -> None:
    """Trees of one scene are judged in two others as well, where they are often false or undetermined."""
    scenes = [draw_scene(SyntheticConfig(), "train", index).scene for index in range(150)]
    rng = random.Random(5)
    outcomes = {"none": 0, "undetermined": 0, "some": 0}
    for index, own in enumerate(scenes):
        for _ in range(8):
            tree, _, mask = sample_expression(own, rng, 0.2)
            assert brute(tree, own) == {k for k in range(len(own.objects)) if mask >> k & 1}
            for other in (scenes[index - 1], scenes[index - 2]):
                expected = brute(tree, other)
                assert evaluate(tree, other) == (None if expected is None else frozenset(expected)), tree
                outcomes["undetermined" if expected is None else "some" if expected else "none"] += 1
    assert min(outcomes.values()) > 100


def test_small_shifts_never_change_the_answer() -> None:
    """Margins: moving every object by up to one pixel may make an expression undetermined, but never true of other objects."""
    rng = random.Random(6)
    same = 0
    for index in range(100):
        scene = draw_scene(SyntheticConfig(), "val", index).scene
        for _ in range(8):
            tree, _, _ = sample_expression(scene, rng, 0.2)
            moved = []
            for item in scene.objects:
                dx, dy = rng.randint(-1, 1), rng.randint(-1, 1)
                x1, y1, x2, y2 = item.box
                moved.append(SceneObject(item.values, item.scale, (x1 + dx, y1 + dy, x2 + dx, y2 + dy)))
            found = evaluate(tree, Scene(96, 96, moved))
            assert found is None or found == evaluate(tree, scene)
            same += found is not None
    assert same > 600


def test_check_expression_names_the_four_outcomes() -> None:
    sample = SyntheticDataset(SyntheticConfig(), "test", 50, 8)[7]
    record = next(record for record in sample.expressions if record.targets)
    assert check_expression(record.expression, sample, record.targets) == "exact"
    assert check_expression(record.expression, sample.record, record.targets) == "exact"
    others = [instance.annotation_id for instance in sample.record.instances if instance.annotation_id not in record.targets]
    assert check_expression(record.expression, sample, others) == "wrong"
    assert check_expression("the shape", sample, record.targets) == "ambiguous"
    assert check_expression("the the shape", sample, record.targets) == "unparsable"
    scene = scene_from_record(sample.record)
    positions = [int(target.split(":")[1]) for target in record.targets]
    assert check_expression(record.expression, scene, positions) == "exact"


def test_check_expression_refuses_what_it_cannot_judge() -> None:
    photograph = ImageRecord("1", "1.jpg", 10, 10, [Instance("7", "person", [0.0, 0.0, 5.0, 5.0])])
    with pytest.raises(GrexError, match="no attribute"):
        check_expression("the circle", photograph, ["7"])
    sample = SyntheticDataset(SyntheticConfig(), "test", 1, 1)[0]
    with pytest.raises(GrexError, match="test-9:0"):
        check_expression("the circle", sample, ["test-9:0"])
