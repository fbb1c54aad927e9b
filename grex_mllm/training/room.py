"""Before the first step: can `train.out` be written, and does its disk hold the checkpoints?"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from grex_mllm.config import TrainConfig
from grex_mllm.errors import fault
from grex_mllm.training import checkpoint
from grex_mllm.training.consolidated import weights
from grex_mllm.training.engine import whole_shape

MOMENTS = 2  # numbers that AdamW keeps for each weight; Muon keeps fewer
GIB = 2**30


def check_writable(out: str | Path) -> None:
    """Write a byte where `train.out` is, or where it will be made.

    Raises:
        GrexError: it cannot be written; says what the system says.
    """
    place = existing(out)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"0")
            file.flush()
    except OSError as error:
        given = f"train.out {out} cannot be written ({error.strerror or error})"
        raise fault(given, "a folder that this user can write, on a disk with room", "choose another train.out, or free it") from None


def existing(out: str | Path) -> Path:
    """Return the folder itself, or the nearest one above it that exists."""
    path = Path(out).absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def checkpoint_bytes(model: nn.Module, config: TrainConfig) -> tuple[int, int]:
    """Estimate the bytes of one checkpoint, and of what is written once: frozen weights that a model folder holds, and that folder."""
    trained, frozen = weights(model, trainable=True), weights(model, trainable=False)
    once = sum(_bytes(tensor) for tensor in frozen.values())
    values = sum(_bytes(tensor) for tensor in trained.values())
    parameters = sum(_bytes(tensor) for tensor in trained.values() if tensor.requires_grad)
    copies = (MOMENTS if config.optim.name == "adamw" else 0) + (config.optim.average_decay > 0)
    return values + parameters * copies, once + values + once


def _bytes(tensor: Tensor) -> int:
    return torch.Size(whole_shape(tensor)).numel() * tensor.element_size()


def check_room(model: nn.Module, config: TrainConfig) -> None:
    """Compare the free room of the disk with `train.keep` + 1 checkpoints (the new one is written before the oldest goes).

    Raises:
        GrexError: too little.
    """
    each, once = checkpoint_bytes(model, config)
    there = sum(checkpoint.is_complete(folder) for folder in (Path(config.out) / checkpoint.FOLDER).glob("step_*"))
    needed = max(config.keep + 1 - there, 1) * each + (0 if there else once)
    free = shutil.disk_usage(existing(config.out)).free
    if free < needed:
        raise fault(
            f"the disk of train.out {config.out} has {free / GIB:.2f} GiB free",
            f"about {needed / GIB:.2f} GiB for {config.keep + 1} checkpoints of {each / GIB:.2f} GiB and the model",
            "free some, lower train.keep, or choose another train.out",
        )
