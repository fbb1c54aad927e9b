"""The normalisation of maps in pixel decoders and decoders: groups of channels, or the statistics of the batch (`model.map_norm`).

The thesis and LAVT have batch normalisation. Its statistics in training are those of all maps of a step on all processes, their padding
included, so that several processes learn what one does; a batch of few expressions makes them coarse. Running means answer afterwards: an
answer does not depend on its batch. A running average of the weights (`train.optim.average_decay`) answers with the statistics of the
weights themselves. Groups of channels know no batch. What normalises tokens and regions is a layer norm in either case: padded words have
no place in statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from grex_mllm.errors import fault
from grex_mllm.ops.losses import together

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
    return BatchNorm(channels) if _KIND.get() == BATCH else nn.GroupNorm(num_groups(channels, GROUPS), channels)


def num_groups(channels: int, wanted: int) -> int:
    """Return the largest number of groups up to `wanted` that divides the channels."""
    return max(g for g in range(1, wanted + 1) if channels % g == 0)


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation with the statistics of all processes, on any device (torch's own needs GPUs).

    Every process must call it the same number of times in a training step, as often as losses are computed together.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """Normalise maps [B, C, h, w]; B may differ between the processes."""
        if not (self.training and together()):
            return super().forward(maps)
        values, places = maps.float(), (0, 2, 3)
        sums = _Sum.apply(torch.cat([values.sum(places), values.new_tensor([values.numel() / values.shape[1]])]))
        mean, number = sums[:-1] / sums[-1], sums[-1].detach()
        centred = values - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum(places)) / number
        with torch.no_grad():
            for kept, new in ((self.running_mean, mean), (self.running_var, variance * number / (number - 1).clamp(min=1))):
                assert kept is not None and self.momentum is not None
                kept.lerp_(new.to(kept), self.momentum)
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
        scaled = centred * (self.weight / (variance + self.eps).sqrt())[:, None, None] + self.bias[:, None, None]
        return scaled.to(maps.dtype)


class _Sum(torch.autograd.Function):
    """The sum over the processes, whose gradient is the sum over theirs."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        torch.distributed.all_reduce(total)
        return total
