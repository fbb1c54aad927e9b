"""How long a training will take on this machine, measured by a few real steps of a copy of the model."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from grex_mllm.config import Config
from grex_mllm.precision import resolve_precision
from grex_mllm.training.batches import BatchSource, map_tensors
from grex_mllm.training.engine import training_device
from grex_mllm.training.optim import build_optimizer, clip_gradients, optimized_parameters
from grex_mllm.training.stages import Stage
from grex_mllm.training.step import Step

WARM_UP, MEASURED = 1, 4  # steps


@dataclass(frozen=True)
class Forecast:
    """stages_s: expected seconds of each pre-training stage.  joint_s: of the joint training.

    step_s: seconds of a joint step in which everything learns.
    """

    stages_s: dict[str, float]
    joint_s: float
    step_s: float

    @property
    def total_s(self) -> float:
        return sum(self.stages_s.values()) + self.joint_s


def forecast_training(model: Any, batches: BatchSource, stages: Sequence[Stage], config: Config) -> Forecast:
    """Time a few steps of every stage on a copy of the model, in one process; takes about fifteen steps.

    Evaluation, checkpoints and other programs on the machine are not foreseen.
    """
    trial = copy.deepcopy(model)
    spent = {}
    for stage in stages:
        times = _Times()
        stage.run(trial, WARM_UP + MEASURED, times)
        spent[stage.name] = times.step_s() * stage.steps
    trial.train()
    trial.to(training_device())  # the stages come before the model moves there
    early = min(config.loss.generate_start, 1.0)
    early_s = _joint_step_s(trial, batches, config, 0.0) if early else 0.0  # where there is no such part, half of the work is spared
    late_s = _joint_step_s(trial, batches, config, 1.0)
    return Forecast(spent, config.train.steps * (early * early_s + (1 - early) * late_s), late_s)


class _Times:
    """Remembers when each step was done; stands where a progress bar does."""

    def __init__(self) -> None:
        self.at = [time.monotonic()]

    def __call__(self, share: float, note: object = "") -> None:
        self.at.append(time.monotonic())

    def step_s(self) -> float:
        spent = [after - before for before, after in zip(self.at, self.at[1:])]
        return median(spent[WARM_UP:])


def _joint_step_s(model: Any, batches: BatchSource, config: Config, progress: float) -> float:
    """Return the median seconds of an optimizer step when `progress` of the training is done."""
    device: Any = model.device
    precision = resolve_precision(config.train.precision, device).precision
    step = Step(model, config, precision)
    optimizer = build_optimizer(model, config.train.optim, precision, device.type)
    chosen = {id(parameter) for parameter in optimized_parameters(optimizer)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    times = _Times()
    for number in range(WARM_UP + MEASURED):
        for micro in range(config.train.accumulation):
            batch = map_tensors(batches.at(number * config.train.accumulation + micro), lambda tensor: tensor.to(device))
            step(batch, progress)["total"].backward()
        clip_gradients(optimized_parameters(optimizer), config.train.optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times(0.0)
    return times.step_s()
