"""Checkpoints that are whole or absent, and resume that is exact.

A checkpoint is written into a hidden folder, flushed to disk and renamed; `checkpoint.json`, written last, lists every file
with its size. Whatever is killed at whatever moment, the newest complete checkpoint stays readable. Frozen weights (the language
model below its adapters) are written once beside the checkpoints. Nothing is unpickled freely: safetensors, JSON, and torch.load
with weights_only.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from grex_mllm.compat import deepspeed_state_classes, non_persistent_buffers
from grex_mllm.errors import fault
from grex_mllm.training.engine import is_deepspeed, zero_stage
from grex_mllm.writing import flush, flush_entry, take_place, whole_entries

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.optim.lr_scheduler import LRScheduler

    from grex_mllm.training.average import WeightAverage
    from grex_mllm.training.best import Best

FOLDER, MARKER, FROZEN, DEEPSPEED = "checkpoints", "checkpoint.json", "frozen.safetensors", "deepspeed"
FORMAT = 1
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


@dataclass
class RunState:
    """Everything that a run needs to go on. model: the user's model; wrapped: what Accelerate made of it and the losses."""

    accelerator: Accelerator
    model: nn.Module
    wrapped: nn.Module
    optimizer: Any
    schedule: LRScheduler
    average: WeightAverage | None
    config: dict[str, Any]
    best: Best | None = None


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


def save(state: RunState, out: str | Path, step: int, keep: int) -> Path:
    """Write the checkpoint of a finished step; all processes call it. Then remove all but the newest `keep`.

    DeepSpeed writes weights and optimizer state where it runs, else the main process does; every process writes its random states.
    """
    accelerator, root = state.accelerator, Path(out) / FOLDER
    target, building = root / f"step_{step:08d}", root / f".building_{step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
    accelerator.wait_for_everyone()
    torch.save(random_states(), building / f"random_{accelerator.process_index}.pt")
    if is_deepspeed(accelerator):
        state.wrapped.save_checkpoint(str(building), tag=DEEPSPEED)  # type: ignore[operator]
    if accelerator.is_main_process:
        _write_shared(state, root, building)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _seal(state, building, step)
        take_place(building, target)
        prune(root, keep)
    accelerator.wait_for_everyone()
    return target


def restore(state: RunState, folder: Path) -> int:
    """Load a checkpoint into a run and return the number of finished steps; all processes call it.

    Raises:
        GrexError: made with another configuration, model, number of processes or ZeRO stage.
    """
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    check_same(marker, state, folder)
    if is_deepspeed(state.accelerator):
        with deepspeed_unpickles_tensors_only():
            loaded, _ = state.wrapped.load_checkpoint(str(folder), tag=DEEPSPEED)  # type: ignore[operator]
        if loaded is None:
            raise fault(f"{folder} cannot be loaded by DeepSpeed", "a checkpoint of this run", "remove it; the one before is used then")
    else:
        from safetensors.torch import load_file

        frozen = load_file(folder.parent / FROZEN) if marker["frozen_bytes"] else {}
        load_weights(state.model, load_file(folder / "model.safetensors") | frozen, str(folder))
        state.optimizer.load_state_dict(_load(folder / "optimizer.pt"))
    shared = _load(folder / "state.pt")
    state.schedule.load_state_dict(shared["schedule"])
    for group, lr in zip(state.optimizer.param_groups, state.schedule.get_last_lr(), strict=True):
        group["lr"] = lr
    if state.average is not None:
        state.average.load_state_dict(shared["average"])
    if state.best is not None:
        state.best.load_state_dict(shared.get("best"))
    if state.accelerator.scaler is not None:
        state.accelerator.scaler.load_state_dict(shared["scaler"])
    set_random_states(_load(folder / f"random_{state.accelerator.process_index}.pt"))
    return int(marker["step"])


def publish(save_model: Callable[[Path], object], out: str | Path) -> None:
    """Let `save_model` write the finished model, then move its files into the run folder, each of them whole."""
    with whole_entries(out) as building:
        save_model(building)


def weights(model: nn.Module, trainable: bool) -> dict[str, Tensor]:
    """Name the trained parameters and persistent buffers, or the frozen parameters. Shared parameters appear once."""
    chosen = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad == trainable}
    if trainable:
        for prefix, module in model.named_modules():
            left_out = non_persistent_buffers(module)
            for local, buffer in module.named_buffers(recurse=False):
                if local not in left_out:
                    chosen[f"{prefix}.{local}" if prefix else local] = buffer
    return chosen


def load_weights(model: nn.Module, loaded: dict[str, Tensor], source: str) -> None:
    """Copy tensors into a model, strictly: same names, same shapes.

    Raises:
        GrexError: names the tensors that are missing, too many or of another shape.
    """
    own = weights(model, trainable=True) | weights(model, trainable=False)
    wrong = sorted(own.keys() ^ loaded.keys()) or sorted(name for name in own if own[name].shape != loaded[name].shape)
    if wrong:
        raise fault(
            f"{source}: {len(wrong)} tensors do not fit the model, {', '.join(wrong[:5])}", "the weights of this model", "check model.*"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(loaded[name])


def check_same(marker: dict[str, Any], state: RunState, folder: Path) -> None:
    """Raise GrexError where resuming could not give the losses of the uninterrupted run; `train.steps` may grow, which is announced."""
    for name, value in (("num_processes", state.accelerator.num_processes), ("zero_stage", zero_stage(state.accelerator))):
        if marker[name] != value:
            raise fault(f"{folder} was made with {name} {marker[name]}, this run has {value}", "the same", "resume as it was started")
    was, now = flatten(marker["config"]), flatten(state.config)
    differing = [key for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key) and not key.startswith(FREE)]
    if "train.steps" in differing and now["train.steps"] > was["train.steps"]:
        differing.remove("train.steps")
        state.accelerator.print(
            f"train.steps grows from {was['train.steps']} to {now['train.steps']}: the learning rates from here on follow the new length"
        )
    if differing:
        listed = ", ".join(f"{key}: {was.get(key)} -> {now.get(key)}" for key in differing[:5])
        raise fault(
            f"{folder} was made with another configuration ({listed})", "the same one", "resume with it, or train into another train.out"
        )


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


@contextmanager
def deepspeed_unpickles_tensors_only() -> Iterator[None]:
    """Let DeepSpeed's own torch.load, which asks for unrestricted unpickling, accept tensors, numbers and four harmless classes only."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(deepspeed_state_classes()):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _write_shared(state: RunState, root: Path, building: Path) -> None:
    """Write what is equal on all processes."""
    from safetensors.torch import save_file

    if not is_deepspeed(state.accelerator):
        save_file(
            {name: tensor.contiguous() for name, tensor in weights(state.model, trainable=True).items()}, building / "model.safetensors"
        )
        torch.save(state.optimizer.state_dict(), building / "optimizer.pt")
        frozen = weights(state.model, trainable=False)
        if frozen and latest(root.parent) is None:
            unfinished = root / f".building_{FROZEN}"
            save_file({name: tensor.contiguous() for name, tensor in frozen.items()}, unfinished)
            flush(unfinished)
            take_place(unfinished, root / FROZEN)
    shared = {
        "schedule": state.schedule.state_dict(),
        "average": state.average.state_dict() if state.average is not None else None,
        "scaler": state.accelerator.scaler.state_dict() if state.accelerator.scaler is not None else None,
        "best": state.best.state_dict() if state.best is not None else None,
    }
    torch.save(shared, building / "state.pt")


def _seal(state: RunState, building: Path, step: int) -> None:
    """Flush all files to disk, then write the marker that lists them."""
    frozen = building.parent / FROZEN
    uses_frozen = not is_deepspeed(state.accelerator) and bool(weights(state.model, trainable=False))
    marker = {
        "format": FORMAT,
        "step": step,
        "num_processes": state.accelerator.num_processes,
        "zero_stage": zero_stage(state.accelerator),
        "torch": torch.__version__,
        "frozen_bytes": frozen.stat().st_size if uses_frozen else 0,
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
