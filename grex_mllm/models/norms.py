"""The normalisation of maps in pixel decoders and decoders: groups of channels, or the statistics of the batch (`model.map_norm`).

The thesis and LAVT have batch normalisation. Its statistics in training are those of all maps of a batch on one process, their padding
included, and running means answer afterwards: an answer depends on neither its batch nor other processes, but the losses of a training do,
so one process and several learn differently, and a batch of few expressions makes them coarse. A running average of the weights
(`train.optim.average_decay`) answers with the statistics of the weights themselves. Groups of channels know no batch. What normalises
tokens and regions is a layer norm in either case: padded words have no place in statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

from grex_mllm.errors import fault

GROUPS = 8
GROUP, BATCH = KINDS = ("group", "batch")
_KIND: ContextVar[str] = ContextVar("map_norm", default=GROUP)  # a decoder's contract names no norm


@contextmanager
def map_norms(kind: str) -> Iterator[None]:
    """Let models that are built within the block have this normalisation of maps.

    Raises:
        GrexError: unknown kind.
    """
    if kind not in KINDS:
        raise fault(f'model.map_norm is "{kind}"', " or ".join(KINDS), "choose one of them")
    token = _KIND.set(kind)
    try:
        yield
    finally:
        _KIND.reset(token)


def map_norm(channels: int) -> nn.Module:
    """Return the normalisation of maps [B, C, h, w] that the model which is being built has."""
    return nn.BatchNorm2d(channels) if _KIND.get() == BATCH else nn.GroupNorm(num_groups(channels, GROUPS), channels)


def num_groups(channels: int, wanted: int) -> int:
    """Return the largest number of groups up to `wanted` that divides the channels."""
    return max(g for g in range(1, wanted + 1) if channels % g == 0)
