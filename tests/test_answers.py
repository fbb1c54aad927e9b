"""Answers of multimodal models and what they mean: a table in the styles of real ones, and thousands of mutated ones."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from grex_mllm.zeroshot.base import RawAnswer
from grex_mllm.zeroshot.families import find_family
from grex_mllm.zeroshot.parsing import Parsed, parse_count, parse_expression, parse_grounding, parse_yes_no
from grex_mllm.zeroshot.parsing.grounding import FLAGS

TABLE = Path(__file__).parent / "data" / "answers.yaml"
WIDTH, HEIGHT = 640, 480
ANSWERS: list[dict[str, Any]] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))


def parsed(case: dict[str, Any], text: str | None) -> Parsed:
    family = find_family(case["family"])
    raw = RawAnswer(text, case.get("finish", "stop"), refusal=case.get("refusal"), error=case.get("error"))
    answer, view = case.get("answer", "boxes"), family.view(WIDTH, HEIGHT)
    return parse_grounding(raw, frame=family.frame, order=family.order, answer=answer, empty_answer=family.empty_answer, view=view)


def check(case: dict[str, Any]) -> None:
    found, expected = parsed(case, case["text"]), case["expect"]
    if isinstance(expected, str):
        assert ("no_target" if found.no_target else found.status) == expected, found
        assert (found.reason == "") == (found.status == "ok")
        assert len(found.boxes_xyxy) + len(found.points) + len(found.polygons) == 0
    else:
        answer = case.get("answer", "boxes")
        got = {"boxes": found.boxes_xyxy, "points": found.points, "polygons": found.polygons}[answer]
        assert found.status == "ok" and not found.no_target and len(got) == len(expected), found
        for one, wanted in zip(got, expected):
            np.testing.assert_allclose(one, wanted, atol=0.06)
    assert set(case.get("flags", ())) <= set(found.flags) <= set(FLAGS)


@pytest.mark.parametrize("number", range(len(ANSWERS)))
def test_answer_of_the_table(number: int) -> None:
    check(ANSWERS[number])


def test_the_table_is_large_and_varied() -> None:
    assert len(ANSWERS) >= 400 and len({case["family"] for case in ANSWERS}) >= 14
    expected = [case["expect"] if isinstance(case["expect"], str) else "objects" for case in ANSWERS]
    assert min(expected.count(kind) for kind in ("objects", "no_target", "unparsable", "refused")) >= 25


PIECES = [
    *"[]{}()<>\"'`,;:=%.-+\\/\n\t ",
    "```json\n",
    "</think>",
    "<think>",
    "null",
    "NaN",
    "1e400",
    "9" * 400,
    "٣",
    "【",
    "”",
    "</box>",
    "\x00",
    "\ud800",
    "😀",
    '\\"',
]


def mutated(rng: random.Random, text: str, other: str) -> str:
    """One to four random faults: a cut, swapped, doubled or reversed piece, a sign put in, two answers mixed."""
    for _ in range(rng.randint(1, 4)):
        a, b = sorted(rng.randint(0, len(text)) for _ in range(2))
        kind = rng.randrange(8)
        if kind == 0:
            text = text[:a]
        elif kind == 1:
            text = text[:a] + text[b:]
        elif kind == 2:
            text = text[:b] + text[a:b] * rng.randint(1, 3) + text[b:]
        elif kind == 3:
            text = text[b:] + text[:a]
        elif kind == 4:
            text = text[:a] + text[a:b][::-1] + text[b:]
        elif kind == 5:
            text = text[:a] + other + text[a:]
        else:
            text = text[:a] + rng.choice(PIECES) * rng.randint(1, 3) + text[a:]
    return text[:5000]


def mutate(count: int, seed: int) -> Iterator[tuple[dict[str, Any], str]]:
    rng = random.Random(seed)
    texts = [case for case in ANSWERS if case["text"]]
    for _ in range(count):
        case, other = rng.choice(texts), rng.choice(texts)
        kind = rng.choice(("boxes", "boxes", "points", "polygons", "masks"))
        changed = {**case, "family": rng.choice((case, other))["family"], "answer": kind}
        yield {**changed, "finish": rng.choice(("stop", "stop", "length"))}, mutated(rng, case["text"], other["text"])


def must_hold(case: dict[str, Any], text: str) -> None:
    found = parsed(case, text)
    assert found.status in ("ok", "unparsable", "refused", "error") and (found.status == "ok") == (found.reason == "")
    assert set(found.flags) <= set(FLAGS) and len(set(found.flags)) == len(found.flags)
    boxes, objects = found.boxes_xyxy, len(found.boxes_xyxy) + len(found.points) + len(found.polygons)
    assert (objects > 0) == (found.status == "ok" and not found.no_target)
    assert boxes.shape[1:] == (4,) and found.points.shape[1:] == (2,) and max(len(boxes), len(found.points), len(found.polygons)) <= 100
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    for places in (boxes.reshape(-1, 2), found.points, *found.polygons):
        assert np.isfinite(places).all() and (places >= 0).all() and (places <= (WIDTH, HEIGHT)).all()
    raw = RawAnswer(text, case["finish"])
    told, count = parse_expression(raw), parse_count(raw)
    assert told.status in ("ok", "unparsable", "refused") and (told.status == "ok") == bool(told.text) and "\n" not in told.text
    assert count.status in ("ok", "unparsable", "refused") and 0 <= count.count <= 10_000
    assert parse_yes_no(raw) in (True, False, None)


def test_mutated_answers_never_crash() -> None:
    for case, text in mutate(5000, 0):
        must_hold(case, text)


@pytest.mark.long
def test_a_hundred_thousand_mutated_answers_never_crash() -> None:
    for case, text in mutate(100_000, 1):
        must_hold(case, text)


LENGTH = 1_000_000
HUGE = ["[", "[{", '"', "\\", "<box>", "[1,2,3,4] ", '{"bbox": [1,2,30,40]},', "I cannot ", "there is ", "1, 2, 3, 4\n"]
MORE = [
    *(
        "(",
        "{",
        "]",
        "'",
        "`",
        "<",
        " ",
        "9",
        "-",
        "[[",
        '{"a":',
        "(1,",
        '\\"',
        "“",
        "*",
        "_",
        "a",
        "。",
        "<loc_1>",
        "<patch_index_0001>",
        "<think>",
    ),
    *(
        "<point ",
        "[1,2] ",
        "x1: 1, ",
        "| 1 ",
        "``` ",
        "no ",
        "not ",
        "a: ",
        "'a",
        "the image ",
        "[1,",
        "1 ",
        "there is no dog, ",
        "Person: ",
    ),
    *(
        "i can't provide the ",
        "<answer>",
        "</think>",
        "0,1; ",
        "x_",
        "//",
        "/*",
        "e.g. ",
        "<xmin>1",
        "1.5e",
        "图中",
        "kein ",
        "data:image/png;base64,A",
    ),
]


@pytest.mark.parametrize("piece", [*HUGE, *(pytest.param(piece, marks=pytest.mark.long) for piece in MORE)])
def test_a_megabyte_takes_seconds_at_most(piece: str) -> None:
    """Processor time, so that other work on the machine does not count; each kind of repetition that could make a search quadratic."""
    raw = RawAnswer(piece * (LENGTH // len(piece)), "length")
    family = find_family("generic")
    for parse in (
        lambda: parse_grounding(raw, frame=family.frame, order=family.order, view=family.view(WIDTH, HEIGHT)),
        lambda: parse_expression(raw),
        lambda: parse_count(raw),
        lambda: parse_yes_no(raw),
    ):
        start = time.process_time()
        parse()
        assert time.process_time() - start < 4.0, "about half a second where nothing is quadratic; minutes where something is"
