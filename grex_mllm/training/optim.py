"""Parameter groups, optimisers, schedules and gradient clipping.

Two ways to group: `released` is what the authors' code of ReLA does (learning rate 1e-5 for everything, its decay rules, parts of BERT
left out); `default` is the usual rule that no bias, norm, embedding or other non-matrix is decayed. Adapters have a decay of
their own, 0 unless set.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from grex_mllm.config import OptimConfig
from grex_mllm.errors import fault
from grex_mllm.training.muon import BatchedMuon, muon_dtype

RELEASED_TEXT_LAYERS = range(10)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d)
TEXT = re.compile(r"(^|\.)text\.")
TEXT_LAYER = re.compile(r"(^|\.)text\.(.*\.)?encoder\.layer\.(\d+)\.")
ADAPTER = re.compile(r"(^|[._])lora_")
BIAS_TABLE = "relative_position_bias_table"
# output layers, adapters, and the offsets of deformable attention (zero at first, in pixels); thin heads are known by shape
NOT_HIDDEN = re.compile(r"(^|[._])(heads?|embed_tokens|lora_[AB]|sampling_offsets)(\.|$)")
SMALLEST_MUON_SIDE = 16


class JoinedOptimizer(Optimizer):
    """Several optimisers that look like one: one `param_groups`, one `state`, one `state_dict`; `step` runs each on its groups.

    Learning-rate schedulers, gradient scalers and Accelerate's `prepare` see an ordinary torch optimizer.
    """

    def __init__(self, parts: list[Optimizer]) -> None:
        self._parts = parts
        self._sizes = [len(part.param_groups) for part in parts]
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._link()

    def _link(self) -> None:
        """Let the parts work on this object's own groups and state; loading a state dict makes new ones."""
        start = 0
        for part, size in zip(self._parts, self._sizes, strict=True):
            part.param_groups = self.param_groups[start : start + size]
            part.state = self.state
            start += size

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._link()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


def build_optimizer(model: nn.Module, config: OptimConfig, precision: str = "fp32", device: str = "cpu") -> Optimizer:
    """Make AdamW or plain SGD over the parameter groups that the configuration asks for, or Muon for hidden matrices joined with it.

    Muon (Jordan 2024) orthogonalises the momentum of a matrix; torch's `match_rms_adamw` scaling (Moonshot 2025) is on, so that its
    learning rate has AdamW's scale.  precision: the resolved one of the training, which Muon's matrix products follow.  device: the type of
    the device that it will step on; on CUDA AdamW is one fused kernel (a CPU's rounds differently, and fp16's scaler skips steps itself).

    Raises:
        GrexError: unknown `name`, `groups` or `text`, or Muon with the released groups (which are defined for AdamW).
    """
    if config.name not in ("adamw", "sgd"):
        raise fault(f'train.optim.name is "{config.name}"', '"adamw" or "sgd"', "choose one of them")
    if config.groups not in ("default", "released"):
        raise fault(f'train.optim.groups is "{config.groups}"', '"default" or "released"', "choose one of them")
    released = config.groups == "released"
    if released and config.muon:
        raise fault("train.optim.muon is on with the released groups", "AdamW there", 'set groups to "default", or muon to false')
    decays = dict(released_decays(model, config) if released else default_decays(model, config))
    parameters = dict(model.named_parameters())
    hidden = hidden_matrices(model, config.muon_convolutions) & decays.keys() if config.muon else set()
    hidden = {name for name in hidden if not name.startswith(tuple(config.muon_spares))}
    _check_scales(config.lr_scale, parameters)
    rest = _groups({name: decay for name, decay in decays.items() if name not in hidden}, parameters, config.lr, config.lr_scale)
    betas = (config.betas[0], config.betas[1])
    fused = True if device == "cuda" and precision != "fp16" else None
    adam, plain = partial(AdamW, lr=config.lr, betas=betas, eps=config.eps, fused=fused), partial(SGD, lr=config.lr)
    optimizer: Optimizer = adam(rest) if config.name == "adamw" else plain(rest)
    if not hidden:
        return optimizer
    matrices = _groups({name: decays[name] for name in decays if name in hidden}, parameters, config.muon_lr, config.lr_scale)
    muon = BatchedMuon(matrices, lr=config.muon_lr, momentum=config.muon_momentum, dtype=muon_dtype(precision))
    return JoinedOptimizer([muon, optimizer])


def released_decays(model: nn.Module, config: OptimConfig) -> Iterator[tuple[str, float]]:
    """Yield (name, weight decay) as the released training code has it.

    No decay for LayerNorm and GroupNorm outside the text encoder, for embedding modules (regions, level embedding of the decoder) and for
    `relative_position_bias_table`; decay for everything else, biases and the pixel decoder's level embedding included. Of the text
    encoder, layers 0 to 9 with full decay; embeddings and layers 10, 11 are not optimised (they still receive gradients: clear them with
    `model.zero_grad`). The article says the reverse, that all but the last two layers are frozen; `train.optim.text` chooses.
    """
    for name, kind, _ in _trained(model, config):
        plain = kind is nn.Embedding or name.endswith(BIAS_TABLE) or kind in NORMS
        yield name, _decay(name, config, spared=plain and not TEXT.search(name))


def default_decays(model: nn.Module, config: OptimConfig) -> Iterator[tuple[str, float]]:
    """Yield (name, weight decay): matrices and convolution kernels are decayed; norms, biases, embeddings and tables are not."""
    for name, kind, parameter in _trained(model, config):
        plain = parameter.ndim < 2 or kind in NORMS or kind is nn.Embedding or name.endswith(BIAS_TABLE)
        yield name, _decay(name, config, spared=plain or "embed" in name.rsplit(".", 1)[-1])


def hidden_matrices(model: nn.Module, convolutions: bool = False) -> set[str]:
    """Name the 2-D weights of hidden linear layers and attention projections: no embedding, head, adapter or thin matrix.

    convolutions: the kernels of hidden convolutions, too; not those that read few channels, as the first of an image encoder.
    """
    chosen = set()
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Embedding) or NOT_HIDDEN.search(prefix):
            continue
        for local, parameter in module.named_parameters(recurse=False):
            matrix = local == "in_proj_weight" or (isinstance(module, nn.Linear) and local == "weight")
            matrix = matrix or (convolutions and isinstance(module, nn.Conv2d) and local == "weight")
            if matrix and min(parameter.shape[:2]) >= SMALLEST_MUON_SIDE:
                chosen.add(f"{prefix}.{local}" if prefix else local)
    return chosen


def build_schedule(optimizer: Optimizer, config: OptimConfig, total_steps: int) -> LambdaLR:
    """Make the learning-rate schedule: a linear warm-up over a fraction of the steps, then constant, multistep, cosine or poly.

    The factor after t finished steps is: constant 1; multistep gamma to the number of milestones <= t (as released: 110,000 and 140,000,
    factor 0.1); cosine from 1 to `final_fraction` at the last step; poly (1 - t / steps)^power, as LAVT with 0.9.

    Raises:
        GrexError: unknown schedule.
    """
    if config.schedule not in ("constant", "multistep", "cosine", "poly"):
        raise fault(f'train.optim.schedule is "{config.schedule}"', '"constant", "multistep", "cosine" or "poly"', "choose one of them")
    warmup = round(config.warmup_fraction * total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.schedule == "multistep":
            return float(config.gamma ** bisect_right(sorted(config.milestones), step))
        if config.schedule == "poly":
            return float((1 - min((step - warmup) / max(total_steps - warmup, 1), 1.0)) ** config.power)
        if config.schedule == "cosine":
            done = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
            return config.final_fraction + (1 - config.final_fraction) * (1 + math.cos(math.pi * done)) / 2
        return 1.0

    return LambdaLR(optimizer, factor)


def optimized_parameters(optimizer: Optimizer) -> list[Tensor]:
    """List the tensors that the optimizer steps, in its order; gradients of other tensors take no part in clipping."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients to a global L2 norm of at most max_norm (0 leaves them) and return the norm before, a scalar tensor."""
    return nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)


def _trained(model: nn.Module, config: OptimConfig) -> Iterator[tuple[str, type[nn.Module], nn.Parameter]]:
    """Yield (name, class as in `_kinds`, parameter) of all that is optimised."""
    kinds = _kinds(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and _text_trained(name, config):
            yield name, kinds[name], parameter


def _decay(name: str, config: OptimConfig, spared: bool) -> float:
    if ADAPTER.search(name):
        return config.adapter_decay
    return 0.0 if spared else config.weight_decay


def _kinds(model: nn.Module) -> dict[str, type[nn.Module]]:
    """Map each parameter name to the torch class of the module that owns it (subclasses of norms and embeddings count as those)."""
    known = (*NORMS, nn.Embedding)
    kinds: dict[str, type[nn.Module]] = {}
    for prefix, module in model.named_modules():
        kind = next((base for base in known if isinstance(module, base)), type(module))
        for local, _ in module.named_parameters(recurse=False):
            kinds[f"{prefix}.{local}" if prefix else local] = kind
    return kinds


def _text_trained(name: str, config: OptimConfig) -> bool:
    """Tell whether `train.optim.text` lets this parameter be optimised; names outside the text encoder always may."""
    if config.text not in ("all", "released", "last_two", "none"):
        raise fault(f'train.optim.text is "{config.text}"', '"all", "released", "last_two" or "none"', "choose one of them")
    if not TEXT.search(name) or config.text == "all":
        return True
    layer = TEXT_LAYER.search(name)
    if layer is None or config.text == "none":
        return False
    return (int(layer.group(3)) in RELEASED_TEXT_LAYERS) == (config.text == "released")


def _groups(decays: dict[str, float], parameters: dict[str, nn.Parameter], lr: float, scales: dict[str, float]) -> list[dict[str, Any]]:
    """Gather parameters of equal decay and learning rate into one group each; the order of the groups and within them is the model's."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, decay in decays.items():
        start = max((start for start in scales if name.startswith(start)), key=len, default=None)
        groups.setdefault((decay, 1.0 if start is None else scales[start]), []).append(parameters[name])
    return [{"params": members, "lr": lr * scale, "weight_decay": decay} for (decay, scale), members in groups.items()]


def _check_scales(scales: dict[str, float], parameters: Mapping[str, nn.Parameter]) -> None:
    for start, scale in scales.items():
        if scale < 0 or not any(name.startswith(start) for name in parameters):
            raise fault(
                f'train.optim.lr_scale "{start}": {scale}', "the start of some parameter's name and a factor of at least 0", "fix it"
            )
