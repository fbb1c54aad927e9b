"""Checkpoints that are whole or absent, and resume that is exact.

A checkpoint is written into a hidden folder, flushed to disk and renamed; `checkpoint.json`, written last, lists every file
with its size. Whatever is killed at whatever moment, the newest complete checkpoint stays readable. It holds the trained weights and the
optimizer's state by parameter name, so any number of processes and any engine go on from it. Frozen weights that a model folder
holds are written once beside the checkpoints; the base of a language model that is named by folder or hub id is not written at all.
Nothing is unpickled freely: safetensors, JSON, and torch.load with weights_only.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from grex_mllm.config import TrainConfig
from grex_mllm.errors import fault
from grex_mllm.training.consolidated import load_optimizer, load_weights, optimizer_entries, weight_entries, weights, write_entries
from grex_mllm.training.engine import is_deepspeed, zero_stage
from grex_mllm.writing import flush, flush_entry, take_place, whole_entries

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim.lr_scheduler import LRScheduler

    from grex_mllm.training.average import WeightAverage
    from grex_mllm.training.best import Best

FOLDER, MARKER, FROZEN = "checkpoints", "checkpoint.json", "frozen.safetensors"
MODEL, OPTIMIZER, SHARED = "model.safetensors", "optimizer.safetensors", "state.pt"
FORMAT = 2
IMAGES = ("train.batch_images", "train.accumulation")  # may change on resume
# what may differ between a run and its continuation: it changes no loss
FREE = (
    "train.out",
    "train.resume",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.hang_s",
    "train.validation.",
    "train.num_threads",
    "train.compile",
    "train.profile",
    "model.vision.gradient_checkpointing",
    "model.text.gradient_checkpointing",
    "model.generator.gradient_checkpointing",
    "train.deepspeed",
    "data.num_workers",
    "predict.",
)


@dataclass(frozen=True)
class Position:
    """Where a run stands. step: finished steps.  batches: how many were read.  images: positions of the data that they took."""

    step: int = 0
    batches: int = 0
    images: int = 0

    def after(self, steps: int, config: TrainConfig) -> Position:
        """Return where the run stands that many steps later."""
        batches = steps * config.accumulation
        return Position(self.step + steps, self.batches + batches, self.images + batches * config.batch_images)


@dataclass
class RunState:
    """Everything that a run needs to go on. model: the user's model; wrapped: what Accelerate made of it and the losses.

    has_frozen: the frozen weights are written already.
    """

    accelerator: Accelerator
    model: nn.Module
    wrapped: nn.Module
    optimizer: Any
    schedule: LRScheduler
    average: WeightAverage | None
    config: dict[str, Any]
    best: Best | None = None
    has_frozen: bool = False

    @property
    def engine(self) -> Any | None:
        """DeepSpeed's engine, None without it."""
        return self.wrapped if is_deepspeed(self.accelerator) else None


def latest(out: str | Path) -> Path | None:
    """Return the newest complete checkpoint of a run folder, or None."""
    folders = sorted((Path(out) / FOLDER).glob("step_*"), reverse=True)
    return next((folder for folder in folders if is_complete(folder)), None)


def is_complete(folder: Path) -> bool:
    """Tell whether every file that the marker lists is there with its size, the frozen weights beside it included."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        sizes = {folder / name: size for name, size in marker["files"].items()}
        if marker["frozen_bytes"]:
            sizes[folder.parent / FROZEN] = marker["frozen_bytes"]
        return all(file.stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def save(state: RunState, out: str | Path, position: Position, keep: int) -> Path:
    """Write the checkpoint of a finished step; all processes call it. Then remove all but the newest `keep`.

    The main process writes; every process writes its random states, and gives its part of what ZeRO has taken apart.
    """
    accelerator, root = state.accelerator, Path(out) / FOLDER
    target, building = root / f"step_{position.step:08d}", root / f".building_{position.step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
    accelerator.wait_for_everyone()
    torch.save(random_states(), building / f"random_{accelerator.process_index}.pt")
    _write_tensors(state, root, building)
    if accelerator.is_main_process:
        torch.save(_shared(state), building / SHARED)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _seal(state, building, position)
        take_place(building, target)
        prune(root, keep)
    accelerator.wait_for_everyone()
    return target


def position_of(out: str | Path) -> Position:
    """Return where the newest complete checkpoint of a run folder stands; the beginning where there is none."""
    folder = latest(out)
    return Position(**_read_marker(folder)["position"]) if folder is not None else Position()


def restore_weights(accelerator: Accelerator, model: nn.Module, config: dict[str, Any], folder: Path) -> Position:
    """Load the weights of a checkpoint and return where it stands. Before the engine gets the model; all processes call it.

    Raises:
        GrexError: written by another version, or made with another configuration or model.
    """
    from safetensors.torch import load_file

    marker = _read_marker(folder)
    check_same(marker, accelerator, config, folder)
    frozen = load_file(folder.parent / FROZEN) if marker["frozen_bytes"] else {}
    load_weights(model, load_file(folder / MODEL) | frozen, str(folder))
    return Position(**marker["position"])


def restore(state: RunState, folder: Path) -> None:
    """Load the rest of a checkpoint into a run that has its weights: optimizer, schedule, average, best validation; all processes call it.

    Random states come back where the number of processes is the same.
    """
    from safetensors.torch import load_file

    load_optimizer(state.model, state.optimizer, state.engine, load_file(folder / OPTIMIZER))
    shared = _load(folder / SHARED)
    state.schedule.load_state_dict(shared["schedule"])
    for group, lr in zip(state.optimizer.param_groups, state.schedule.get_last_lr(), strict=True):
        group["lr"] = lr
    if state.average is not None:
        state.average.load_state_dict(shared["average"])
    if state.best is not None:
        state.best.load_state_dict(shared.get("best"))
    if state.accelerator.scaler is not None:
        state.accelerator.scaler.load_state_dict(shared["scaler"])
    if _read_marker(folder)["num_processes"] == state.accelerator.num_processes:
        set_random_states(_load(folder / f"random_{state.accelerator.process_index}.pt"))
    state.has_frozen = True


def publish(save_model: Callable[[Path], object], out: str | Path) -> None:
    """Let `save_model` write the finished model, then move its files into the run folder, each of them whole."""
    with whole_entries(out) as building:
        save_model(building)


def check_same(marker: dict[str, Any], accelerator: Accelerator, config: dict[str, Any], folder: Path) -> None:
    """Raise GrexError where resuming could not go on as the run began, and say what changes.

    `train.steps` may grow; the images of a step, the number of processes and the engine may change.
    """
    was, now = flatten(marker["config"]), flatten(config)
    differing = [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key) and not key.startswith(FREE)]
    if "train.steps" in differing and now["train.steps"] > was["train.steps"]:
        differing.remove("train.steps")
        accelerator.print(
            f"train.steps grows from {was['train.steps']} to {now['train.steps']}: the learning rates from here on follow the new length"
        )
    changed = [key for key in IMAGES if key in differing]
    if set(differing) - set(changed):
        listed = ", ".join(f"{key}: {was.get(key)} -> {now.get(key)}" for key in differing[:5])
        raise fault(
            f"{folder} was made with another configuration ({listed})", "the same one", "resume with it, or train into another train.out"
        )
    if changed:
        _tell_images(accelerator, was, now, marker["position"])
    engines = [(marker["num_processes"], marker["zero_stage"]), (accelerator.num_processes, zero_stage(accelerator))]
    if engines[0] != engines[1]:
        before, here = (f"{n} process{'es' * (n > 1)} {f'under ZeRO-{stage}' if stage else 'without ZeRO'}" for n, stage in engines)
        accelerator.print(f"{folder.name} was made by {before}; {here} go on: the same batches, sums in another order, dropout drawn anew")


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested dictionaries into one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def config_hash(config: dict[str, Any]) -> str:
    """Hash what decides the losses of a run; two runs with one hash and one code version are the same run."""
    decisive = {key: value for key, value in flatten(config).items() if not key.startswith(FREE)}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()[:16]


def random_states() -> dict[str, Any]:
    """Collect the states of all random generators of this process as tensors and numbers."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put the generators back; CUDA only where the number of devices is the same."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def prune(root: Path, keep: int) -> None:
    """Remove unfinished folders and all but the newest `keep` complete checkpoints (at least one stays)."""
    complete = [folder for folder in sorted(root.glob("step_*"), reverse=True) if is_complete(folder)]
    kept = set(complete[: max(keep, 1)])
    for folder in [*root.glob("step_*"), *root.glob(".building_*"), *root.glob(".old_*")]:
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def _write_tensors(state: RunState, root: Path, building: Path) -> None:
    """Write weights and optimizer state, and before the first checkpoint the frozen weights; all processes call it."""
    writes = state.accelerator.is_main_process
    write_entries(building / MODEL if writes else None, weight_entries(weights(state.model, trainable=True)))
    write_entries(building / OPTIMIZER if writes else None, optimizer_entries(state.model, state.optimizer, state.engine))
    frozen = weights(state.model, trainable=False)
    if frozen and not state.has_frozen:
        unfinished = root / f".building_{FROZEN}"
        write_entries(unfinished if writes else None, weight_entries(frozen))
        if writes:
            flush(unfinished)
            take_place(unfinished, root / FROZEN)
    state.has_frozen = True


def _shared(state: RunState) -> dict[str, Any]:
    """Return what is equal on all processes, beside weights and optimizer state."""
    return {
        "schedule": state.schedule.state_dict(),
        "average": state.average.state_dict() if state.average is not None else None,
        "scaler": state.accelerator.scaler.state_dict() if state.accelerator.scaler is not None else None,
        "best": state.best.state_dict() if state.best is not None else None,
    }


def _seal(state: RunState, building: Path, position: Position) -> None:
    """Flush all files to disk, then write the marker that lists them."""
    frozen = building.parent / FROZEN
    marker = {
        "format": FORMAT,
        "position": asdict(position),
        "num_processes": state.accelerator.num_processes,
        "zero_stage": zero_stage(state.accelerator),
        "torch": torch.__version__,
        "frozen_bytes": frozen.stat().st_size if weights(state.model, trainable=False) else 0,
        "config_hash": config_hash(state.config),
        "config": state.config,
        "files": {file.relative_to(building).as_posix(): file.stat().st_size for file in sorted(building.rglob("*")) if file.is_file()},
    }
    flush(building)
    (building / MARKER).write_text(json.dumps(marker, indent=1), encoding="utf-8")
    flush_entry(building / MARKER)
    flush_entry(building)


def _load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_marker(folder: Path) -> dict[str, Any]:
    """Read what a checkpoint says about itself.

    Raises:
        GrexError: it has another format.
    """
    marker: dict[str, Any] = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    if marker["format"] != FORMAT:
        raise fault(
            f"{folder} is a checkpoint of format {marker['format']}, of another version of grex-mllm",
            f"format {FORMAT}",
            "finish that run with the version that began it, or train into another train.out (train.start takes a model folder)",
        )
    return marker


def _tell_images(accelerator: Accelerator, was: dict[str, Any], now: dict[str, Any], position: dict[str, int]) -> None:
    """Say what another train.batch_images or train.accumulation does from here on."""
    named = " and ".join(f"{key} from {was[key]} to {now[key]}" for key in IMAGES if was[key] != now[key])
    before, here = (values[IMAGES[0]] * values[IMAGES[1]] for values in (was, now))
    left = now["train.steps"] - position["step"]
    accelerator.print(
        f"{named}: the data go on at image {position['images']}, the next one; the schedule counts steps, so the learning rates stay those "
        f"of the {left} steps that are left, which read {left * here} images instead of {left * before}"
    )
