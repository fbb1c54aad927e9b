"""Which of two ways an operation takes: one is written for processors, the other for every other device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_STATE = {"as_on_gpu": False}


def on_cpu(x: Tensor) -> bool:
    """Tell whether an operation on x takes the way for processors."""
    return x.device.type == "cpu" and not _STATE["as_on_gpu"]


def traced() -> bool:
    """Tell whether a model is being recorded for another runtime or compiled: then nothing may depend on the values at hand."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Let operations on a processor take the ways of a GPU within the block: what a GPU would need is counted without one."""
    _STATE["as_on_gpu"] = True
    try:
        yield
    finally:
        _STATE["as_on_gpu"] = False
