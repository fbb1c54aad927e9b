"""Private interfaces of libraries, each with the reason why the public ones do not do and the versions that it was checked with."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import version
from types import MethodType
from typing import TYPE_CHECKING, Any

from grex_mllm.errors import fault

if TYPE_CHECKING:
    from torch import Tensor, nn

# package -> (first version checked, first one no longer checked)
CHECKED = {"accelerate": ("1.15", "1.16"), "deepspeed": ("0.19.8", "0.20"), "numpy": ("2.0", "2.5"), "peft": ("0.21", "0.22")}
CHECKED |= {"torch": ("2.8", "2.14"), "transformers": ("5.17", "5.25")}
KEPT_SUM = "grex_kept_sum"  # of a layer within `adapters_folded_once`


@cache
def check_version(package: str) -> None:
    """Warn, once a process, where a package has another version than those that its private interfaces were checked with."""
    found, (first, beyond) = version(package), CHECKED[package]
    if not _numbers(first) <= _numbers(found) < _numbers(beyond):
        warnings.warn(
            f"{package} {found} is installed; its private interfaces were checked with versions from {first} to below {beyond}; "
            f"if something fails, pip install '{package}>={first},<{beyond}'",
            stacklevel=2,
        )


def private(package: str, owner: Any, name: str) -> Any:
    """Return a private attribute. owner: an object of the package, or the dotted name of a module.

    Raises:
        GrexError: this version of the package does not have it.
    """
    check_version(package)
    try:
        return getattr(import_module(owner) if isinstance(owner, str) else owner, name)
    except (AttributeError, ImportError):
        place = owner if isinstance(owner, str) else getattr(owner, "__name__", type(owner).__name__)
        first, beyond = CHECKED[package]
        raise fault(
            f"{package} {version(package)} has no {place}.{name}",
            f"a version from {first} to below {beyond}, which has",
            f"pip install '{package}>={first},<{beyond}'",
        ) from None


@cache
def cache_name() -> str:
    """Return how transformers names keys and values of what was read, as an argument and in outputs: it was `past_key_values` once."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def cache_of(output: Any) -> Any:
    """Return the keys and values in the output of a language model."""
    return getattr(output, cache_name())


def foreach(operation: str) -> Callable[..., Any]:
    """Return torch's operation ("lerp_", "mul_", ...) over lists of tensors; its optimisers run it inside, and nothing public does.

    A loop in Python takes several times as long where tensors are small.
    """
    function: Callable[..., Any] = private("torch", "torch", f"_foreach_{operation}")
    return function


def fake_mode() -> Any:
    """Return a mode of torch's tensors that have shape, dtype and device, but no memory; the meta device knows no autocast and no CPU."""
    return private("torch", "torch._subclasses.fake_tensor", "FakeTensorMode")(allow_non_fake_inputs=True)


def reading_of_a_number() -> Any:
    """Return the operation behind `Tensor.item`, which shows at which places code wants the values of tensors."""
    import torch

    return private("torch", torch.ops.aten, "_local_scalar_dense").default


def is_fake(tensor: Any) -> bool:
    """Tell whether a tensor is one of `fake_mode`."""
    return isinstance(tensor, private("torch", "torch._subclasses.fake_tensor", "FakeTensor"))


def array_builders() -> dict[str, Any]:
    """Return what pickles call to rebuild arrays, dotted name in numpy 1 or 2 -> function; numpy promises only to read its pickles."""
    found: dict[str, Any] = {}
    for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer")):
        function = private("numpy", f"numpy._core.{module}", name)
        found |= {f"{package}.{module}.{name}": function for package in ("numpy.core", "numpy._core")}
    return found


def forget_accelerator(processes: bool) -> None:
    """Forget Accelerate's settings, so that the next Accelerator of this process may have another precision; processes: forget them, too.

    The public `Accelerator.free_memory` keeps the settings, and `AcceleratorState.destroy_process_group` ends the process group.
    """
    private("accelerate", private("accelerate", "accelerate.state", "AcceleratorState"), "_reset_state")(reset_partial_state=processes)
    private("accelerate", private("accelerate", "accelerate.state", "GradientState"), "_reset_state")()


def leave_out_shm_comm() -> None:
    """Keep DeepSpeed from compiling its all-reduce over shared memory: that takes a minute and a compiler; gloo does without.

    DS_BUILD_SHM_COMM=0, the public switch, is read when DeepSpeed is installed, and not when it compiles at run time.
    """
    private("deepspeed", "deepspeed.ops", "__compatible_ops__")["deepspeed_shm_comm"] = False


def processes_of_this_node() -> Any:
    """Return the group of processes that share a copy of the weights under `zero_hpz_partition_size`; None where there is none yet.

    `deepspeed.zero.Init` makes the group, fails where there is one, and takes it as an argument; nothing public returns it.
    """
    return private("deepspeed", "deepspeed.utils.groups", "_get_zero_param_intra_parallel_group")()


def partitions_made_here() -> AbstractContextManager[None]:
    """Keep transformers, within the block, from a `deepspeed.zero.Init` of its own inside ours, and from initialising what will be read."""
    entered: AbstractContextManager[None] = private("transformers", "transformers.modeling_utils", "set_zero3_state")()
    return entered


def names_in_model(model: Any, names: list[str]) -> list[str]:
    """Return the names that a model's own tensors have, of names in the files of a folder; transformers saves some under older ones.

    `from_pretrained` renames while it reads; nothing public tells the names alone. What it would merge or split keeps its name.
    """
    renaming = private("transformers", "transformers.core_model_loading", "WeightRenaming")
    rules = [r for r in private("transformers", "transformers.conversion_mapping", "get_model_conversion_mapping")(model)
             if isinstance(r, renaming)]  # fmt: skip
    found = []
    for name in names:
        for rule in rules:
            name = private("transformers", rule, "rename_source_key")(name)[0]
        found.append(name)
    return found


def zero_partitions(optimizer: Any) -> list[tuple[list[Tensor], Tensor]]:
    """Return the flat float32 partitions of this process that DeepSpeed's ZeRO optimizer steps, each with the parameters in it.

    The functions of `deepspeed.utils` read and write the state of one parameter, but only a state that exists: nothing public makes it
    before the first step.
    """
    stage3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    members, flat = ("fp16_groups", "fp32_partitioned_groups_flat") if stage3 else ("bit16_groups", "single_partition_of_fp32_groups")
    pairs = zip(private("deepspeed", optimizer, members), private("deepspeed", optimizer, flat), strict=True)
    return [(list(parameters), partition) for parameters, partition in pairs]


def attention_of(lm: Any) -> str:
    """Return which attention a model of transformers computes ("sdpa", "flash_attention_2", ...); it tells nowhere in public."""
    return str(private("transformers", lm.config, "_attn_implementation"))


def recompute_blocks(model: Any) -> None:
    """Turn on a transformers model's own gradient checkpointing; from 5.2x on it has another name, under which the first one warns."""
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch({"use_reentrant": False})


def fold_adapters(adapted: nn.Module) -> None:
    """Let every adapted layer compute x (W + s B A)' instead of x W' + s (x A') B': the same function and gradients, in one product.

    A third less time where weights are small next to the batch, as in a tiny LM; in a large one the sum would cost more than it saves.
    peft can merge adapters into the weights, but then they get no gradients.
    """
    kind = private("peft", "peft.tuners.lora", "Linear")
    for module in adapted.modules():
        if isinstance(module, kind):
            module.forward = MethodType(_folded, module)


@contextmanager
def adapters_folded_once(adapted: nn.Module) -> Iterator[None]:
    """Within it every layer of `fold_adapters` keeps the sum that it makes first: for writing many tokens with weights that stand still.

    Not for learning: the sum that is kept has no gradient.
    """
    import torch

    layers = [module for module in adapted.modules() if getattr(module.__dict__.get("forward"), "__func__", None) is _folded]
    for layer in layers:
        layer.__dict__[KEPT_SUM] = []
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer.__dict__.pop(KEPT_SUM, None)


def _folded(layer: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    import torch.nn.functional as F

    if layer.disable_adapters:
        return layer.base_layer(x)
    kept = layer.__dict__.get(KEPT_SUM)
    if kept:
        return F.linear(x, kept[0], layer.base_layer.bias)
    weight = layer.base_layer.weight
    for name in layer.active_adapters:
        weight = weight + layer.scaling[name] * (layer.lora_B[name].weight @ layer.lora_A[name].weight)
    if kept is not None:
        kept.append(weight)
    return F.linear(x, weight, layer.base_layer.bias)


def _numbers(text: str) -> tuple[int, ...]:
    """(major, minor, patch) of a version; what is not there counts as 0."""
    found = [int(number) for number in re.findall(r"\d+", text.split("+")[0])[:3]]
    return (*found, 0, 0)[:3]
