"""Start Accelerate, with or without DeepSpeed, on whatever the launcher gave: one CPU, one GPU, many processes, many nodes."""

from __future__ import annotations

import copy
import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from grex_mllm.compat import forget_accelerator, leave_out_shm_comm
from grex_mllm.config import TrainConfig
from grex_mllm.errors import GrexError, fault
from grex_mllm.models.lm_loading import partitioned_lm
from grex_mllm.models.placement import Placement
from grex_mllm.precision import DTYPES, Resolved, resolve_precision
from grex_mllm.shipped import find_file
from grex_mllm.training.optim import JoinedOptimizer

if TYPE_CHECKING:
    from accelerate import Accelerator

COLLECTIVE_S = 1800.0  # what torch waits for other processes, at least


def start_accelerator(config: TrainConfig, batch_images: int) -> Accelerator:
    """Join the other processes and return the Accelerator. batch_images: images of one batch on one process, which DeepSpeed wants to know.

    Raises:
        GrexError: unknown precision, fp16 where it cannot work, DeepSpeed missing or its JSON unusable.
    """
    device = training_device()
    on_cpu = device.type == "cpu"
    check_precision(wanted_precision(config), device.type)
    plugin = deepspeed_plugin(config, batch_images, on_cpu=on_cpu) if config.deepspeed else None

    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    forget_accelerator(processes="RANK" not in os.environ)  # a second run of one process may have another precision; process groups stay
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    handlers: list[Any] = []
    if "RANK" in os.environ:
        # without the backend every rank of DeepSpeed on CPU believes that it is alone; the watch speaks before the collectives give up
        limit = timedelta(seconds=max(COLLECTIVE_S, 2 * config.hang_s))
        handlers.append(InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=limit))
    accelerator = Accelerator(
        cpu=on_cpu and plugin is None,  # with cpu=True Accelerate would silently drop DeepSpeed
        mixed_precision="fp16" if wanted_precision(config) == "fp16" else "no",  # only for its gradient scaler: Step does the autocast
        gradient_accumulation_steps=config.accumulation,
        deepspeed_plugin=plugin,
        kwargs_handlers=handlers,
    )
    if plugin is not None and not is_deepspeed(accelerator):
        raise fault(
            "Accelerate has switched DeepSpeed off", "ACCELERATE_USE_CPU not to be set", "launch with torchrun or deepspeed, without --cpu"
        )
    return accelerator


def training_device() -> torch.device:
    """Return the kind of device that a training computes on: the machine's accelerator, or the CPU."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device if device is not None else torch.device("cpu")


def wanted_precision(config: TrainConfig) -> str:
    """Return the configured precision; under DeepSpeed bf16 in the place of fp16, because bf16 needs no scaled loss."""
    return "bf16" if config.precision == "fp16" and config.deepspeed is not None else config.precision


def check_precision(precision: str, device: str) -> None:
    """Raise GrexError for a precision that does not exist or cannot work there."""
    if precision not in ("auto", *DTYPES):
        raise fault(f'train.precision is "{precision}"', f"one of auto, {', '.join(DTYPES)}", "choose one of them")
    if precision == "fp16" and device != "cuda":
        raise fault(f"train.precision is fp16 on {device}", "a CUDA GPU for fp16", 'set train.precision to "bf16" or "fp32"')


def agreed_precision(accelerator: Accelerator, config: TrainConfig) -> Resolved:
    """Return the precision that all processes use: float32 where `auto` finds that for one of them."""
    own = resolve_precision(wanted_precision(config), accelerator.device)
    if wanted_precision(config) != config.precision:
        return replace(own, reason=f"{config.precision} is configured; under DeepSpeed it is bf16, which needs no scaled loss")
    if config.precision != "auto" or accelerator.num_processes == 1:
        return own
    votes = accelerator.gather(torch.tensor([own.precision == "bf16"], device=accelerator.device, dtype=torch.int64))
    if own.precision == "bf16" and not bool(votes.all()):
        return Resolved("fp32", f"process {int(votes.argmin())} does not compute in bfloat16 natively")
    return own


def check_deepspeed(path: str) -> dict[str, Any]:
    """Read a DeepSpeed JSON and check what the training loop needs of it.

    Raises:
        GrexError: package or file missing, no JSON object, no ZeRO stage, offload to NVMe, or a section that belongs to the training
            configuration.
    """
    from importlib.util import find_spec

    if find_spec("deepspeed") is None:
        raise fault(
            f"train.deepspeed is {path}", "the package deepspeed to be installed", "pip install deepspeed, or leave train.deepspeed out"
        )
    file = find_file(path)
    if not file.is_file():
        raise fault(f"train.deepspeed {path} does not exist", "a JSON file", "give one of deepspeed_configs/*.json")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise fault(f"train.deepspeed {path} is no JSON ({error})", "a JSON object", "fix the file") from None
    if not isinstance(values, dict) or values.get("zero_optimization", {}).get("stage") not in (1, 2, 3):
        raise fault(
            f"train.deepspeed {path} has no zero_optimization.stage of these", "stage 1, 2 or 3", "start from deepspeed_configs/zero2.json"
        )
    for section in ("offload_optimizer", "offload_param"):
        if values["zero_optimization"].get(section, {}).get("device") == "nvme":
            raise fault(f"train.deepspeed {path} has {section} to nvme", '"cpu", which checkpoints are made from', "offload to the CPU")
    for section in ("optimizer", "scheduler", "bf16", "fp16", "torch_autocast", "amp"):
        if section in values:
            raise fault(
                f'train.deepspeed {path} has a section "{section}"',
                "optimiser, schedule and precision from the training configuration",
                "remove it; set train.optim and train.precision",
            )
    return values


def stage_of(path: str) -> int:
    """Return the ZeRO stage of a DeepSpeed JSON; raises as `check_deepspeed`."""
    return int(check_deepspeed(path)["zero_optimization"]["stage"])


def prepare(accelerator: Accelerator, module: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Any]:
    """Hand module and optimizer to Accelerate; returns them wrapped.

    The schedule is not handed over: Accelerate would step it once for every process.

    Raises:
        GrexError: Muon under ZeRO, which flattens the matrices that Muon needs.
    """
    if is_deepspeed(accelerator) and isinstance(optimizer, JoinedOptimizer):
        raise fault(
            "train.optim.muon is on with DeepSpeed", "AdamW there, because ZeRO flattens the matrices", "set train.optim.muon to false"
        )
    if zero_stage(accelerator) == 3:
        module.to(accelerator.device)  # DeepSpeed does not where a part of it lies in partitions already
    wrapped, prepared = accelerator.prepare(module, optimizer)
    return wrapped, prepared


def own_placement(accelerator: Accelerator, config: TrainConfig) -> Placement:
    """Return where this process loads a language model and in which precision; under ZeRO-3 all processes share its weights."""
    zero3 = None
    if zero_stage(accelerator) == 3:
        sections = accelerator.state.deepspeed_plugin.deepspeed_config
        zero3 = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": sections["zero_optimization"]}
    return Placement(accelerator.device, agreed_precision(accelerator, config).precision, zero3)


def votes(accelerator: Accelerator, *mine: torch.Tensor | int) -> list[list[int]]:
    """Exchange a few whole numbers of every process: one small collective. Returns them by rank; all processes call it."""
    numbers = torch.stack([torch.as_tensor(number, dtype=torch.int64, device=accelerator.device) for number in mine])
    found = numbers[None] if accelerator.num_processes == 1 else accelerator.gather(numbers[None])
    return [[int(number) for number in row] for row in found.tolist()]


def gathered(accelerator: Accelerator, mine: Any) -> list[Any]:
    """Exchange a plain object of every process, by rank; all processes call it."""
    if accelerator.num_processes == 1:
        return [mine]
    from accelerate.utils import gather_object

    return list(gather_object([mine]))


@contextmanager
def failing_together(accelerator: Accelerator) -> Iterator[None]:
    """Raise what one process raises within the block on all of them, so that none waits for it.

    Raises:
        GrexError: the first of them by rank.
    """
    problem = ""
    try:
        yield
    except GrexError as error:
        problem = str(error)
    found = [text for text in gathered(accelerator, problem) if text]
    if found:
        raise GrexError(found[0])


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Tell whether DeepSpeed does backward pass and optimizer step."""
    return str(accelerator.distributed_type.value) == "DEEPSPEED"


def zero_stage(accelerator: Accelerator) -> int | None:
    """Return the ZeRO stage, None without DeepSpeed."""
    return int(accelerator.state.deepspeed_plugin.zero_stage) if is_deepspeed(accelerator) else None


def whole_shape(tensor: Any) -> tuple[int, ...]:
    """Return the shape of a tensor, also of a parameter that ZeRO-3 has taken apart."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


@contextmanager
def whole_parameter(tensor: Tensor, modify: bool = False) -> Iterator[None]:
    """Gather one parameter within the block if ZeRO-3 has taken it apart; all processes call it.

    modify: what the first process puts there within the block stays.
    """
    if not hasattr(tensor, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0 if modify else None):
        yield


def spare_copy(module: nn.Module) -> nn.Module:
    """Return a copy for `whole_copy`, made before DeepSpeed takes the module; a language model in partitions is shared, not copied."""
    lm = partitioned_lm(module)
    return copy.deepcopy(module, {} if lm is None else {id(lm): lm})


@contextmanager
def whole_weights(accelerator: Accelerator, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let the main process see these parameters whole within the block; all processes call it.

    Under ZeRO-3 they are gathered one at a time and lie on the main process's CPU for that time; elsewhere they are whole already.
    """
    split: list[tuple[Tensor, Tensor]] = []
    for parameter in parameters:
        if hasattr(parameter, "ds_id"):
            with whole_parameter(parameter):
                if accelerator.is_main_process:
                    split.append((parameter, parameter.detach().to("cpu", copy=True)))
    left = [parameter.data for parameter, _ in split]
    try:
        for parameter, whole in split:
            parameter.data = whole
        yield
    finally:
        for (parameter, _), part in zip(split, left, strict=True):
            parameter.data = part


@contextmanager
def whole_copy(accelerator: Accelerator, module: nn.Module, spare: nn.Module | None) -> Iterator[nn.Module]:
    """Yield a module that answers in evaluation mode: the module itself, or `spare`, a copy that gets its weights (ZeRO-3).

    The hooks of ZeRO-3 fetch weights together on all processes, and so allow no process to compute more or less than the others. What
    `spare` shares with the module, a language model in partitions, stays so: its calls go through `in_lockstep`.
    """
    if spare is None:
        module.eval()
        yield module
        return
    pairs: list[tuple[Tensor, Tensor]] = list(zip(spare.parameters(), module.parameters(), strict=True))
    pairs = [(own, theirs) for own, theirs in pairs if own is not theirs]
    kept = [(own, theirs) for own, theirs in zip(spare.buffers(), module.buffers(), strict=True) if own is not theirs]
    with torch.no_grad():
        for own, theirs in pairs:
            with whole_parameter(theirs):
                own.copy_(theirs)
        for own, theirs in kept:
            own.copy_(theirs)
    copied = [own for own, _ in (*pairs, *kept)]
    for own in copied:
        own.data = own.data.to(accelerator.device)
    spare.eval()
    try:
        yield spare
    finally:
        for own in copied:
            own.data = own.data.to("cpu")


@contextmanager
def determinism(device: torch.device) -> Iterator[None]:
    """Make two runs on one CPU equal: the gradient of tensor indexing adds in no fixed order otherwise. GPUs keep their fast kernels."""
    switches: Any = torch.utils.deterministic
    before, fill = torch.are_deterministic_algorithms_enabled(), switches.fill_uninitialized_memory
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        switches.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=torch.is_deterministic_algorithms_warn_only_enabled())
        switches.fill_uninitialized_memory = fill


def is_main_process() -> bool:
    """Tell, before and after the processes have met, whether this is the one that writes files."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for(path: Path, limit_s: float = 3600.0) -> None:
    """Wait until the main process has made a file or folder (by renaming); for what is made before the processes meet.

    Raises:
        GrexError: it is not there after `limit_s`, for instance because the nodes do not share train.out.
    """
    limit = time.monotonic() + limit_s
    while not path.exists():
        if time.monotonic() > limit:
            raise fault(f"{path} is not there after {limit_s:.0f} s", "that the main process makes it", "let all nodes share train.out")
        time.sleep(0.2)


def leave(status: int = 0) -> None:
    """End this process if it is one of several on CPU; call it last of all. Elsewhere it returns.

    A thread of gloo can abort an interpreter that ends in the usual way, when all work is done ("terminate called without an active
    exception").
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_backend() != "gloo":
        torch.distributed.destroy_process_group()
        return
    if status == 0:  # after a failure the others may never arrive
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def deepspeed_plugin(config: TrainConfig, batch_images: int, on_cpu: bool) -> Any:
    """Return Accelerate's plugin for `train.deepspeed`, its "auto" numbers filled from the training configuration.

    Raises:
        GrexError: as `check_deepspeed`; a number that contradicts the configuration; processes that do not fill their nodes.
    """
    assert config.deepspeed is not None
    values = check_deepspeed(config.deepspeed)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    filled: dict[str, float] = {
        "train_batch_size": batch_images * config.accumulation * processes,
        "train_micro_batch_size_per_gpu": batch_images,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.optim.clip,
    }
    for key, value in filled.items():
        if values.get(key, "auto") == "auto":
            values[key] = value
        elif values[key] != value:
            raise fault(
                f"{config.deepspeed}: {key} is {values[key]}", f'{value}, as the training configuration says, or "auto"', 'write "auto"'
            )
    _check_nodes(config.deepspeed, values["zero_optimization"].get("zero_hpz_partition_size", 1), processes)
    for name, text in _lone_process().items():
        os.environ.setdefault(name, text)
    if on_cpu:
        leave_out_shm_comm()
    from accelerate.utils import DeepSpeedPlugin

    return DeepSpeedPlugin(hf_ds_config=values, zero3_init_flag=False)


def _check_nodes(path: str, size: int, processes: int) -> None:
    """Raise GrexError where `zero_hpz_partition_size` leaves a node with fewer processes than the others."""
    if isinstance(size, int) and processes % max(1, min(size, processes)):
        raise fault(
            f"{path} has zero_hpz_partition_size {size}, and there are {processes} processes",
            "a number of processes that it divides, because each group of that many holds a copy of the weights",
            "write the number of processes of a node there, or use deepspeed_configs/zero3.json",
        )


def _lone_process() -> dict[str, str]:
    """What a launcher would have set for one process; without it DeepSpeed asks for mpi4py."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
