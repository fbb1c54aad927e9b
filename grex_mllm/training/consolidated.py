"""Weights and optimizer state by parameter name, the same for every engine: one process, DDP, each ZeRO stage, offloaded or not.

Tensors are gathered one at a time and written as they come, so no process holds more than its own share and one tensor. Base weights of
a language model that the configuration names are neither gathered nor written.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from grex_mllm.compat import zero_partitions
from grex_mllm.errors import fault
from grex_mllm.training.engine import whole_parameter, whole_shape

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
NAMES |= {torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}  # as safetensors has them
ALIGNED = 8


@dataclass
class Entry:
    """A tensor of a file. read: returns it whole; all processes call it, because it may have to be gathered."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def weights(model: nn.Module, trainable: bool) -> dict[str, Tensor]:
    """Name the trained parameters and persistent buffers, or the frozen parameters that a model folder holds.

    Frozen weights that `model.state_dict()` leaves out come from a folder that the configuration names. Shared parameters appear once.
    """
    stored = model.state_dict(keep_vars=True)
    if not trainable:
        return {name: p for name, p in model.named_parameters() if not p.requires_grad and name in stored}
    trained: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored}
    return trained | buffers


def stored_parameters(model: nn.Module) -> list[Tensor]:
    """List the parameters that a model folder holds."""
    stored = {**weights(model, trainable=True), **weights(model, trainable=False)}
    return [tensor for tensor in stored.values() if isinstance(tensor, nn.Parameter)]


def load_weights(model: nn.Module, loaded: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into a model, strictly: same names, same shapes. All processes call it, before or after ZeRO takes the weights apart.

    Raises:
        GrexError: names the tensors that are missing, too many or of another shape.
    """
    own = weights(model, trainable=True) | weights(model, trainable=False)
    wrong = sorted(own.keys() ^ loaded.keys()) or sorted(name for name in own if whole_shape(own[name]) != tuple(loaded[name].shape))
    if wrong:
        raise fault(
            f"{source}: {len(wrong)} tensors do not fit the model, {', '.join(wrong[:5])}", "the weights of this model", "check model.*"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            with whole_parameter(tensor, modify=True):
                tensor.copy_(loaded[name])


def weight_entries(tensors: Mapping[str, Tensor]) -> list[Entry]:
    """Return what `write_entries` writes of parameters and buffers; numbers of trained parameters in float32."""
    found = []
    for name, tensor in tensors.items():
        dtype = torch.float32 if tensor.requires_grad else tensor.dtype
        found.append(Entry(name, dtype, whole_shape(tensor), partial(_whole_value, tensor)))
    return found


def optimizer_entries(model: nn.Module, optimizer: Any, engine: Any | None) -> list[Entry]:
    """Return "<key>/<parameter>" -> the optimizer's state of it, float32: Adam's exp_avg, exp_avg_sq and step; Muon's momentum_buffer.

    optimizer: the one that Accelerate gave, for `engine` None.  engine: DeepSpeed's, after its first step.
    """
    found: list[Entry] = []
    if engine is None:
        for name, trained in _trained(model):
            for key, value in optimizer.state.get(trained, {}).items():
                value = torch.as_tensor(value)
                found.append(Entry(f"{key}/{name}", torch.float32, tuple(value.shape), partial(_itself, value)))
        return found
    from deepspeed.utils import safe_get_full_optimizer_state

    names: dict[Tensor, str] = {parameter: name for name, parameter in _trained(model)}
    base = engine.optimizer.optimizer
    for parameters, flat in zero_partitions(engine.optimizer):
        _link(base, flat, parameters)
        for key, value in base.state.get(flat, {}).items():
            split = torch.is_tensor(value) and value.shape == flat.shape
            for parameter in parameters:
                shape = whole_shape(parameter) if split else ()
                read = partial(safe_get_full_optimizer_state, parameter, key) if split else partial(torch.tensor, float(value))
                found.append(Entry(f"{key}/{names[parameter]}", torch.float32, shape, read))
    return found


def load_optimizer(model: nn.Module, optimizer: Any, engine: Any | None, loaded: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_entries` gave, whichever engine it came from; all processes call it.

    Under ZeRO the parameters of one flat partition share a step count: the highest of them.
    """
    kept: dict[str, dict[str, Tensor]] = {}
    for full, value in loaded.items():
        key, name = full.split("/", 1)
        kept.setdefault(name, {})[key] = value
    names: dict[Tensor, str] = {parameter: name for name, parameter in _trained(model)}
    if engine is None:
        state = optimizer.state_dict()
        order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        state["state"] = {i: {key: value.clone() for key, value in kept[name].items()} for i, name in enumerate(order) if name in kept}
        optimizer.load_state_dict(state)
        return
    base = engine.optimizer.optimizer
    for parameters, flat in zero_partitions(engine.optimizer):
        known = {member: kept[names[member]] for member in parameters if names[member] in kept}
        if known:
            _load_partition(base, flat, parameters, known)


def write_entries(path: Path | None, entries: list[Entry]) -> None:
    """Write a safetensors file tensor by tensor; all processes call it, those that do not write with path None."""
    header, end = {}, 0
    for entry in entries:
        start, end = end, end + entry.dtype.itemsize * torch.Size(entry.shape).numel()
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNED)
    if path is None:
        for entry in entries:
            entry.read()
        return
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            value = entry.read().detach().to("cpu", entry.dtype).contiguous()
            assert tuple(value.shape) == entry.shape, entry.name
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)


def _load_partition(base: Any, flat: Tensor, parameters: list[Tensor], known: dict[Tensor, dict[str, Tensor]]) -> None:
    """Make the state of one flat partition of ZeRO, which its optimizer would make in the first step, and fill in every parameter's."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    keys = {key for values in known.values() for key in values}
    made = base.state[flat]
    for key in sorted(keys - {"step"}):
        made[key] = torch.zeros_like(flat)
    if "step" in keys:
        made["step"] = _step_count(base, flat, max(float(values["step"]) for values in known.values()))
    _link(base, flat, parameters)
    for parameter, values in known.items():
        for key in sorted(keys - {"step"}):
            if hasattr(parameter, "ds_id"):  # the function for whole values takes no parameter whose size the processes do not divide
                safe_set_local_optimizer_state(parameter, _local_part(parameter, values[key]), key)
            else:
                safe_set_full_optimizer_state(parameter, values[key], key)


def _link(base: Any, flat: Tensor, parameters: list[Tensor]) -> None:
    """Let DeepSpeed's functions find the state of these parameters; ZeRO-1 and 2 do so after the first group's step, for that group."""
    if not hasattr(parameters[0], "ds_id"):
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        lazy_init_hp_params_optimizer_state(parameters, flat, base.state)


def _step_count(base: Any, flat: Tensor, number: float) -> Any:
    """Return a step count as the optimizer keeps it: torch's in a tensor, DeepSpeed's Adam on CPU in an integer."""
    if not isinstance(base, AdamW):
        return int(number)
    on_device = base.defaults.get("fused") or base.defaults.get("capturable")
    return torch.tensor(number, device=flat.device if on_device else "cpu")


def _local_part(parameter: Any, value: Tensor) -> Tensor:
    """Return what this process keeps of a tensor under ZeRO-3: equal parts of the flattened values, zeros behind the last."""
    part, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank(parameter.ds_process_group)
    mine = value.flatten()[rank * part : (rank + 1) * part]
    return torch.cat([mine, mine.new_zeros(part - len(mine))])


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _whole_value(tensor: Tensor) -> Tensor:
    with whole_parameter(tensor):
        return tensor.detach().clone()


def _itself(value: Tensor) -> Tensor:
    return value
