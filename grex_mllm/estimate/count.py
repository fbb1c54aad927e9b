"""Count what a training step needs: parameters by part, bytes that live at once, floating-point operations."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from grex_mllm.config import Config
from grex_mllm.estimate.model import Load, build, made_batch
from grex_mllm.estimate.shapes_only import Live, OnZeros, as_on_cpu, gpu_casts
from grex_mllm.models.language_model import is_base_key
from grex_mllm.models.placement import Placement, placed
from grex_mllm.ops.paths import as_on_gpu
from grex_mllm.training.optim import build_optimizer, clip_gradients, optimized_parameters
from grex_mllm.training.step import Step


@dataclass
class Part:
    """Parameters of a part of the model: all of them, and those that train."""

    total: int = 0
    trainable: int = 0


@dataclass
class Counted:
    """What a step of one process needs. Bytes, but for parts and operations.

    frozen, trainable: weights.  quantisable: of the frozen ones, the matrices that 4 and 8 bits can hold, and the parameters in them.
    gradients, state: of all that trains.
    peak: most at once in forward and backward pass.  peak_without_gradients: the same without the gradients of weights.
    update: most at once in clipping and the optimizer's step, beyond gradients and state.
    forward_flops, flops: of the step, its forward pass alone and all of it.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    frozen: int = 0
    trainable: int = 0
    quantisable: int = 0
    quantisable_parameters: int = 0
    largest_matrix: int = 0
    largest_layer: int = 0
    gradients: int = 0
    state: int = 0
    peak: int = 0
    peak_without_gradients: int = 0
    update: int = 0
    forward_flops: float = 0.0
    flops: float = 0.0


def count(config: Config, load: Load, *, device: str, precision: str) -> Counted:
    """Run one training step of a configuration (from `standing_alone`) on shapes and count.

    device: cpu, or cuda: the ways that operations take there, its autocast; no GPU is needed.  precision: fp32, bf16 or fp16.
    """
    with placed(Placement(precision=precision)):
        model = build(config)
    as_on_cpu(model)
    step = Step(model, config, "bf16" if precision == "fp16" else precision)
    optimizer = build_optimizer(model, config.train.optim, "bf16" if precision == "fp16" else precision)
    trained = optimized_parameters(optimizer)
    chosen = {id(parameter) for parameter in trained}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    found = Counted(_parts(model))
    _weights(found, model)
    batch = made_batch(config, model, load)
    live = Live()
    step.criterion = OnZeros(step.criterion, live)
    step.train()
    for tensor in (*step.parameters(), *step.buffers()):
        live.ignore(tensor)
    for weight in trained:
        weight.register_post_accumulate_grad_hook(live.own)
    with ExitStack() as stack:
        if device != "cpu":
            stack.enter_context(as_on_gpu())
            if precision != "fp32":
                stack.enter_context(gpu_casts())
        operations = stack.enter_context(FlopCounterMode(display=False))
        stack.enter_context(live)
        total = step(batch)["total"]
        found.forward_flops = float(operations.get_total_flops())
        total.backward()
        found.flops = float(operations.get_total_flops())
    del total
    found.peak, found.peak_without_gradients = live.peak, live.peak_without_gradients
    found.gradients = live.gradient_bytes
    with live:
        before = live.bytes
        optimizer.step()
        found.state = live.bytes - before
        live.restart()
        clip_gradients(trained, config.train.optim.clip)
        optimizer.step()
    found.update = live.peak - before - found.state
    return found


def _parts(model: nn.Module) -> dict[str, Part]:
    parts: dict[str, Part] = {}
    for name, parameter in model.named_parameters():
        part = parts.setdefault(_part_of(name), Part())
        part.total += parameter.numel()
        part.trainable += parameter.numel() if parameter.requires_grad else 0
    return parts


def _part_of(name: str) -> str:
    room, part = name.split(".")[:2]
    if room == "grounding":
        return {"vision": "image encoder", "text": "text encoder", "pixel_decoder": "pixel decoder"}.get(part, part)
    if part == "lm":
        return "language model" if is_base_key(name) else "adapters"
    return part.replace("_", " ")


def _weights(found: Counted, model: Any) -> None:
    seen: set[int] = set()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.requires_grad:
            found.trainable += _bytes(tensor)
        else:
            found.frozen += _bytes(tensor)
    lm = getattr(model.generator, "lm", None)
    if lm is None:
        return
    head = lm.get_output_embeddings()
    for name, module in lm.named_modules():
        base = [p for key, p in module.named_parameters(recurse=False) if is_base_key(f"{name}.{key}") and id(p) not in seen]
        seen |= {id(p) for p in base}
        matrix = isinstance(module, nn.Linear) and module is not head
        for p in [p for p in base if matrix and p.ndim == 2]:
            found.quantisable += _bytes(p)
            found.quantisable_parameters += p.numel()
            found.largest_matrix = max(found.largest_matrix, _bytes(p))
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList))
    layers = [_bytes_of(layer) for found_list in lists for layer in found_list]
    singles = [_bytes_of(m) for m in model.modules() if isinstance(m, nn.Embedding | nn.Linear)]
    found.largest_layer = max([*layers, *singles], default=0)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes_of(module: nn.Module) -> int:
    return sum(_bytes(p) for p in module.parameters())
