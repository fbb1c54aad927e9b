"""Prompt files: every shipped one fits its families, and a wrong one is refused with a reason."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from grex_mllm.errors import GrexError
from grex_mllm.shipped import PROMPT_FOLDER
from grex_mllm.zeroshot.families import FAMILIES, find_family
from grex_mllm.zeroshot.prompts import MARKINGS, SCHEMAS, TASKS, find_prompt, load_prompt, prompt_names

SHIPPED = sorted(path for path in PROMPT_FOLDER.rglob("*.yaml") if path.parent.name != "generator")  # test_instructions
WORDS = {"expression": "the men in red", "objects": "[1, 2, 3, 4]", "numbers": "1 and 2", "colours": "red", "count": 2}
GOOD = """# mine
task: grec
family: any
track: uniform
version: 1
max_tokens: 100
frame: family
order: family
answer: family
user: 'Where is {expression}? {format}'
"""


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_prompt_of_a_family_renders(task: str, name: str) -> None:
    family = find_family(name)
    view = family.view(640, 427)
    names = prompt_names(task, family)
    assert len(names) >= 3
    for one in names:
        prompt = find_prompt(task, family, one)
        assert prompt.task == task and prompt.family == name and prompt.name == one
        assert prompt.sha256 == hashlib.sha256((PROMPT_FOLDER / task / f"{one}.yaml").read_bytes()).hexdigest()
        system, user = prompt.render(view, **WORDS)
        assert system is None and not re.search(r"\{[a-z_]+\}", user)
        assert WORDS["expression"] in user if task != "greg" else prompt.marking and set(prompt.marking.split("+")) <= set(MARKINGS)
        assert (prompt.answer in family.formats or prompt.track == "native") if task in ("grec", "gres") else prompt.answer == ""
    first = find_prompt(task, family)
    assert first.name == (names[0] if names[0].startswith("native") else "uniform")


def test_every_shipped_file_serves_a_family_and_lies_in_its_folder() -> None:
    used = {(task, name) for task in TASKS for family in FAMILIES for name in prompt_names(task, family)}
    assert {(file.parent.name, file.stem) for file in SHIPPED} == used and len(SHIPPED) > 40


@pytest.mark.parametrize("task", TASKS)
def test_there_are_several_styles_for_everyone(task: str) -> None:
    assert len(prompt_names(task, "generic", "uniform")) >= 3 and prompt_names(task, "generic", "native") == []


def test_what_the_family_decides_is_filled_in() -> None:
    gemini, qwen = find_prompt("grec", "gemini", "uniform"), find_prompt("grec", "Qwen/Qwen2.5-VL-7B-Instruct", "uniform")
    assert (gemini.frame, gemini.order, gemini.answer, gemini.empty_answer) == ("k1000", "yxyx", "boxes", "unparsable")
    assert (qwen.frame, qwen.order) == ("px_sent", "xyxy") and "[y_min, x_min, y_max, x_max]" in gemini.user
    molmo = find_prompt("gres", "molmo", "uniform")
    assert (molmo.frame, molmo.answer) == ("pct", "points") and "There are none." in molmo.user
    assert find_prompt("grec", "paligemma").empty_answer == "no_target"
    _, user = qwen.render(find_family("qwen2.5-vl").view(640, 480), expression="x")
    assert "644 wide and 476 high" in user


def test_what_is_filled_in_is_not_read_as_a_place() -> None:
    prompt = find_prompt("grec", "generic", "uniform")
    _, user = prompt.render(find_family("generic").view(640, 480), expression="the {width} {objects} sign")
    assert '"the {width} {objects} sign"' in user


def test_a_place_without_a_value_is_an_error() -> None:
    with pytest.raises(GrexError, match=r"without a value for \{objects\}"):
        find_prompt("greg", "generic", "uniform_coordinates").render(find_family("generic").view(640, 480), count=2)


def test_a_schema_stands_for_each_kind_of_answer() -> None:
    schema = find_prompt("grec", "gpt").schema
    assert schema is not None and schema["required"] == ["boxes"]
    assert schema["properties"]["boxes"]["items"]["properties"] == SCHEMAS["boxes"] and find_prompt("greg", "gpt").schema is None


def test_a_file_of_the_user(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD + "system: Be brief.\nsampling: {temperature: 0.7, top_p: 0.8}\nempty_answer: no_target\n", encoding="utf-8")
    prompt = find_prompt("grec", "generic", str(file))
    assert prompt.name == "mine" and prompt.sampling.temperature == 0.7 and prompt.sampling.top_p == 0.8
    assert prompt.empty_answer == "no_target" and prompt.max_tokens == 100
    system, user = prompt.render(find_family("generic").view(640, 480), expression="it")
    assert system == "Be brief." and user.startswith("Where is it? Write a JSON list")
    file.write_text(GOOD.replace("answer: family", "answer: polygons"), encoding="utf-8")
    with pytest.raises(GrexError, match="polygons asked of llava; expected one of boxes"):
        find_prompt("grec", "llava", str(file))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("task: grec", "task: greq", 'task "greq"; expected one of .*did you mean "gre'),
        ("track: uniform", "track: other", 'track "other"'),
        ("family: any", "family: qwen2.5-vl", 'family "qwen2.5-vl"; expected one of any'),
        ("version: 1", "version: one", "version is 'one'; expected a whole number"),
        ("version: 1", "version: 0", "version is 0; expected a whole number"),
        ("max_tokens: 100", "max_token: 100", "without max_tokens"),
        ("max_tokens: 100", "max_tokens: 100\nmax_tokns: 3", 'key "max_tokns".*did you mean "max_tokens"'),
        ("frame: family", "frame: k100", 'frame "k100"'),
        ("order: family", "order: yx", 'order "yx"'),
        ("answer: family", "answer: voxels", 'answer "voxels"'),
        ("{expression}", "{expresion}", 'place "expresion".*did you mean "expression"'),
        ("user:", "sampling: {temperature: 3}\nuser:", "temperature is 3"),
        ("user:", "sampling: {temprature: 0}\nuser:", 'sampling "temprature"'),
        ("user:", "sampling: warm\nuser:", "sampling is 'warm'"),
        ("user:", "marking: numbers\nuser:", 'marking "numbers"; expected none'),
        ("user:", "empty_answer: nothing\nuser:", 'empty_answer "nothing"'),
        ("user: 'Where is {expression}? {format}'", "user: ''", "user is ''"),
        (GOOD, "# nothing\n- 1\n", "without task"),
        (GOOD, "task: [\n", "is not YAML"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, old: str, new: str, told: str) -> None:
    file = tmp_path / "mine.yaml"
    assert old in GOOD
    file.write_text(GOOD.replace(old, new), encoding="utf-8")
    with pytest.raises(GrexError, match=told):
        load_prompt(file, find_family("generic"))


def test_a_wrong_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GrexError, match=r'prompt "unifrom" for grec.*did you mean "uniform"'):
        find_prompt("grec", "generic", "unifrom")
    with pytest.raises(GrexError, match="does not exist"):
        find_prompt("grec", "generic", str(tmp_path / "none.yaml"))
    with pytest.raises(GrexError, match='task "rec"'):
        find_prompt("rec", "generic")
    with pytest.raises(GrexError, match="of the task count; expected one for grec"):
        find_prompt("grec", "generic", "eval/prompts/count/uniform.yaml")
    with pytest.raises(GrexError, match=r"native_gpt\.yaml of the family gpt; expected gemini"):
        find_prompt("grec", "gemini", "eval/prompts/grec/native_gpt.yaml")
    for name in ("../grec/uniform", "../../protocols/grec.yaml"):
        with pytest.raises(GrexError):
            find_prompt("grec", "generic", name)
