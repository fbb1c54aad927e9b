"""Which precision a machine computes in, and the context that computes in it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grex_mllm.errors import fault

if TYPE_CHECKING:
    import torch

PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class Resolved:
    """precision: fp32 | bf16.  reason: why, for the log."""

    precision: str
    reason: str


def resolve_precision(name: str, device: torch.device) -> Resolved:
    """Return the precision that a name stands for on a device; "auto" is bf16 where a GPU multiplies it natively.

    Raises:
        GrexError: an unknown name.
    """
    import torch

    if name not in PRECISIONS:
        raise fault(f'precision "{name}"', f"one of {', '.join(PRECISIONS)}", "choose one of them")
    if name != "auto":
        return Resolved(name, "as configured")
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return Resolved("bf16", "the GPU multiplies bfloat16")
    return Resolved("fp32", f"{device.type} without native bfloat16")


def autocast(precision: str, device_type: str) -> AbstractContextManager[object]:
    """Return the context in which matrix products are computed in `precision` (fp32 | bf16); weights stay as they are."""
    import torch

    return torch.autocast(device_type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
