"""The announced time of a training, and that measuring it leaves no trace."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from test_end_to_end import small

from grex_mllm.models.grex import GrexModel
from grex_mllm.precision import Resolved
from grex_mllm.training.forecast import Forecast
from grex_mllm.training.run import train_from_config

TEXT = {"train__pretraining__steps": 6}
SCENES = {
    "train__pretraining__steps": 0,
    "train__pretraining__scenes": 6,
    "model__generator__attribute_classes": '{"shape": 7, "colour": 6}',
}


def forecast_of(out: Path, **changes: object) -> tuple[Forecast, Resolved, float]:
    shown: list[tuple[Forecast, Resolved, float]] = []
    config = small(train__out=str(out), **changes)
    train_from_config(config, on_forecast=lambda forecast, precision: shown.append((forecast, precision, time.monotonic())))
    assert len(shown) == 1
    return (*shown[0][:2], time.monotonic() - shown[0][2])


@pytest.mark.long
@pytest.mark.parametrize("stage", [TEXT, SCENES], ids=["text", "scenes"])
def test_every_stage_is_foreseen(tmp_path: Path, stage: dict[str, object]) -> None:
    forecast, precision, _ = forecast_of(tmp_path / "run", **stage)
    assert precision.precision in ("fp32", "bf16") and precision.reason
    name = "attribute pre-training" if "train__pretraining__scenes" in stage else "language model on text"
    assert list(forecast.stages_s) == [name] and forecast.stages_s[name] > 0
    assert forecast.joint_s > 0 and forecast.step_s > 0
    assert forecast.total_s == pytest.approx(sum(forecast.stages_s.values()) + forecast.joint_s)


@pytest.mark.long
def test_the_forecast_grows_with_the_steps_and_is_near_the_truth(tmp_path: Path) -> None:
    forecast, _, spent = forecast_of(tmp_path / "run", train__steps=40, train__save_every=1000, train__log_every=1000)
    assert forecast.joint_s == pytest.approx(40 * forecast.step_s, rel=0.9)  # before generate_start a step may take another time
    assert spent / 4 < forecast.total_s < spent * 4  # a shared machine: the demo itself is held to 25 %


def test_weights_are_those_of_a_training_without_forecast(tmp_path: Path) -> None:
    forecast_of(tmp_path / "with", **SCENES)
    train_from_config(small(train__out=str(tmp_path / "without"), **SCENES))
    first, second = (GrexModel.from_pretrained(tmp_path / name).saved_state() for name in ("with", "without"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.long
def test_a_resumed_run_announces_nothing(tmp_path: Path) -> None:
    shown: list[Forecast] = []
    train_from_config(small(train__out=str(tmp_path / "run"), train__steps=2))
    again = small(train__out=str(tmp_path / "run"), train__steps=2, train__resume="true")
    train_from_config(again, on_forecast=lambda forecast, _: shown.append(forecast))
    assert shown == []
