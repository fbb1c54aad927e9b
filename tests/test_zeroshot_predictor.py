"""Models that are asked, through `grex predict`: settings, examples, previews, errors that are asked again, raw answers read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, Reply, completion, failure, last_text
from score_case import make_dataset, read_lines

from grex_mllm.cli import main

QUICK = ["--server.tries=1", "--server.backoff_s=0.01", "--server.concurrency=1"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "d")


def predict(data: Path, out: str, url: str, *more: str, model: str = "openai:Qwen3-VL-4B") -> int:
    words = ["--model", model, "--data", str(data), "--split", "val", "--out", str(data.parent / out)]
    return main(["predict", *words, *(["--base-url", url] if url else []), *QUICK, *more])


def box_or_phrase(body: dict[str, Any]) -> Reply:
    return completion('[{"bbox_2d": [30, 330, 280, 660]}]' if "phrase" not in last_text(body) else "The squares.")


def test_examples_of_each_task_are_answered_as_its_own_task(data: Path) -> None:
    """Both prompts are called `uniform`: the examples of one must not stand before the question of the other."""
    with FakeServer(box_or_phrase) as server:
        assert predict(data, "x.jsonl", server.url, "--ask.shots=1", "--ask.prompt=uniform", "--ask.describe=uniform") == 0
    said: dict[bool, set[str]] = {True: set(), False: set()}
    for body in server.seen:
        shown = [turn["content"] for turn in body["messages"] if turn["role"] == "assistant"]
        assert len(shown) == 1
        text = shown[0] if isinstance(shown[0], str) else "".join(part["text"] for part in shown[0])
        said["phrase" in last_text(body)].add(text)
    assert said[True] == {"x"} and len(said[False]) == 1 and "bbox_2d" in said[False].pop()
    lines = read_lines(data.parent / "x.jsonl")
    assert all(line["by"] == "Qwen3-VL-4B, grec/uniform+greg/uniform+box+1-shot" for line in lines)
    assert all({"cached", "seconds", "cost"}.isdisjoint(raw) for line in lines for raw in line["raw"])


def test_an_interrupted_run_asks_errors_again_and_nothing_else(data: Path) -> None:
    """Sick for one expression of each image, and stopped by a budget; then it goes on with a healthy server."""
    file = data / "expressions.jsonl"
    lines = [json.loads(line) | {"raw": f"{json.loads(line)['expression']} {n}"} for n, line in enumerate(file.read_text().splitlines())]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sick = {"now": True}

    def script(body: dict[str, Any]) -> Reply:
        text = last_text(body)
        if sick["now"] and "the 1 squares" in text:
            return failure(500, "sick")
        return completion("I like squares" if "the 2 squares" in text else "[]")

    with FakeServer(script) as server:
        only = ["--tasks", "ground"]
        assert predict(data, "x.jsonl", server.url, *only, "--server.budget_calls=14") == 2
        part = [json.loads(line) for line in (data.parent / "x.jsonl.part").read_text().splitlines()[1:]]
        failed = {line["key"] for line in part if line["line"]["status"] == "error"}
        assert 10 <= len(part) <= 14 and 2 <= len(failed) <= 4 and all("-1" in key for key in failed)
        asked, sick["now"] = len(server.seen), False
        assert predict(data, "x.jsonl", server.url, *only) == 0
        assert len(server.seen) - asked == 20 - len(part) + len(failed)
    done = read_lines(data.parent / "x.jsonl")
    assert len({line["expression_id"] for line in done}) == len(done) == 20
    assert [line["status"] for line in done] == ["ok", "ok", "unparsable", "ok"] * 5


def test_a_dry_run_shows_the_request_and_sends_nothing(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-secret-secret")
    with FakeServer(box_or_phrase) as server:
        prices = ["--server.price_in=10", "--server.price_out=20", "--ask.reject=twice"]
        assert predict(data, "x.jsonl", server.url, "--dry-run", *prices) == 0
        assert server.seen == []
    shown = capsys.readouterr().out
    told = json.loads(shown)
    assert "sk-secret" not in shown and sorted(path.name for path in data.parent.iterdir()) == ["d"]
    ground, generate = told["tasks"]["ground"], told["tasks"]["generate"]
    assert ground["questions"] == 20 and ground["calls"] == {"at_least": 20, "at_most": 40} and generate["calls"]["at_most"] == 15
    assert ground["first_request"]["body"]["model"] == "Qwen3-VL-4B" and ground["first_round"]["cost_at_most"] > 0
    assert ground["first_request"]["url"] == f"{server.url}/chat/completions"


def test_raw_answers_are_read_again_without_asking(data: Path) -> None:
    with FakeServer(box_or_phrase) as server:
        assert predict(data, "x.jsonl", server.url, "--ask.reject=consistency:3@0.5") == 0
    asked = ["--ask.family=qwen3-vl", "--ask.reject=consistency:3@0.5"]
    assert predict(data, "y.jsonl", "", *asked, model=f"reparse:{data.parent / 'x.jsonl'}") == 0
    assert (data.parent / "y.jsonl").read_bytes() == (data.parent / "x.jsonl").read_bytes()
    assert predict(data, "z.jsonl", "", "--ask.family=qwen3-vl", "--ask.masks=none", model=f"reparse:{data.parent / 'x.jsonl'}") == 0
    assert not any("mask_rle" in line for line in read_lines(data.parent / "z.jsonl"))
    other = ["--ask.family=qwen3-vl", "--ask.reject=twice", "--tasks=ground"]  # a question that was not asked then
    assert predict(data, "w.jsonl", "", *other, model=f"reparse:{data.parent / 'x.jsonl'}") == 0
    assert all(line["status"] == "error" and "has no answer" in line["reason"] for line in read_lines(data.parent / "w.jsonl"))


def test_expressions_are_chosen_by_the_models_own_grounding(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ask.rerank=own_grounding:2@1", "--tasks=generate"]
    with FakeServer(box_or_phrase) as server:
        assert predict(data, "x.jsonl", server.url, "--dry-run", *flags) == 0
        told = json.loads(capsys.readouterr().out)["tasks"]["generate"]
        assert (told["calls"]["at_least"], told["calls"]["at_most"]) == (4 * told["questions"], 6 * told["questions"])
        assert predict(data, "x.jsonl", server.url, *flags) == 0
    lines = read_lines(data.parent / "x.jsonl")
    assert len(lines) == told["questions"] and all("+own_grounding:2@1" in line["by"] for line in lines)
    answered = [line for line in lines if line["status"] == "ok"]
    assert answered and all(
        line["candidates"][0] == line["expression"] and len(line["scores"]) == len(line["candidates"]) for line in answered
    )
    assert {raw["step"] for line in answered for raw in line["raw"]} == {"describe", "candidates", "locate"}
    assert predict(data, "y.jsonl", "", "--ask.family=qwen3-vl", *flags, model=f"reparse:{data.parent / 'x.jsonl'}") == 0
    assert (data.parent / "y.jsonl").read_bytes() == (data.parent / "x.jsonl").read_bytes()
    assert main(["score", str(data.parent / "x.jsonl"), "--data", str(data), "--split", "val", "--out", str(data.parent / "s.json")]) == 0
    assert "unknown" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ask.prompts=x"], 'unknown key "ask.prompts"'),
        (["--ask.prompt=unifrom"], 'did you mean "uniform"?'),
        (["--ask.task=rec"], 'ask.task "rec"'),
        (["--ask.masks=sam"], 'segmenter "sam"'),
        (["--ask.reject=thrice"], 'rejection "thrice"'),
        (["--ask.family=qwen"], 'family "qwen"'),
        (["--ask.shots=-1"], "0 or more examples"),
        (["--server.tries=0"], "tries 0"),
        (["--model.decoder.width=3"], "--model.decoder.width with"),
        (["--listener", "3"], "--listener with"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(data: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(data, "x.jsonl", "http://127.0.0.1:9/v1", *words) == 2
    assert message in capsys.readouterr().err


def test_who_is_asked_must_be_said(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(data, "x.jsonl", "") == 2 and "without --base-url" in capsys.readouterr().err
    assert predict(data, "x.jsonl", "http://127.0.0.1:9/v1", model="openai:mystery") == 2 and "name the family" in capsys.readouterr().err
    assert predict(data, "x.jsonl", "http://127.0.0.1:9/v1", model="qwen3-vl:nowhere") == 2 and "behind a server" in capsys.readouterr().err
    assert predict(data, "x.jsonl", "", model="qwen3-vl:nowhere") == 2 and "nowhere" in capsys.readouterr().err
