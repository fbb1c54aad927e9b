"""Templates: what an expression denotes in scenes made by hand, what is never said, and drawn shares."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from grex_mllm.data.plurals import number_word, plural_phrase, singular_phrase
from grex_mllm.data.templates import Scene, Shares, canonical_expression, draw_statements, evaluate, parse, read_scene, wordings
from grex_mllm.data.templates.balance import balanced
from grex_mllm.data.templates.colours import name_colours, possible_colours, rgb_to_lab
from grex_mllm.data.templates.drawing import NONE, ONE, SEVERAL, WHOLE, Statement, absent_categories
from grex_mllm.data.templates.judge import denoted, judge_text
from grex_mllm.data.templates.meaning import Phrase
from grex_mllm.types import ImageRecord, Instance

NAMES = ("person", "cat", "dog", "car", "bus", "truck", "bicycle", "sheep")


def thing(name: str, category: str, x: float, y: float, w: float = 10, h: float = 10, iscrowd: bool = False) -> Instance:
    return Instance(name, category, [x, y, x + w, y + h], [[x, y, x + w, y, x + w, y + h, x, y + h]], iscrowd)


def scene(*instances: Instance, labelled: tuple[str, ...] = NAMES, colours: dict[str, list[str]] | None = None) -> Scene:
    return read_scene(ImageRecord("1", "a.jpg", 100, 100, list(instances)), labelled, colours)


def said(text: str, of: Scene) -> set[str] | str:
    """Return the ids that a text denotes, "ambiguous" or "unparsable"."""
    found = denoted(text, of, NAMES)
    return found if isinstance(found, str) else set(found)


@pytest.mark.parametrize(
    ("category", "one", "many"),
    [
        ("person", "person", "people"),
        ("bus", "bus", "buses"),
        ("skis", "pair of skis", "pairs of skis"),
        ("scissors", "pair of scissors", "pairs of scissors"),
        ("sheep", "sheep", "sheep"),
        ("knife", "knife", "knives"),
        ("mouse", "mouse", "mice"),
        ("wine glass", "wine glass", "wine glasses"),
        ("bench", "bench", "benches"),
        ("toothbrush", "toothbrush", "toothbrushes"),
        ("broccoli", "piece of broccoli", "pieces of broccoli"),
        ("teddy bear", "teddy bear", "teddy bears"),
        ("donut", "donut", "donuts"),
        ("toy", "toy", "toys"),
        ("berry", "berry", "berries"),
        ("hot dog", "hot dog", "hot dogs"),
        ("box", "box", "boxes"),
    ],
)
def test_plurals(category: str, one: str, many: str) -> None:
    assert singular_phrase(category) == one and plural_phrase(category) == many


def test_numbers() -> None:
    assert [number_word(n) for n in (2, 12, 13)] == ["two", "twelve", "13"]


CATS = scene(thing("1", "cat", 5, 10), thing("2", "cat", 40, 30, 20, 20), thing("3", "cat", 80, 14), thing("d", "dog", 30, 80))


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("the dog", {"d"}),
        ("all the cats", {"1", "2", "3"}),
        ("The three cats.", {"1", "2", "3"}),
        ("every cat", {"1", "2", "3"}),
        ("two cats", "ambiguous"),
        ("the four cats", set()),
        ("the cat", "ambiguous"),
        ("the leftmost cat", {"1"}),
        ("cat on the far right", {"3"}),
        ("the two leftmost cats", {"1", "2"}),
        ("cat on the left", {"1"}),
        ("the cat in the middle", {"2"}),
        ("2nd cat from the right", {"2"}),
        ("the fourth cat from the left", set()),
        ("the biggest cat", {"2"}),
        ("the smallest cat", "ambiguous"),  # two of one size
        ("the bottommost cat", {"2"}),
        ("the topmost cat", "ambiguous"),  # 4 px apart
        ("all the cats except the largest one", {"1", "3"}),
        ("everyone but the leftmost person", set()),
        ("all but the biggest cat", {"1", "3"}),
        ("the leftmost cat and the rightmost cat", {"1", "3"}),
        ("the leftmost and the rightmost cat", {"1", "3"}),
        ("the cat on the far left and the one on the far right", {"1", "3"}),
        ("the dog and the biggest cat", {"d", "2"}),
        ("the dog and the bus", "ambiguous"),  # one of two
        ("the largest cat and the cat in the middle", "ambiguous"),  # the same one twice
        ("the cats not on the left", "ambiguous"),  # what is in the middle may be counted or not
        ("the cat closest to the dog", {"2"}),
        ("the cat above the dog", "ambiguous"),
        ("the bus", set()),
        ("the red bus", set()),
        ("the zebra", "unparsable"),
        ("the man on the left", "unparsable"),
        ("the cat sitting on the left", "unparsable"),
        ("", "unparsable"),
    ],
)
def test_what_texts_denote(text: str, ids: set[str] | str) -> None:
    assert said(text, CATS) == ids


def test_sides_are_halves_or_of_few_the_outer_ones() -> None:
    two = scene(thing("1", "cat", 5, 5), thing("2", "cat", 30, 60))
    assert said("the cat on the left", two) == {"1"} and said("the cat on the right", two) == {"2"}  # of two, by comparison
    assert said("the cats on the left side of the picture", two) == {"1", "2"}
    assert said("the cat on the right side of the picture", two) == set()
    assert said("the cats on the right", two) == "ambiguous"
    near = scene(thing("1", "cat", 5, 5), thing("2", "cat", 11, 60))
    assert said("the cat on the left", near) == "ambiguous"
    four = scene(*(thing(str(n), "cat", 4 + 11 * n, 5) for n in range(4)))
    assert said("the cat on the left", four) == "ambiguous" and said("the leftmost cat", four) == {"0"}
    one = scene(thing("1", "cat", 80, 5))
    assert said("the cat on the left", one) == set() and said("the cat on the right", one) == {"1"}
    assert said("the cat on the left", scene(thing("1", "cat", 47, 5))) == "ambiguous"  # nobody says so, nobody denies it
    corners = scene(thing("1", "cat", 5, 5), thing("2", "cat", 80, 80), thing("3", "cat", 80, 5))
    assert said("the cat in the top right corner", corners) == {"3"} and said("lower right cat", corners) == {"2"}
    assert said("the cat at the bottom left", corners) == set()


def test_in_front_is_lower_and_larger() -> None:
    row = scene(thing("1", "person", 10, 40, 20, 50), thing("2", "person", 50, 40, 8, 20), thing("b", "bus", 5, 20, 50, 50))
    assert said("the person in front", row) == {"1"} and said("the person in the background", row) == {"2"}
    assert said("the person in front of the bus", row) == {"1"}  # the other one's feet are higher than the wheels
    assert said("the person behind the bus", row) in ("ambiguous", set())  # may as well sit in it
    level = scene(thing("1", "person", 10, 40, 20, 50), thing("2", "person", 50, 60, 12, 30))
    assert said("the person in front", level) == "ambiguous"


def test_relations_need_clear_sides() -> None:
    street = scene(thing("1", "person", 5, 50, 8, 30), thing("2", "person", 80, 50, 8, 30), thing("c", "car", 30, 50, 30, 30))
    assert said("the person to the left of the car", street) == {"1"} and said("person right of the car", street) == {"2"}
    assert said("the person left of the dog", street) == set()
    assert said("the people to the left of the car", street) == "ambiguous"  # one is no plural
    over = scene(thing("1", "person", 25, 50, 8, 30), thing("c", "car", 30, 50, 30, 30))
    assert said("the person to the left of the car", over) == "ambiguous"  # they overlap
    assert said("the person to the right of the car", over) == set()


def test_two_readings_that_differ_are_ambiguous() -> None:
    street = scene(
        thing("1", "person", 2, 50, 5, 30),
        thing("2", "person", 60, 50, 5, 30),
        thing("3", "person", 68, 50, 5, 30),
        thing("a", "car", 10, 50, 15, 30),
        thing("b", "car", 80, 50, 15, 30),
    )
    assert len(parse("the person to the left of the car on the right", NAMES)) == 2
    assert said("the person closest to the car on the left", street) in ({"1"}, "ambiguous")


def test_colours_hold_only_where_all_are_certain() -> None:
    pair = thing("1", "cat", 5, 10), thing("2", "cat", 60, 10)
    assert said("the black cat", scene(*pair, colours={"1": ["black"], "2": ["white"]})) == {"1"}
    assert said("the black cat", scene(*pair, colours={"1": ["black"], "2": ["black", "grey"]})) == "ambiguous"
    assert said("the black cat", scene(*pair, colours={"1": ["black"]})) == "ambiguous"
    assert said("the red cat", scene(*pair, colours={"1": ["black"], "2": []})) == set()
    assert said("the cat that is not black", scene(*pair, colours={"1": ["black"], "2": ["white"]})) == {"2"}
    assert said("the black cats", scene(*pair, colours={"1": ["black"], "2": ["black"]})) == {"1", "2"}


def test_colours_from_pixels() -> None:
    def named(*rgb: int) -> list[str]:
        return name_colours(rgb_to_lab(np.tile(np.array(rgb, np.uint8), (100, 1))))

    assert named(15, 15, 15) == ["black"] and named(235, 235, 235) == ["white"] and named(200, 20, 20) == ["red"]
    assert named(30, 60, 200) == ["blue"] and len(named(60, 60, 60)) != 1  # between black and grey
    image = np.full((100, 100, 3), 15, np.uint8)
    image[:, 50:] = 240
    record = ImageRecord(
        "1", "", 100, 100, [thing("1", "cat", 5, 5, 30, 30), thing("2", "cat", 40, 5, 20, 30), thing("3", "person", 5, 50)]
    )
    found = possible_colours(record, lambda: image)
    assert found["1"] == ["black"] and len(found["2"]) > 1 and "3" not in found
    assert np.allclose(rgb_to_lab(np.array([[255, 0, 0]], np.uint8)), [[53.24, 80.09, 67.20]], atol=0.05)  # CIE, D65


def test_crowds_silence_their_category_and_specks_what_depends_on_them() -> None:
    crowd = scene(thing("1", "dog", 5, 5), thing("9", "dog", 0, 60, 90, 30, iscrowd=True), thing("4", "cat", 30, 40))
    assert said("the dog", crowd) == "ambiguous" and said("the two dogs", crowd) == "ambiguous" and said("the cat", crowd) == {"4"}
    speck = scene(thing("1", "dog", 5, 5), thing("2", "dog", 50, 5, 1, 1), thing("3", "dog", 80, 5))
    assert said("all the dogs", speck) == "ambiguous" and said("the three dogs", speck) == "ambiguous"
    assert said("the leftmost dog", speck) == {"1"} and said("the second dog from the left", speck) == "ambiguous"
    assert said("the five dogs", speck) == set()
    small = scene(thing("1", "dog", 5, 5), thing("2", "dog", 50, 5, 2, 2))  # 0.04 % of the picture stays in
    assert said("the dogs", small) == {"1", "2"}


def test_nothing_is_said_of_what_is_not_labelled() -> None:
    cats = scene(thing("1", "cat", 5, 5), labelled=("cat",))
    assert said("the car", cats) == "ambiguous" and said("the cat and the car", cats) == "ambiguous"
    cars = scene(thing("1", "car", 5, 5))
    assert said("the truck", cars) == "ambiguous" and said("the dog", cars) == set()  # vans are filed under both
    vehicles = ("bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat")
    pair = thing("1", "car", 5, 5), thing("2", "bus", 50, 5)
    assert said("the vehicles", scene(*pair, labelled=vehicles)) == {"1", "2"} and said("the vehicles", scene(*pair)) == "ambiguous"
    assert absent_categories(cars, Counter({("car", "dog"): 2, ("car", "person"): 5, ("car", "truck"): 9}))[:2] == ["person", "dog"]


def test_canonical_expressions_denote_their_set() -> None:
    def name(*ids: str) -> str | None:
        return canonical_expression(CATS, ids)

    assert name("1", "2", "3") == "the cats" and name("d") == "the dog" and name("1") == "the leftmost cat"
    assert name("1", "3") == "all the cats except the largest one" or said(str(name("1", "3")), CATS) == {"1", "3"}
    assert name("d", "3") == "the dog and the rightmost cat" and name() is None and name("nobody") is None
    close = scene(thing("1", "cat", 5, 10), thing("2", "cat", 7, 11))
    assert canonical_expression(close, ["1"]) is None and canonical_expression(close, ["1", "2"]) == "the cats"


def test_judgements() -> None:
    assert judge_text("the leftmost cat", CATS, ["1"]) == "exact" and judge_text("the leftmost cat", CATS, ["2"]) == "wrong"
    assert judge_text("the cat", CATS, ["1"]) == "ambiguous" and judge_text("cat cat", CATS, ["1"]) == "unparsable"
    assert judge_text("the bus", CATS, ["1"]) == "wrong"


def drawn(seed: int, of: Scene, num: int = 20) -> list[Statement]:
    pairs = Counter({("cat", "person"): 3, ("cat", "bus"): 2})
    return draw_statements(of, pairs, num=num, shares=Shares(), rng=np.random.default_rng(seed))


def test_drawing_is_seeded_and_true() -> None:
    many = scene(*(thing(str(n), "cat", 9 * n, 5 + 3 * n, 4 + n, 4 + n) for n in range(6)), thing("c", "dog", 5, 80))
    assert drawn(0, many) == drawn(0, many) != drawn(1, many)
    for statement in drawn(0, many):
        assert said(statement.text, many) == set(statement.targets), statement
        if statement.targets:
            assert said(statement.expression, many) == set(statement.targets), statement
        else:
            assert statement.expression == statement.text and statement.group == NONE
    every = [statement for seed in range(10) for statement in drawn(seed, many)]
    assert np.mean([not statement.targets for statement in every]) == pytest.approx(0.2, abs=0.06)
    assert np.mean([len(statement.targets) > 1 for statement in every]) >= 0.4
    assert np.mean([statement.group == WHOLE for statement in every]) <= 0.15
    assert drawn(0, scene()) == [] and len({statement.text for statement in drawn(0, many)}) == len(drawn(0, many))


def test_surplus_goes_so_that_shares_hold() -> None:
    def made(group: str, num_targets: int) -> Statement:
        return Statement("t", "t", tuple(map(str, range(num_targets))), "kind", group)

    image = [made(NONE, 0)] * 4 + [made(WHOLE, 1)] * 4 + [made(ONE, 1)] * 8 + [made(SEVERAL, 2)] * 4
    kept = [said for found in balanced([(str(n), image) for n in range(30)], Shares()) for said in found]
    shares = Counter(said.group for said in kept)
    assert shares[NONE] / len(kept) == pytest.approx(0.2, abs=0.01) and shares[SEVERAL] / len(kept) >= 0.395
    assert shares[WHOLE] / len(kept) <= 0.15 and shares[SEVERAL] == 120 and len(kept) > 250
    assert all(1 < len(found) < 20 for found in balanced([(str(n), image) for n in range(30)], Shares()))


def test_every_wording_is_english_of_its_kind() -> None:
    assert wordings(Phrase(("cat",), 2))[:4] == ["the two cats", "two cats", "both cats", "both of the cats"]
    assert wordings(Phrase(("sheep",), 0))[0] == "all the sheep"  # "the sheep" is one or several
    assert evaluate(Phrase(("cat",), 2), CATS) is None
