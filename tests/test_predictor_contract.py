"""What every entry of PREDICTORS must do, and what predict makes of one that does otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from score_case import PROTOCOLS, make_dataset
from tiny import tiny_speaker

import grex_mllm.predict as module
from grex_mllm.cli import main
from grex_mllm.data.dataset import FolderDataset
from grex_mllm.errors import GrexError
from grex_mllm.predict import predict_split
from grex_mllm.predictors import PREDICTORS, open_predictor
from grex_mllm.predictors.protocol import STATUSES, TASKS, Abilities, Answer, Item, Options, set_key
from grex_mllm.score import score

pytestmark = pytest.mark.usefixtures("without_java")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model (`m`), a dataset (`d`) and predictions to replay (`said.jsonl`)."""
    root = tmp_path_factory.mktemp("contract")
    make_dataset(root / "d")
    tiny_speaker(root / "t").save_pretrained(root / "m")
    run(root, "oracle", "said.jsonl")
    lines = [json.loads(line) for line in (root / "said.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:  # as a model that is asked in words leaves them
        text, step = ("[[100, 200, 500, 600]]", "locate") if "expression_id" in line else ("the squares", "describe")
        line |= {"raw": [{"step": step, "text": text, "finish": "stop", "sent": [32, 24]}], "by": "qwen3-vl-2b, grec/uniform"}
    (root / "raw.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return root


def run(place: Path, model: str, out: str, data: str = "d", **changes: Any) -> bytes:
    given: dict[str, Any] = {"split": "val", "tasks": list(TASKS), "image_root": None, "listener": 0, "limit": None, "device": "cpu"}
    return predict_split(model, str(place / data), place / out, **{**given, "overrides": [], **changes}).read_bytes()


def named(place: Path, name: str) -> str:
    """Return an entry with the argument that it needs."""
    told = {"grex": f"grex:{place / 'm'}", "replay": f"replay:{place / 'said.jsonl'}", "random": "random:7"}
    return (told | {"reparse": f"reparse:{place / 'raw.jsonl'}"}).get(name, name)


def items(place: Path, done: tuple[str, ...] = ()) -> list[Item]:
    return list(module._items(source := FolderDataset(place / "d", "val", 10**9), list(range(len(source))), list(TASKS), done, None))


def answers(place: Path, name: str, task: str, asked: list[Item]) -> dict[str, Answer]:
    """Return key -> answer of a freshly opened entry; every key comes once."""
    found = list(getattr(open_predictor(named(place, name), Options("cpu")), TASKS[task])(iter(asked)))
    assert len({answer.key for answer in found}) == len(found)
    return {answer.key: answer for answer in found}


def keys(asked: list[Item], task: str) -> set[str]:
    if task == "ground":
        return {record.expression_id for item in asked for record in item.open_expressions}
    return {set_key(item.record.image_id, targets) for item in asked for targets in item.open_sets}


PAIRS = [(name, task) for name in PREDICTORS for task in TASKS]


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_every_open_question_is_answered_once_whatever_the_order(place: Path, name: str, task: str) -> None:
    if task not in open_predictor(named(place, name), Options("cpu")).can.tasks:
        pytest.skip(f"{name} does not {task}")
    whole = answers(place, name, task, items(place))
    assert whole.keys() == keys(items(place), task) and len(whole) == (20 if task == "ground" else 15)
    assert all(answer.status in STATUSES and (answer.status == "ok") == (not answer.reason) for answer in whole.values())
    assert {key: module.answer_fields(answer) for key, answer in answers(place, name, task, items(place)[::-1]).items()} == {
        key: module.answer_fields(answer) for key, answer in whole.items()
    }
    rest = items(place, tuple(sorted(whole)[::2]))
    assert answers(place, name, task, rest).keys() == keys(rest, task) == set(sorted(whole)[1::2])


def test_fingerprints_are_stable_and_differ(place: Path) -> None:
    names = [*(named(place, name) for name in PREDICTORS), "random:8"]
    first, again = ([open_predictor(name, Options("cpu")).fingerprint() for name in names] for _ in range(2))
    assert first == again and len(set(first)) == len(names)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("name", PREDICTORS)
def test_a_killed_run_goes_on(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, written = run(place, named(place, name), f"whole-{name}.jsonl"), list[str]()
    write = module._Part.write

    def counted(self: Any, key: str, line: dict[str, Any]) -> None:
        if len(written) == 7:
            raise Killed
        write(self, key, line)
        written.append(key)

    monkeypatch.setattr(module._Part, "write", counted)
    with pytest.raises(Killed):
        run(place, named(place, name), f"cut-{name}.jsonl")
    with pytest.raises(GrexError, match="another model"):
        run(place, "random:8", f"cut-{name}.jsonl")
    before = written.copy()
    monkeypatch.setattr(module._Part, "write", lambda self, key, line: (write(self, key, line), written.append(key)))
    assert run(place, named(place, name), f"cut-{name}.jsonl") == whole
    assert len(written) == len(set(written)) == whole.count(b"\n") and written[:7] == before


def test_processes_share_the_images_and_keep_the_order(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(place, "oracle", "alone.jsonl")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):  # process 0 joins what the others have finished
        monkeypatch.setenv("RANK", rank)
        (place / "both.jsonl").touch() if rank == "1" else (place / "both.jsonl").unlink()
        shared = run(place, "oracle", "both.jsonl")
    assert shared == whole and not list(place.glob("both.jsonl.*"))


def test_oracle_and_always_empty_score_what_the_scorer_says_of_them(place: Path) -> None:
    for name in ("oracle", "always_empty"):
        run(place, name, f"{name}.jsonl")
        results = score(place / f"{name}.jsonl", place / "d", "val", PROTOCOLS / "all.yaml")
        strict = {task: block for task, block in results["results"]["strict"].items() if task != "greg"}
        assert strict == results["baselines"][name]
    strict = score(place / "oracle.jsonl", place / "d", "val", PROTOCOLS / "all.yaml")["results"]["strict"]
    assert strict["gres"]["gIoU"] == strict["gres"]["N_acc"] == strict["grec"]["Pr@F1"] == strict["count"]["accuracy"] == 1.0


def test_one_task_alone_answers_what_both_do(place: Path) -> None:
    alone = [set(run(place, "oracle", f"{task}.jsonl", tasks=[task]).splitlines()) for task in TASKS]
    assert [len(lines) for lines in alone] == [20, 15] and alone[0] | alone[1] == set((place / "said.jsonl").read_bytes().splitlines())


def test_results_name_a_predictor_that_reads_the_truth(place: Path) -> None:
    lines = [json.loads(line) for line in run(place, "oracle", "named.jsonl").splitlines()]
    assert {line["reads_truth"] for line in lines} == {"targets"}
    assert all("reads_truth" not in json.loads(line) for line in run(place, "always_empty", "unnamed.jsonl").splitlines())
    for name, truth in (("named", "targets"), ("unnamed", None)):
        provenance = score(place / f"{name}.jsonl", place / "d", "val", PROTOCOLS / "gres.yaml")["provenance"]
        assert provenance["predictions"].get("reads_truth") == truth and not any("not understood" in note for note in provenance["notes"])


@pytest.mark.parametrize("name", ["oracle", "grex"])
def test_a_replay_reproduces_the_file_byte_for_byte(place: Path, name: str) -> None:
    said = run(place, named(place, name), f"first-{name}.jsonl")
    assert run(place, f"replay:{place / f'first-{name}.jsonl'}", f"again-{name}.jsonl") == said


def test_a_replay_without_a_line_says_error(place: Path) -> None:
    (place / "short.jsonl").write_bytes(b"".join((place / "said.jsonl").read_bytes().splitlines(keepends=True)[1:]))
    lines = [json.loads(line) for line in run(place, f"replay:{place / 'short.jsonl'}", "short-again.jsonl").splitlines()]
    assert [line["status"] for line in lines] == ["error"] + ["ok"] * 34 and "no line" in lines[0]["reason"]


def test_fixed_rules_read_no_image(place: Path) -> None:
    make_dataset(place / "blind")
    for image in (place / "blind").glob("*.png"):
        image.unlink()
    for name in ("always_empty", "oracle", "largest", "all", "random:7"):
        lines = [json.loads(line) for line in run(place, name, f"blind-{name}.jsonl", data="blind").splitlines()]
        grounded = [line for line in lines if "expression_id" in line]
        counts = {line["count"] for line in grounded}
        assert {"always_empty": {0}, "largest": {1}, "all": {3}}.get(name, {0, 1, 2, 3}) == counts and len(grounded) == 20


class Odd:
    """Answers as it is told: a list of keys with their status, after having taken all items."""

    can = Abilities()

    def __init__(self, said: Any) -> None:
        self.said = said

    def fingerprint(self) -> str:
        return "odd"

    def ground(self, asked: Any) -> Iterator[Answer]:
        right = [Answer(record.expression_id) for item in asked for record in item.open_expressions]
        yield from self.said(right)


def test_answers_in_any_order_make_the_same_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    for number, order in enumerate((lambda right: right, lambda right: right[::-1])):
        monkeypatch.setattr(module, "open_predictor", lambda *_, order=order: Odd(order))
        files.append(run(place, "odd", f"order{number}.jsonl"))
    assert files[0] == files[1] and files[0].count(b"\n") == 20


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (lambda right: right[1:], "1 questions without an answer of odd: made:0-0"),
        (lambda right: [*right, right[0]], "an answer more of odd"),
        (lambda right: [Answer("other")], '"other"'),
        (lambda right: [Answer(right[0].key, status="maybe")], 'status "maybe"'),
    ],
)
def test_a_predictor_that_answers_otherwise_is_told(place: Path, monkeypatch: pytest.MonkeyPatch, said: Any, words: str) -> None:
    monkeypatch.setattr(module, "open_predictor", lambda *_: Odd(said))
    with pytest.raises(GrexError, match=words):
        run(place, "odd", "odd.jsonl")
    (place / "odd.jsonl.part").unlink(missing_ok=True)


def test_both_tasks_of_an_image_come_in_turn_and_share_its_encoding(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from grex_mllm.models.grex import GrexModel

    encoded, encode = [], GrexModel.encode
    monkeypatch.setattr(GrexModel, "encode", lambda self, image: (encoded.append(1), encode(self, image))[1])
    run(place, named(place, "grex"), "shared.jsonl")
    assert len(encoded) == 5
    taken: list[tuple[str, str]] = []

    def follow(task: str, asked: Any) -> Iterator[Answer]:
        for item in asked:
            taken.append((task, item.record.image_id))
            yield from (Answer(key) for key in sorted(keys([item], task)))

    both = SimpleNamespace(ground=lambda asked: follow("ground", asked), describe=lambda asked: follow("generate", asked))
    assert len(list(module._answers(both, iter(items(place)), list(TASKS)))) == 35
    assert {(a[1] == b[1]) for a, b in list(pairwise(taken))[::2]} == {True}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--model", "always_emtpy"], ['"always_emtpy"', 'did you mean "always_empty"']),
        (["--model", "oracle:3"], ["oracle:3", "takes no argument"]),
        (["--model", "replay"], ["replay without a file"]),
        (["--model", "replay:none.jsonl"], ["none.jsonl does not exist"]),
        (["--model", "json"], ["json cannot be loaded", "build(argument, options)"]),
        (["--model", "nothing.here"], ["model folder nothing.here does not exist"]),
        (["--model", "oracle", "--listener", "2"], ["--listener with oracle"]),
        (["--model", "largest", "--predict.batch=3"], ["--predict.batch with largest"]),
        (["--model", "largest", "--tasks", "generate"], ["largest has no generator"]),
    ],
)
def test_a_wrong_name_or_option_is_refused(place: Path, capsys: pytest.CaptureFixture[str], words: list[str], parts: list[str]) -> None:
    out = place / "refused.jsonl"
    assert main(["predict", *words, "--data", str(place / "d"), "--split", "val", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert [part for part in parts if part not in said] == [] and said.count(";") >= 2 and not list(place.glob("refused*")), said


def test_round_trips_take_any_predictor_that_does_not_know_the_answer(place: Path) -> None:
    options: dict[str, Any] = {"protocol_path": PROTOCOLS / "greg.yaml"}
    block = score(place / "said.jsonl", place / "d", "val", **options, round_trip="all", device="cpu")
    greg, shown = block["results"]["strict"]["greg"], block["provenance"]["round_trip"]
    assert shown == {"model": "all", "sha256": None, "num_grounded": 15} and greg["all"]["round_trip_Pr@F1"] == pytest.approx(1 / 3)
    with pytest.raises(GrexError, match="oracle, which reads the targets"):  # nor does grex ground
        score(place / "said.jsonl", place / "d", "val", **options, round_trip="oracle", device="cpu")


def test_baselines_on_synthetic_scenes(tmp_path: Path) -> None:
    words = ["predict", "--model", "oracle", "--data", "synthetic", "--limit", "2", "--data.sources.synthetic.image_size=64"]
    assert main([*words, "--out", str(tmp_path / "x.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    judged = [line["judgement"] for line in lines if "targets" in line]
    assert judged and set(judged) == {"exact"}
