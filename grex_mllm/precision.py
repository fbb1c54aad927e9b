"""Which device a machine computes on, and in which floating-point type: bfloat16 where it multiplies that natively, else float32.

Processors without bfloat16 units emulate it at a hundredth of float32's speed, so `auto` asks the machine instead of assuming.
"""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from grex_mllm.errors import fault

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUGH_SIDE, TRIAL_SIDE, TRIAL_RUNS = 96, 256, 5  # of the square matrices; a few milliseconds in all
NATIVE_SPEEDUP = 1.2  # of bfloat16 over float32; units in hardware give 2 and more, emulation 0.01 to 1
EMULATED = 0.2  # a small product at less of float32's speed is emulated; native units, which first turn its matrices, show 0.5
WARNED_SLOWDOWN = 2.0


def pick_device(name: str) -> str:
    """Return the torch device of a name; "auto" takes a GPU where there is one.

    Of several processes on one machine (`torchrun`), each takes a GPU of its own for "auto" and "cuda": that of its LOCAL_RANK, from the
    first again where there are fewer GPUs than processes.

    Raises:
        GrexError: a device that this machine lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and int(os.environ.get("WORLD_SIZE", 1)) > 1 and torch.cuda.device_count() > 0:
        local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", 0)))
        return f"cuda:{local_rank % torch.cuda.device_count()}"
    if name == "cpu":
        return name
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise fault(f'device "{name}" ({str(error).splitlines()[0]})', "cpu, cuda or auto", "choose one that this machine has") from None
    return name


@dataclass(frozen=True)
class Resolved:
    """precision: fp32 | bf16 | fp16.  reason: why, for the log.  warning: what a choice made by name costs on this machine, or ""."""

    precision: str
    reason: str
    warning: str = ""


def resolve_precision(name: str, device: torch.device | str) -> Resolved:
    """Turn a configured precision (auto | fp32 | bf16 | fp16) into the one to use on `device`.

    auto: bf16 on CUDA where torch says that the GPU has it, on a CPU where a matrix product is measured to be faster in it, on other
    accelerators where a trial product works; else fp32.

    Raises:
        GrexError: unknown name, or fp16 without a CUDA GPU.
    """
    device = torch.device(device)
    if name not in ("auto", *DTYPES):
        raise fault(f'precision is "{name}"', f"one of auto, {', '.join(DTYPES)}", "choose one of them")
    if name == "fp16" and device.type != "cuda":
        raise fault(f"precision is fp16 on {device.type}", "a CUDA GPU for fp16", 'set it to "auto", "bf16" or "fp32"')
    if name == "fp32" or name == "fp16":
        return Resolved(name, "as configured")
    if device.type == "cpu":
        return _on_cpu(name)
    native = _cuda_has_bf16() if device.type == "cuda" else _bf16_works(device)
    finding = f"{device.type} {'computes' if native else 'does not compute'} in bfloat16"
    if name == "auto":
        return Resolved("bf16" if native else "fp32", finding)
    return Resolved("bf16", "as configured", "" if native else f"{finding}; it may be slow or fail: use precision auto or fp32")


def autocast(precision: str, device_type: str) -> AbstractContextManager[object]:
    """Return the context in which a forward pass runs in a resolved precision; fp32 changes nothing."""
    if precision not in DTYPES:
        raise fault(f'precision is "{precision}"', f"one of {', '.join(DTYPES)}", "resolve it first (resolve_precision)")
    return nullcontext() if precision == "fp32" else torch.autocast(device_type, DTYPES[precision])


@lru_cache(maxsize=1)
def bf16_speedup() -> float:
    """Measure how many times faster this CPU multiplies matrices in bfloat16 than in float32; takes a few milliseconds.

    One thread, and the best of several alternating runs: other work on the machine must not decide. The first answer of a process stays.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _bf16_speedup()
    finally:
        torch.set_num_threads(threads)


def _bf16_speedup() -> float:
    rough = _speedup(ROUGH_SIDE)
    return rough if rough < EMULATED else _speedup(TRIAL_SIDE)


def _speedup(side: int) -> float:
    full = torch.rand(side, side, generator=torch.Generator().manual_seed(0))
    half = full.to(torch.bfloat16)
    best = {full.dtype: float("inf"), half.dtype: float("inf")}
    for run in range(TRIAL_RUNS + 1):
        for matrix in (full, half):
            spent = _product_s(matrix)
            if run:  # the first of each builds kernels
                best[matrix.dtype] = min(best[matrix.dtype], spent)
    return best[full.dtype] / max(best[half.dtype], 1e-9)


def _product_s(matrix: Tensor) -> float:
    start = time.perf_counter()
    torch.mm(matrix, matrix)
    return time.perf_counter() - start


def _on_cpu(name: str) -> Resolved:
    speedup = bf16_speedup()
    if speedup >= 1:
        finding = f"this CPU multiplies bfloat16 {speedup:.1f} times as fast as float32"
    else:
        finding = f"this CPU emulates bfloat16: {1 / max(speedup, 1e-9):.0f} times slower than float32"
    if name == "auto":
        return Resolved("bf16" if speedup >= NATIVE_SPEEDUP else "fp32", f"{finding}, measured")
    slow = speedup * WARNED_SLOWDOWN < 1
    return Resolved(
        "bf16", "as configured", f"{finding} (measured); expect steps that take many times longer: use precision auto" if slow else ""
    )


def _cuda_has_bf16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _bf16_works(device: torch.device) -> bool:
    try:
        trial = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
        return bool(torch.isfinite((trial @ trial).float()).all())
    except (RuntimeError, TypeError):
        return False
