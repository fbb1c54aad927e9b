"""How long a training will take on this machine, measured by a few real steps of a copy of the model."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import nn

from grex_mllm.config import Config
from grex_mllm.precision import autocast, resolve_precision
from grex_mllm.training.attribute_pretraining import pretrain_on_attributes
from grex_mllm.training.batches import BatchSource, map_tensors
from grex_mllm.training.engine import training_device
from grex_mllm.training.lm import train_language_model
from grex_mllm.training.optim import build_optimizer, clip_gradients, optimized_parameters

WARM_UP, MEASURED = 1, 4  # steps


@dataclass(frozen=True)
class Forecast:
    """text_s, scenes_s, joint_s: expected seconds of the language model's two stages and of the joint training.

    step_s: seconds of a joint step in which everything learns.
    """

    text_s: float
    scenes_s: float
    joint_s: float
    step_s: float

    @property
    def total_s(self) -> float:
        return self.text_s + self.scenes_s + self.joint_s


def forecast_training(
    model: Any, batches: BatchSource, scenes: BatchSource | None, lines: list[str], loss_fn: Any, config: Config
) -> Forecast:
    """Time a few steps of every stage on a copy of the model, in one process; takes about fifteen steps.

    scenes: batches of the attribute pre-training, None without one.  lines: some of the text that the language model
    reads, empty without that stage.  Evaluation, checkpoints and other programs on the machine are not foreseen.
    """
    steps, trial = WARM_UP + MEASURED, copy.deepcopy(model)
    text_s = scenes_s = 0.0
    settings = config.train.text
    if lines and settings.steps:
        times = _Times()
        precision = resolve_precision(config.train.precision, model.device).precision
        with trial.generator.text_only() as lm:
            train_language_model(
                lm, trial.generator.tokenizer, lines, steps=steps, batch=settings.batch, lr=settings.lr, precision=precision, progress=times
            )
        text_s = times.step_s() * settings.steps
    if scenes is not None and settings.scenes:
        times = _Times()
        short = replace(config, train=replace(config.train, text=replace(settings, scenes=steps)))
        pretrain_on_attributes(trial, scenes, short, times)
        scenes_s = times.step_s() * settings.scenes
    trial.train()
    trial.to(training_device())  # the language model's stages come before the model moves there
    early_s, late_s = (_joint_step_s(trial, batches, loss_fn, config, progress) for progress in (0.0, 1.0))
    early = min(config.loss.lm_start, 1.0)
    return Forecast(text_s, scenes_s, config.train.steps * (early * early_s + (1 - early) * late_s), late_s)


class _Times:
    """Remembers when each step was done; stands where a progress bar does."""

    def __init__(self) -> None:
        self.at = [time.monotonic()]

    def __call__(self, share: float, note: object = "") -> None:
        self.at.append(time.monotonic())

    def step_s(self) -> float:
        spent = [after - before for before, after in zip(self.at, self.at[1:])]
        return median(spent[WARM_UP:])


def _joint_step_s(model: nn.Module, batches: BatchSource, loss_fn: Callable[..., Any], config: Config, progress: float) -> float:
    """Return the median seconds of an optimizer step when `progress` of the training is done."""
    device: Any = model.device
    precision = resolve_precision(config.train.precision, device).precision
    optimizer = build_optimizer(model, config.train.optim, precision)
    chosen = {id(parameter) for parameter in optimized_parameters(optimizer)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    times = _Times()
    for step in range(WARM_UP + MEASURED):
        for micro in range(config.train.accumulation):
            task, batch = batches.at(step * config.train.accumulation + micro)
            batch = map_tensors(batch, lambda tensor: tensor.to(device))
            with autocast(precision, device.type):
                loss = loss_fn(model, batch, task, progress)["total"]
            loss.backward()
        clip_gradients(optimized_parameters(optimizer), config.train.optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times(0.0)
    return times.step_s()
