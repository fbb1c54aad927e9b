"""Where and how the language model of a generator is loaded: on which device, in which type, whole or in partitions (ZeRO-3)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Placement:
    """device: that of this process.  precision: what is computed in (fp32 | bf16 | fp16).

    zero3: a configuration for `deepspeed.zero.Init` where the processes, which have met, share the weights of a frozen language model;
    None = each of them holds it whole.
    """

    device: torch.device = CPU
    precision: str = "fp32"
    zero3: dict[str, Any] | None = None


_CURRENT: ContextVar[Placement | None] = ContextVar("placement", default=None)  # a generator's contract names no devices


def placement() -> Placement:
    """Return the placement of the model that is being built; outside of `placed` a CPU, float32 and the whole model."""
    return _CURRENT.get() or Placement()


@contextmanager
def placed(chosen: Placement) -> Iterator[None]:
    """Let models that are built within the block load their language models so."""
    token = _CURRENT.set(chosen)
    try:
        yield
    finally:
        _CURRENT.reset(token)
