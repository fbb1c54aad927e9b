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

from grex_mllm.zeroshot.base import RawAnswer, View
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
