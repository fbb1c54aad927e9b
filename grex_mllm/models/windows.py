"""Swin's windows as gathers: which token stands where, for plain and shifted windows over maps that are padded to a multiple of the window.

A shifted map has only four kinds of windows: inner ones without a mask, those of the last row, of the last column, and the corner. Laid
out kind by kind, attention needs four masks of one window each in place of one mask per window.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# released: added to the logits of pairs that lie in different regions of the unshifted map
APART = -100.0


@dataclass(frozen=True)
class WindowLayout:
    """Where the tokens of B maps of height x width stand in their windows. T = windows * B * N slots, N = window ** 2.

    source: int64 [T] token of each slot, 0 for padding.  padding: int64 [K] slots that hold padding.
    slot: int64 [B * height * width] slot of each token.
    kinds: (first window, past the last window, mask [N, N] or None) for each kind of window; windows are times B.
    """

    source: Tensor
    padding: Tensor
    slot: Tensor
    kinds: tuple[tuple[int, int, Tensor | None], ...]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must serve training too
def window_layout(batch: int, height: int, width: int, window: int, shift: int, device: torch.device) -> WindowLayout:
    """Lay out the windows of a map that is zero-padded right and bottom to a multiple of the window, then rolled by -shift."""
    padded = torch.full((-(-height // window) * window, -(-width // window) * window), -1, dtype=torch.int64)
    padded[:height, :width] = torch.arange(height * width).view(height, width)
    if shift:
        padded = padded.roll((-shift, -shift), (0, 1))
    rows, columns = padded.shape[0] // window, padded.shape[1] // window
    tokens = padded.view(rows, window, columns, window).transpose(1, 2).reshape(rows, columns, window * window)
    if shift:
        groups = [tokens[:-1, :-1], tokens[-1:, :-1], tokens[:-1, -1:], tokens[-1:, -1:]]
    else:
        groups = [tokens]
    groups = [g.reshape(-1, window * window) for g in groups]
    kinds = []
    first = 0
    for group, mask in zip(groups, shift_masks(window, shift) if shift else [None], strict=True):
        if len(group):
            kinds.append((first, first + len(group) * batch, None if mask is None else mask.to(device)))
        first += len(group) * batch
    source = torch.cat(groups)[:, None] + (torch.arange(batch) * height * width)[:, None]
    source = torch.where(torch.cat(groups)[:, None] < 0, -1, source).flatten()
    padding = (source < 0).nonzero().flatten()
    real = (source >= 0).nonzero().flatten()
    slot = torch.empty(batch * height * width, dtype=torch.int64)
    slot[source[real]] = real
    return WindowLayout(source.clamp(min=0).to(device), padding.to(device), slot.to(device), tuple(kinds))


def shift_masks(window: int, shift: int) -> list[Tensor | None]:
    """Return the masks [N, N] of inner, last-row, last-column and corner windows: 0 within a region of the map, APART across."""
    wrapped = torch.arange(window) >= window - shift
    row = wrapped[:, None].expand(window, window).flatten()
    column = wrapped[None, :].expand(window, window).flatten()
    apart_row = row[:, None] != row[None, :]
    apart_column = column[:, None] != column[None, :]
    return [None, *(torch.where(apart, APART, 0.0) for apart in (apart_row, apart_column, apart_row | apart_column))]


class _ToSlots(torch.autograd.Function):
    """Gather tokens [B * HW, C] into slots [T, C]; padding slots hold any token and give no gradient. The backward is a gather too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (slot,) = ctx.saved_tensors
        return grads[0].index_select(0, slot), None, None


class _FromSlots(torch.autograd.Function):
    """Gather slots [T, C] back into tokens [B * HW, C]; what stands in padding slots is dropped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, padding: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(source, padding)
        return x.index_select(0, slot)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        source, padding = ctx.saved_tensors
        return grads[0].index_select(0, source).index_fill_(0, padding, 0), None, None, None


def to_windows(x: Tensor, layout: WindowLayout, fill: Tensor) -> Tensor:
    """Gather tokens [B * HW, C] into slots [T, C]; padding slots hold `fill` [C]."""
    slots: Tensor = _ToSlots.apply(x, layout.source, layout.slot)
    if len(layout.padding):
        slots = slots.index_copy(0, layout.padding, fill.to(x.dtype).expand(len(layout.padding), -1))
    return slots


def from_windows(x: Tensor, layout: WindowLayout) -> Tensor:
    """Gather slots [T, C] back into tokens [B * HW, C]."""
    return _FromSlots.apply(x, layout.source, layout.padding, layout.slot)
