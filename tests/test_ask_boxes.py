"""Boxes for `grex describe`: any text in another form is answered with what was given, what is expected and what to do."""

from __future__ import annotations

import pytest

from grex_mllm.ask import parse_boxes
from grex_mllm.cli import main
from grex_mllm.errors import GrexError

WRONG = {
    "[[1,2,3": "not a list of lists",
    "[[1,2,3,4]": "closed brackets",
    "1,2,3,4": "not a list of lists",
    "(1,2,3,4)": "not a list of lists",
    "[[NaN,2,3,4]]": "finite",
    "[[1,2,Infinity,4]]": "finite",
    "[[1,2,1e999,4]]": "finite",
    "[[1,2,3,0x10]]": "not a list of lists",
    "[1,2,3,4]": "also a single one",
    "[[1,2,3]]": "box 0 has 3 entries",
    "[[1,2,3,4],[1,2,3,4,5]]": "box 1 has 5 entries",
    "[[1,2,3,4],7]": "box 1 is no list",
    '[["1","2","3","4"]]': "without quotes",
    "[[true,2,3,4]]": "no finite number",
    "[[1,2,3,null]]": "no finite number",
    "[[[1,2,3,4]]]": "box 0 has 1 entries",
    "[[5,2,3,4]]": "box 0 has no area",
    "[[1,2,3,4],[1,4,3,4]]": "box 1 has no area",
    "[]": "no box",
    "{}": "no box",
    '{"box": [1,2,3,4]}': "no box",
    "": "not a list of lists",
    "null": "no box",
    "[" * 100_000: "...",
}


def test_boxes_in_the_expected_form() -> None:
    assert parse_boxes("[[1,2,3,4]]") == [[1.0, 2.0, 3.0, 4.0]]
    assert parse_boxes(" [ [0.5, 2, 3.25, 4], [1,1,2,2] ]\n") == [[0.5, 2.0, 3.25, 4.0], [1.0, 1.0, 2.0, 2.0]]


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:30] or "empty")
def test_boxes_in_another_form(text: str) -> None:
    with pytest.raises(GrexError) as caught:
        parse_boxes(text)
    given, expected, remedy = str(caught.value).split("; ", 2)
    assert text[:60] in given and "[[x1,y1,x2,y2], ...]" in expected and remedy
    assert WRONG[text] in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["[[1,2,3", "[1,2,3,4]", "[[1,2,3]]", '[["a",2,3,4]]', "[[NaN,2,3,4]]", "[[9,2,3,4]]", "null", "", "x: y"])
def test_the_command_line_says_so_in_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before a model or an image is looked for, and without a word of the parser."""
    assert main(["describe", "--model", "nowhere", "--image", "nowhere.png", "--boxes", text]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert said.err.startswith(f"grex describe: --boxes {text!r}") and "[[x1,y1,x2,y2], ...]" in said.err
    assert not [word for word in ("Parser", "yaml", "JSON", "Expecting", "char ", "column") if word in said.err]
