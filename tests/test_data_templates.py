"""Templates: English, truth against a second evaluator, and margins."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from grex_mllm.data.coco import image_record, load_instances
from grex_mllm.data.plurals import NUMBERS, number_word, plural_phrase, singular_phrase
from grex_mllm.data.templates import (
    CONFUSABLE,
    Statement,
    absent_categories,
    count_cooccurrence,
    draw_statements,
    false_statements,
    read_scene,
    true_statements,
)
from grex_mllm.ops.masks import segmentation_to_mask
from grex_mllm.types import ImageRecord, Instance

ANIMALS = {"dog": "animal", "cat": "animal", "sheep": "animal"}


def thing(name: str, category: str, x: float, y: float, w: float = 10, h: float = 10, iscrowd: bool = False) -> Instance:
    return Instance(name, category, [x, y, x + w, y + h], [[x, y, x + w, y, x + w, y + h, x, y + h]], iscrowd)


def statements(*instances: Instance) -> dict[str, tuple[str, ...]]:
    record = ImageRecord("1", "a.jpg", 100, 100, list(instances))
    found = true_statements(read_scene(record), ANIMALS)
    assert all(statement.kind == kind and statement.targets for kind, pool in found.items() for statement in pool)
    return {statement.expression: statement.targets for pool in found.values() for statement in pool}


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


def test_a_small_scene_by_hand() -> None:
    said = statements(thing("1", "dog", 5, 10), thing("2", "dog", 40, 12, 20, 20), thing("3", "dog", 80, 14), thing("4", "cat", 30, 70))
    assert said["the cat"] == ("4",) and said["all the dogs"] == ("1", "2", "3") and said["the three dogs"] == ("1", "2", "3")
    assert said["the leftmost dog"] == ("1",) and said["the rightmost dog"] == ("3",) and said["the dog furthest to the left"] == ("1",)
    assert said["the largest dog"] == ("2",) and "the smallest dog" not in said  # two of one size
    assert "the topmost dog" not in said  # 2 px apart
    assert said["all the dogs except the largest one"] == ("1", "3") and said["every dog but the leftmost one"] == ("2", "3")
    assert said["the cat and the rightmost dog" if "the cat and the rightmost dog" in said else "the rightmost dog and the cat"] == (
        "3",
        "4",
    )
    assert said["all the animals except the cat"] == ("1", "2", "3")
    assert "all the animals except the dogs" not in said  # one animal is not "all the animals"
    assert not any("on the left" in text for text in said)  # the middle dog crosses the middle


def test_sides_need_a_clear_half() -> None:
    said = statements(thing("1", "dog", 5, 5), thing("2", "dog", 20, 60), thing("3", "dog", 80, 45))
    assert said["the dogs on the left"] == ("1", "2") and said["the dog on the right"] == ("3",)
    assert said["the two leftmost dogs" if "the two leftmost dogs" in said else "the dogs on the left"] == ("1", "2")
    assert not any("at the top" in text for text in said)  # the third dog is on neither half


def test_crowds_and_specks_silence_their_category() -> None:
    crowd = statements(
        thing("1", "dog", 5, 5), thing("2", "dog", 50, 5), thing("9", "dog", 0, 60, 90, 30, iscrowd=True), thing("4", "cat", 30, 40)
    )
    assert set(crowd) == {"the cat"}
    speck = statements(thing("1", "dog", 5, 5), thing("2", "dog", 50, 5, 2, 2), thing("4", "cat", 30, 40))
    assert set(speck) == {"the cat"}


def test_false_statements_are_false_and_deceptive() -> None:
    records = [ImageRecord(str(n), "", 100, 100, [thing("1", "dog", 5, 5), thing("2", "sofa", 50, 5)]) for n in range(3)]
    records.append(ImageRecord("8", "", 100, 100, [thing("1", "cat", 5, 5), thing("2", "dog", 50, 5)]))
    records.append(ImageRecord("9", "", 100, 100, [thing("1", "boat", 5, 5), thing("2", "plane", 50, 5)]))
    cooccurrence = count_cooccurrence(records)
    assert cooccurrence[("dog", "sofa")] == cooccurrence[("sofa", "dog")] == 3
    scene = read_scene(ImageRecord("x", "", 100, 100, [thing("1", "dog", 5, 5), thing("2", "dog", 50, 5)]))
    assert absent_categories(scene, cooccurrence) == ["sofa"]  # a cat could be taken for the dog; boats never come with dogs
    pool = false_statements(scene, cooccurrence)
    assert {s.expression for s in pool["wrong_count"]} == {"the three dogs", "the four dogs", "the five dogs"}
    assert all(not s.targets and "sofa" in s.expression for s in pool["absent_category"])
    assert any({"dog", "cat"} <= group for group in CONFUSABLE)


def test_drawing_is_seeded_balanced_and_without_repeats() -> None:
    record = ImageRecord(
        "1", "", 100, 100, [thing(str(n), "dog", 9 * n, 5 + 3 * n, 4 + n, 4 + n) for n in range(6)] + [thing("c", "cat", 5, 80)]
    )
    scene, pairs = read_scene(record), Counter({("dog", "sofa"): 3, ("dog", "bed"): 2})
    runs = [draw_statements(scene, pairs, ANIMALS, num=20, no_target_share=0.4, rng=np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert len({s.expression for s in runs[0]}) == len(runs[0])
    many = [
        s for seed in range(60) for s in draw_statements(scene, pairs, ANIMALS, num=5, no_target_share=0.4, rng=np.random.default_rng(seed))
    ]
    assert np.mean([not s.targets for s in many]) == pytest.approx(0.4, abs=0.07)
    assert (
        draw_statements(
            read_scene(ImageRecord("2", "", 9, 9, [])), pairs, ANIMALS, num=5, no_target_share=0.4, rng=np.random.default_rng(0)
        )
        == []
    )


WORDS = {"leftmost": (0, 1), "rightmost": (0, -1), "topmost": (1, 1), "bottommost": (1, -1)}


def second_opinion(statement: Statement, record: ImageRecord) -> set[str] | None:
    """Evaluate a statement from its words alone (None: a form that this evaluator does not know)."""
    nouns = {}
    for category in {instance.category for instance in record.instances}:
        nouns[singular_phrase(category)] = nouns[plural_phrase(category)] = [i for i in record.instances if i.category == category]
    text = statement.expression
    if (match := re.fullmatch(r"(?:all the|the|every) (.+)", text)) and match[1] in nouns:
        return {i.annotation_id for i in nouns[match[1]]}
    if (match := re.fullmatch(rf"the ({'|'.join(NUMBERS)}) (.+)", text)) and match[2] in nouns:
        group = nouns[match[2]]
        return {i.annotation_id for i in group} if len(group) == NUMBERS.index(match[1]) else set()
    if (match := re.fullmatch(r"the (\w+most) (.+)", text)) and match[2] in nouns:
        axis, sign = WORDS[match[1]]
        return {min(nouns[match[2]], key=lambda i: sign * (i.box_xyxy[axis] + i.box_xyxy[axis + 2])).annotation_id}
    if (match := re.fullmatch(r"the (largest|smallest) (.+)", text)) and match[2] in nouns:
        chosen = {"largest": max, "smallest": min}[match[1]](
            nouns[match[2]], key=lambda i: segmentation_to_mask(i.segmentation, record.height, record.width).sum()
        )
        return {chosen.annotation_id}
    if (match := re.fullmatch(r"all the (.+) except the (.+) one", text)) and match[1] in nouns:
        (left_out,) = second_opinion(Statement(f"the {match[2]} {match[1]}", (), ""), record) or {""}
        return {i.annotation_id for i in nouns[match[1]]} - {left_out}
    if match := re.fullmatch(r"the (.+) and (the .+)", text):
        parts = [second_opinion(Statement(part, (), ""), record) for part in (f"the {match[1]}", match[2])]
        return None if None in parts else set().union(*(part for part in parts if part is not None))
    return None


def test_truth_on_real_photographs_by_a_second_evaluator(shared: Path) -> None:
    instances = load_instances(shared / "data" / "photos" / "instances.json")
    seen: Counter[str] = Counter()
    for image_id in list(instances.images)[:30]:
        record = image_record(instances, image_id, Counter())
        for kind, pool in true_statements(read_scene(record), instances.supercategories).items():
            for statement in pool[:20]:
                opinion = second_opinion(statement, record)
                if opinion is not None:
                    assert opinion == set(statement.targets), (image_id, statement)
                    seen[kind] += 1
    assert all(seen[kind] > 10 for kind in ("category", "count", "position", "size", "exclusion", "conjunction")), seen
