"""Words and meanings of templates: every wording is read back as what it says, also of a picture that is flipped."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grex_mllm.data.coco import image_record, load_instances
from grex_mllm.data.templates import evaluate, mirrored_text, read_scene, wordings
from grex_mllm.data.templates.drawing import statements
from grex_mllm.data.templates.judge import denoted
from grex_mllm.data.templates.meaning import (
    CORNERS,
    DIRECTIONS,
    PICKS,
    RELATIONS,
    SIDES,
    Except,
    Meaning,
    Phrase,
    Pick,
    Relation,
    Union,
    Where,
)
from grex_mllm.data.templates.naming import Names
from grex_mllm.data.templates.parsing import parse
from grex_mllm.data.templates.scene import Scene, Thing

CATEGORIES = ("person", "cat", "car", "sheep", "wine glass")
SOURCES = ("people", "traffic", "streets", "cats")


def phrases() -> st.SearchStrategy[Phrase]:
    anchors = st.sampled_from(
        [Phrase(("car",)), Phrase(("cat",), pick=Pick("largest")), Phrase(("person",), 1, conditions=(Where("left"),))]
    )
    places = st.builds(Where, st.sampled_from((*SIDES, *CORNERS)), st.booleans(), st.booleans())
    picks = st.one_of(
        st.builds(Pick, st.sampled_from(PICKS)),
        st.builds(Pick, st.sampled_from(DIRECTIONS), st.integers(2, 9)),
        st.builds(lambda anchor: Pick("nearest", anchor=anchor), anchors),
    )
    conditions = st.one_of(st.builds(Relation, st.sampled_from(RELATIONS), anchors), places)

    def made(category: str, number: int, colour: str, condition: Where | Relation | None, pick: Pick | None) -> Phrase:
        if pick is not None:
            number, condition = 1 if pick.rank else max(number, 1), None
        return Phrase((category,), number, colour, False, () if condition is None else (condition,), pick)

    colours = st.sampled_from(("", "", "black", "grey"))
    return st.builds(made, st.sampled_from(CATEGORIES), st.integers(0, 4), colours, st.none() | conditions, st.none() | picks)


def meanings() -> st.SearchStrategy[Meaning]:
    excepted = phrases().map(lambda minus: Except(Phrase(minus.categories, 0), minus))
    return st.one_of(phrases(), excepted, st.lists(phrases(), min_size=2, max_size=3).map(lambda parts: Union(tuple(parts))))


@settings(max_examples=150, deadline=None)
@given(meanings())
def test_every_wording_is_read_back(meaning: Meaning) -> None:
    texts = wordings(meaning)
    assert texts and all(text == text.strip() and "  " not in text for text in texts)
    for text in texts:
        assert _folded(meaning) in [_folded(reading) for reading in parse(text, CATEGORIES)], text


def _folded(meaning: Meaning) -> object:
    """Return a form in which "every" and "all the" are one, as are "top left" and "top" with "left"."""
    if isinstance(meaning, Union):
        return tuple(map(_folded, meaning.parts))
    return (_folded(meaning.base), _folded(meaning.minus)) if isinstance(meaning, Except) else meaning


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("The TWO cats, on the left side.", "2 cats on the left side"),
        ("there are two cats on the right", "the two cats on the right"),
        ("the left-most cat", "the leftmost cat"),
        ("the cat that is on the left", "cat on the left"),
        ("the left hand cat", "the left cat"),
        ("the gray cat", "the grey cat"),
        ("all of the cats", "every cat"),
        ("persons", "people"),
    ],
)
def test_ways_of_writing_that_do_not_matter(one: str, other: str) -> None:
    one = one.replace(",", "")
    assert parse(one, CATEGORIES) == parse(other, CATEGORIES) != []


def real_scenes(shared: Path, most: int) -> Iterable[Scene]:
    for source in SOURCES:
        instances = load_instances(shared / "data" / "more_photos" / source / "instances.json.gz")
        for image_id in list(instances.images)[:most]:
            yield read_scene(image_record(instances, image_id, Counter()), instances.categories.values())


def mirrored(scene: Scene) -> Scene:
    things = tuple(
        Thing(
            thing.annotation_id,
            thing.category,
            (1 - thing.high[0], thing.low[1]),
            (1 - thing.low[0], thing.high[1]),
            thing.area,
            (1 - thing.centroid[0], thing.centroid[1]),
            thing.colours,
        )
        for thing in scene.things
    )
    return Scene(things, scene.blocked, scene.labelled, scene.present, scene.aspect)


def test_what_is_said_of_photographs_is_read_back_and_keeps_its_meaning_in_the_mirror(shared: Path) -> None:
    kinds: Counter[str] = Counter()
    for scene in real_scenes(shared, 4):
        rng = np.random.default_rng(0)
        names, flipped = Names(scene), mirrored(scene)
        categories = tuple(sorted(scene.labelled or ()))
        found = list(statements(names, Counter(), rng))
        for place in rng.permutation(len(found))[:25]:
            _, kind, meaning, ids = found[int(place)]
            kinds[kind] += 1
            said = wordings(meaning)
            for text in {said[0], said[int(rng.integers(len(said)))]}:
                assert denoted(text, scene, categories) in (ids, "ambiguous"), text
                turned = mirrored_text(text)
                assert turned is not None and denoted(turned, flipped, categories) == denoted(text, scene, categories), text
            named = names.name(ids)
            assert named is None or evaluate(named, scene) == ids
    assert all(kinds[kind] for kind in ("side", "position", "conjunction", "exclusion", "wrong_count", "wrong_place")), kinds


def test_most_sets_of_photographs_have_a_name(shared: Path) -> None:
    asked = named = 0
    for scene in real_scenes(shared, 3):
        names = Names(scene)
        for ids in {ids for _, _, ids in names.known if ids}:
            asked, named = asked + 1, named + (names.name(ids) is not None)
    assert named == asked > 50


def test_judging_is_fast(shared: Path) -> None:
    scene = max(real_scenes(shared, 4), key=lambda scene: len(scene.things))
    texts = ["the two people on the left", "all the people except the leftmost one", "the person in front of the car on the right"]
    spent = []
    for text in texts * 5:
        start = time.process_time()
        denoted(text, scene, CATEGORIES)
        spent.append(time.process_time() - start)
    assert sorted(spent)[len(spent) // 2] < 0.005  # 0.2 ms on an idle core


def test_hostile_texts_are_read_quickly() -> None:
    start = time.process_time()
    for text in ("the cat and " * 400, "the cat left of " * 400, "all but " * 400, "(((" * 300, "\x00 \ud800 ñ the", "the " * 1000 + "cat"):
        parse(text, CATEGORIES)
    parse("the cat to the left of the cat to the left of the cat to the left of the cat to the left of the cat on the left", CATEGORIES)
    parse(" and ".join(["the cat on the left except the cat"] * 7), CATEGORIES)
    assert time.process_time() - start < 5
