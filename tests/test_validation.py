"""Validation inside a training: the numbers of `grex score`, the same for one process and many, the best model, early stop, resume."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_deepspeed import launch_program, write_json
from test_end_to_end import SMALL
from tiny import tiny_config
from toy_training import losses, toy_config, toy_train

from grex_mllm.config import PROTOCOL_FOLDER, Config, save_config
from grex_mllm.errors import GrexError
from grex_mllm.metrics.language import round_trip
from grex_mllm.metrics.truth import Truth
from grex_mllm.models.grex import GrexModel
from grex_mllm.predict import predict_split
from grex_mllm.report.run_files import read_run
from grex_mllm.score import load_protocol, score
from grex_mllm.score.truth import open_truth
from grex_mllm.training import run as run_module
from grex_mllm.training import validation as module
from grex_mllm.training.best import Best
from grex_mllm.training.run import make_tokenizers, train_from_config
from grex_mllm.training.step import Step


@pytest.fixture(autouse=True)
def few_lines_and_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads only wait for each other where tensors are this small."""
    monkeypatch.setattr(run_module, "CORPUS_LINES", 300)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def validating(out: Path, **changes: object) -> Config:
    """The real model at tiny size, in float32, without a pre-training."""
    given = {name: value for name, value in SMALL.items() if not name.startswith("train__pretraining")}
    given |= {"train__validation__every": 2, "train__validation__images": 3, "train__steps": 4, "train__precision": "fp32"}
    return tiny_config(**{**given, "train__out": out, "model__text__dropout": 0.0, **changes})


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_the_numbers_are_those_of_predict_and_score_and_the_best_is_a_model_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = train_from_config(validating(out))
    lines = lines_of(out)
    assert [("validation/gres/gIoU" in line) for line in lines] == [False, True, False, True]
    best = json.loads((out / "best" / "validation.json").read_text())
    assert result.best is not None and best["step"] == result.best.step and best["gres/gIoU"] == result.best.value
    chosen = lines[best["step"] - 1]
    assert best["gres/gIoU"] == max(line["validation/gres/gIoU"] for line in lines if "validation/gres/gIoU" in line)
    assert {f"validation/{name}": value for name, value in best.items() if name != "step"}.items() <= chosen.items()
    data = out / "validation" / "synthetic_val_3"
    given = ["--predict.precision=fp32"]
    predict_split(str(out / "best"), str(data), tmp_path / "p.jsonl", "val", ["ground", "generate"], device="cpu", overrides=given)
    protocol = (PROTOCOL_FOLDER / "all.yaml").read_text()
    (tmp_path / "masks.yaml").write_text(re.sub(r"\n  greg: .*", "", protocol))  # text metrics would start Java
    scored = score(tmp_path / "p.jsonl", data, "val", tmp_path / "masks.yaml")["results"]["strict"]
    for task in ("gres", "grec", "count"):
        names = [name for name in best if name.startswith(f"{task}/")]
        assert len(names) >= 2
        for name in names:
            assert best[name] == scored[task][name.partition("/")[2]], name
    rules, truth = load_protocol(PROTOCOL_FOLDER / "all.yaml").tasks, open_truth(data, "val")
    texts = [line for line in map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines()) if "targets" in line]
    about = [Truth("", line["targets"], partial(truth.image, line["image_id"]), tasks=rules) for line in texts]
    trips = [round_trip(line.get("round_trip", {}), one) for line, one in zip(texts, about, strict=True)]
    assert len(trips) > 3
    for name, key in module.GENERATED.items():
        assert best[f"generate/{name}"] == pytest.approx(sum(trip[key] or 0 for trip in trips) / len(trips), abs=1e-12)
    assert {"loss/total", "loss/ground/total", "loss/generate/total"} <= best.keys()
    series = [one for one in read_run(out, None).losses if one.task == "validation"]
    assert {"gres/gIoU", "count/mae", "loss/generate/total"} <= {one.name for one in series} and all(len(one.points) == 2 for one in series)


def test_validating_changes_nothing(tmp_path: Path) -> None:
    settings = {"train__optim__average_decay": 0.9, "model__text__dropout": 0.1, "train__steps": 3}
    train_from_config(validating(tmp_path / "with", train__validation__every=1, train__validation__images=2, **settings))
    train_from_config(validating(tmp_path / "without", train__validation__every=0, **settings))
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    with_, without = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("with", "without"))
    assert with_ == without and not (tmp_path / "without" / "best").exists()


def built(config: Config) -> tuple[Step, module.Validation]:
    tokenizers = make_tokenizers(config)
    config.model.text.vocab_size = tokenizers[0].vocab_size
    torch.manual_seed(0)
    step = Step(GrexModel(config, *tokenizers), config).eval()
    validation = run_module._validation(config, tokenizers, True)
    assert validation is not None
    return step, validation


def test_many_processes_have_the_digits_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, validation = built(validating(tmp_path))
    whole = validation(step, SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu")))
    parts: list[dict[str, Any]] = []
    for world in (1, 2):
        parts.clear()

        def kept(_: Any, mine: dict[str, Any]) -> list[dict[str, Any]]:
            parts.append(mine)
            return [mine]

        with monkeypatch.context() as patch:
            patch.setattr(module, "gathered", kept)
            for rank in range(world):
                validation(step, SimpleNamespace(process_index=rank, num_processes=world, device=torch.device("cpu")))
        tally = module._Tally(validation.rules, validation.tasks, validation.generates).joined([part["sums"] for part in parts])
        assert tally.compute() == {name: value for name, value in whole.items() if not name.startswith("loss/")}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"metric": "gres/gIuo"}, 'did you mean "gres/gIoU"'),
        ({"metric": "rec/precision"}, "has no value on 3 images"),
        ({"images": 0}, "images 0"),
        ({"split": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    config = validating(tmp_path / "run", **{f"train__validation__{name}": value for name, value in changes.items()})
    with pytest.raises(GrexError, match=named):
        train_from_config(config)
    assert not (tmp_path / "run" / "log.jsonl").exists()


class Given:
    """Stands for a validation: the n-th step has the n-th value."""

    def __init__(self, values: list[float], higher_is_better: bool = True) -> None:
        self.values, self.higher_is_better = values, higher_is_better
        self.weights: list[torch.Tensor] = []

    def __call__(self, step: Any, accelerator: Any, mark: Any) -> dict[str, float]:
        assert not step.training
        mark()
        self.weights.append(step.model.shared.weight.detach().clone())
        return {"gres/gIoU": self.values[len(self.weights) - 1]}


def test_the_best_is_kept_with_averaged_weights_and_never_pruned(tmp_path: Path) -> None:
    given = Given([0.1, 0.4, 0.3, 0.4, 0.2, float("nan")])
    settings = {"validation.every": 2, "keep": 1, "optim.average_decay": 0.9}
    result, model = toy_train(toy_config(tmp_path, **settings), save=True, validation=given)
    kept = torch.load(tmp_path / "best" / "toy.pt", weights_only=True)
    assert result.best is not None and (result.best.step, result.best.value, result.best.without_gain) == (4, 0.4, 4)
    assert torch.equal(kept["shared.weight"], given.weights[1]) and model.training
    assert not torch.equal(given.weights[5], model.shared.weight)  # the average, not what trains
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000012"]
    given = Given([0.4, 0.1, 0.3, 0.2], higher_is_better=False)
    toy_train(toy_config(tmp_path / "low", **{"validation.every": 3}), save=True, validation=given)
    assert json.loads((tmp_path / "low" / "best" / "validation.json").read_text()) == {"step": 6, "gres/gIoU": 0.1}


def test_a_run_without_gain_stops_and_a_resumed_one_knows_the_best(tmp_path: Path) -> None:
    def stop(step: int, _: dict[str, float]) -> None:
        if step == 7:
            raise KeyboardInterrupt

    settings = {"validation.every": 1, "validation.patience": 5}
    with pytest.raises(KeyboardInterrupt):
        toy_train(toy_config(tmp_path, **settings), save=True, on_step=stop, validation=Given([0.1, 0.2, 0.5, 0.3, 0.1, 0.1, 0.1]))
    result, _ = toy_train(toy_config(tmp_path, resume=True, **settings), save=True, validation=Given([0.3, 0.4, 0.1, 0.1, 0.9]))
    assert result.resumed_from == 4 and (result.steps, result.out_of_patience) == (8, True) and (tmp_path / "toy.pt").exists()
    assert result.best == Best({"split": "val", "images": 64, "metric": "gres/gIoU"}, 0.5, 3, 5)
    assert json.loads((tmp_path / "best" / "validation.json").read_text())["step"] == 3
    result, _ = toy_train(toy_config(tmp_path, resume=True, **settings), save=True, validation=Given([]))
    assert (result.resumed_from, result.steps, result.out_of_patience) == (8, 8, True)
    more = settings | {"validation.patience": 0}
    result, _ = toy_train(toy_config(tmp_path, resume=True, **more), save=True, validation=Given([0.6, 0.1, 0.1, 0.1]))
    assert result.steps == 12 and result.best is not None and (result.best.value, result.best.step) == (0.6, 9)


def test_another_metric_begins_anew() -> None:
    best = Best({"metric": "gres/gIoU"})
    best.load_state_dict(Best({"metric": "count/mae"}, 0.5, 3, 1).state_dict())
    assert best.value is None
    best.load_state_dict(Best({"metric": "gres/gIoU"}, 0.5, 3, 1).state_dict())
    assert best.value == 0.5 and not best.take(0.5, 4, True) and best.without_gain == 2


@pytest.mark.parametrize("zero", [None, pytest.param(2, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.long)])
def test_two_processes_validate_as_one(tmp_path: Path, zero: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a learning rate the weights stay: every digit of every metric is the same, and so is the best model."""
    monkeypatch.undo()  # both with the same tokenizers
    if zero is not None:
        pytest.importorskip("deepspeed")
    still = {"train__optim__lr": 0.0, "train__steps": 2, "train__optim__average_decay": 0.0}
    two, one = (validating(tmp_path / name, **still) for name in ("two", "one"))
    two.train.deepspeed = write_json(tmp_path, "zero.json", stage=zero) if zero is not None else None
    save_config(two, tmp_path / "two.yaml")
    status, shown = launch_program(tmp_path, ["-m", "grex_mllm", "train", "--config", str(tmp_path / "two.yaml")])
    assert status == 0 and "validation after step 2: gres/gIoU" in shown, shown[-6000:]
    train_from_config(one)
    ours, theirs = (lines_of(tmp_path / name)[-1] for name in ("two", "one"))
    names = {name for name in theirs if name.startswith("validation/")}
    assert names == {name for name in ours if name.startswith("validation/")} and "validation/generate/round_trip_Pr@F1" in names
    for name in names:
        assert ours[name] == (pytest.approx(theirs[name], rel=1e-4) if "/loss/" in name else theirs[name]), name
    best = GrexModel.from_pretrained(tmp_path / "two" / "best").saved_state()
    assert all(torch.equal(best[name], value) for name, value in GrexModel.from_pretrained(tmp_path / "one" / "best").saved_state().items())
