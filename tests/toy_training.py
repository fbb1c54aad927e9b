"""A toy of everything that the training loop needs, and a program that trains it: `python toy_training.py <settings JSON> ...`.

The model has weights that both tasks share, weights of one task each, a frozen layer, a buffer and dropout; the losses are means over
images, so that splitting a batch over processes changes nothing but rounding.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grex_mllm.config import Config
from grex_mllm.data.dataset import epoch_index
from grex_mllm.errors import GrexError
from grex_mllm.precision import autocast
from grex_mllm.training import loop
from grex_mllm.training.batches import BatchStream, mix
from grex_mllm.training.engine import leave
from grex_mllm.types import Batch, Geometry


class ToyModel(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.shared = nn.Linear(12, 16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.norm = nn.LayerNorm(16)
        self.dropout = nn.Dropout(dropout)
        self.ground, self.generate = nn.Linear(16, 1), nn.Linear(16, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        hidden = self.dropout(self.norm(self.frozen(torch.relu(self.shared(image.flatten(1).float() / 255)))))
        return self.ground(hidden), self.generate(hidden)


class ToyStep(nn.Module):
    """The model and its losses, as `training.step.Step` is of the real one. poison: an image id whose batch gives no number."""

    precision = "fp32"

    def __init__(self, model: ToyModel, poison: str | None = None) -> None:
        super().__init__()
        self.model, self.poison = model, poison

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        with autocast(self.precision, batch.image.device.type):
            out, text = (part.float() for part in self.model(batch.image))
        bright = batch.image.flatten(1).float().mean(1, keepdim=True) / 255
        terms = {"ground/fit": (out - bright).square().mean(), "generate/size": text.square().mean()}
        total = terms["ground/fit"] + (0.1 + 0.1 * progress) * terms["generate/size"]
        return {**terms, "total": total * (float("nan") if self.poison in batch.image_ids else 1.0)}


def toy_batch(positions: list[int]) -> Batch:
    """One 2x2 image and two expressions per position, drawn from 10 images in another order each epoch."""
    indices = [epoch_index(position, 10, 7)[1] for position in positions]
    images = [torch.randint(0, 256, (3, 2, 2), generator=torch.Generator().manual_seed(mix(index))).byte() for index in indices]
    num = 2 * len(indices)
    return Batch(
        image=torch.stack(images),
        image_index=torch.arange(num) // 2,
        text_ids=torch.zeros(num, 3, dtype=torch.int64),
        text_mask=torch.ones(num, 3, dtype=torch.int64),
        gt_masks=None,
        gt_boxes_norm=[torch.zeros(0, 4) for _ in range(num)],
        gt_count=torch.zeros(num, dtype=torch.int64),
        no_target=torch.ones(num, dtype=torch.bool),
        target_index=[torch.zeros(0, dtype=torch.int64) for _ in range(num)],
        instance_masks=[torch.zeros(0, 2, 2, dtype=torch.bool) for _ in indices],
        instance_boxes_norm=[torch.zeros(0, 4) for _ in indices],
        geometries=[Geometry(2, 2, 2, 2) for _ in indices],
        expression_ids=[f"e{index}.{k}" for index in indices for k in range(2)],
        image_ids=[f"i{index}" for index in indices],
    )


def toy_config(out: str | Path, **settings: Any) -> Config:
    """Settings of `train`, `optim.<name>`, `validation.<name>` and `num_workers` over small defaults."""
    config = Config()
    values: dict[str, Any] = {
        "steps": 12,
        "batch_images": 4,
        "log_every": 1,
        "save_every": 4,
        "precision": "fp32",
        "optim.lr": 0.01,
        **settings,
    }
    for name, value in {**values, "out": str(out)}.items():
        if name == "num_workers":
            config.data.num_workers = value
        elif name.startswith("optim."):
            setattr(config.train.optim, name.removeprefix("optim."), value)
        elif name.startswith("validation."):
            setattr(config.train.validation, name.removeprefix("validation."), value)
        else:
            assert hasattr(config.train, name), name
            setattr(config.train, name, value)
    return config


def toy_train(
    config: Config, dropout: float = 0.0, poison: str | None = None, save: bool = False, on_step: Any = None, validation: Any = None
) -> tuple[loop.TrainResult, ToyModel]:
    torch.manual_seed(config.train.seed)
    model, settings = ToyModel(dropout), config.train
    source = BatchStream(toy_batch, settings.batch_images)

    def save_model(folder: Path) -> None:
        torch.save(model.state_dict(), folder / "toy.pt")

    step, save_or_not = ToyStep(model, poison), save_model if save else None
    return loop.train(step, model, source, config, save_model=save_or_not, on_step=on_step, validation=validation), model


def losses(out: str | Path) -> list[dict[str, Any]]:
    """Read the steps, loss terms, learning rates and gradient norms of a run."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key == "step" or key.startswith(("loss/", "lr/", "grad"))} for line in lines]


class Stopped(BaseException):
    """Ends a training run at a step."""


def run(settings: dict[str, Any]) -> None:
    """Train with settings of `toy_config`; besides: dropout, wait_s (after a step), stop_after, kill_after (steps), poison (image id).

    befall: [what, rank, step]: after the step the process of that rank gets the signal of that name, or sleeps ("sleep").
    """
    out, dropout, wait_s = settings.pop("out"), settings.pop("dropout", 0.0), settings.pop("wait_s", 0.0)
    what, unlucky, when = settings.pop("befall", ("", 0, 0))
    kill_after, stop_after, poison = (settings.pop(name, None) for name in ("kill_after", "stop_after", "poison"))

    def after(step: int, _: dict[str, float]) -> None:
        time.sleep(wait_s)
        if step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == stop_after:
            raise Stopped
        if what and (step, os.environ.get("RANK", "0")) == (when, str(unlucky)):
            time.sleep(1000) if what == "sleep" else os.kill(os.getpid(), getattr(signal, what))

    try:
        result, _ = toy_train(toy_config(out, **settings), dropout, poison, save=True, on_step=after)
    except Stopped:
        return
    if result.is_main:
        print(f"{result.interrupted or 'finished'} {result.steps} resumed {result.resumed_from}", flush=True)


def main() -> None:
    """Do the runs that the arguments describe, one JSON object each."""
    try:
        for argument in sys.argv[1:]:
            run(json.loads(argument))
    except GrexError as error:
        print(error, file=sys.stderr)
        leave(2)
        sys.exit(2)
    leave(0)


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    main()
