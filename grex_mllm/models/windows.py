"""Swin's windows as gathers: which token stands where, for plain and shifted windows over maps that are padded to a multiple of the window.

A shifted map has only four kinds of windows: inner ones without a mask, those of the last row, of the last column, and the corner. Laid
out kind by kind, attention needs one mask per kind in place of one per window. Within a window the real tokens come first: padding is read
as key and value (the released networks do), but it never asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# released: added to the logits of pairs that lie in different regions of the unshifted map
APART = -100.0


@dataclass(frozen=True)
class WindowKind:
    """Windows that share their mask and their padding.

    first, last: slice of the windows (times B).  real: number of tokens that are no padding; they come first.
    pairs: int64 [real * N] row of the relative position bias table for every query and key.  mask: [real, N], 0 or APART, or None.
    """

    first: int
    last: int
    real: int
    pairs: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class WindowLayout:
    """Where the tokens of B maps of height x width stand in their windows. T = windows * B * N slots, N = window ** 2.

    source: int64 [T] token of each slot, 0 for padding.  padding: int64 [K] slots that hold padding.
    slot: int64 [B * height * width] slot of each token.
    answer: int64 [B * height * width] place of each token among the queries' answers (real tokens, kind by kind).  asked: its inverse.
    """

    source: Tensor
    padding: Tensor
    slot: Tensor
    answer: Tensor
    asked: Tensor
    kinds: tuple[WindowKind, ...]


# layouts of the sizes met last; a plain dictionary, because compilers read it without leaving their graph
_LAYOUTS: dict[tuple[int, int, int, int, int, str], WindowLayout] = {}
MOST_LAYOUTS = 64


def window_layout(batch: int, height: int, width: int, window: int, shift: int, device: torch.device) -> WindowLayout:
    """Lay out the windows of a map that is zero-padded right and bottom to a multiple of the window, then rolled by -shift.

    A layout is made once per size: run a size once before compiling it.
    """
    batch, height, width = int(batch), int(height), int(width)  # also where they are recorded: a layout belongs to one size
    key = (batch, height, width, window, shift, str(device))
    layout = _LAYOUTS.get(key)
    if layout is None:
        if len(_LAYOUTS) >= MOST_LAYOUTS:
            _LAYOUTS.pop(next(iter(_LAYOUTS)))
        layout = _LAYOUTS[key] = _lay_out(batch, height, width, window, shift, device)
    return layout


@torch.compiler.disable
@torch.inference_mode(False)  # what is kept must serve training too
def _lay_out(batch: int, height: int, width: int, window: int, shift: int, device: torch.device) -> WindowLayout:
    size = window**2
    tokens, masks = _cut(height, width, window, shift)
    groups: dict[tuple[int, bytes], list[Tensor]] = {}
    for kind, row in zip(masks, tokens, strict=True):
        groups.setdefault((kind, (row >= 0).numpy().tobytes()), []).append(row)
    image = (torch.arange(batch) * height * width)[:, None]
    pair_rows, kind_masks = relative_index(window), shift_masks(window, shift)
    kinds, sources, asked = [], [], []
    first = 0
    for (kind, _), rows in groups.items():
        order = (rows[0] < 0).to(torch.int64).argsort(stable=True)
        real = int((rows[0] >= 0).sum())
        here = torch.stack(rows)[:, order][:, None]
        here = torch.where(here < 0, -1, here + image)
        last = first + len(rows) * batch
        mask = kind_masks[kind]
        mask = None if mask is None else mask[order][:, order][:real].to(device)
        kinds.append(WindowKind(first, last, real, pair_rows[order][:, order][:real].flatten().to(device), mask))
        sources.append(here.flatten())
        asked.append(here[..., :real].flatten())
        first = last
    source, questions = torch.cat(sources), torch.cat(asked)
    padding, present = (source < 0).nonzero().flatten(), (source >= 0).nonzero().flatten()
    slot, answer = torch.empty_like(questions), torch.empty_like(questions)
    slot[source[present]] = present
    answer[questions] = torch.arange(len(questions))
    assert len(source) == first * size
    source, padding, slot, answer, questions = (t.to(device) for t in (source.clamp(min=0), padding, slot, answer, questions))
    return WindowLayout(source, padding, slot, answer, questions, tuple(kinds))


def _cut(height: int, width: int, window: int, shift: int) -> tuple[Tensor, list[int]]:
    """Return the tokens of every window, int64 [windows, N] (-1 for padding), and which shift mask each window has."""
    padded = torch.full((-(-height // window) * window, -(-width // window) * window), -1, dtype=torch.int64)
    padded[:height, :width] = torch.arange(height * width).view(height, width)
    padded = padded.roll((-shift, -shift), (0, 1))
    rows, columns = padded.shape[0] // window, padded.shape[1] // window
    tokens = padded.view(rows, window, columns, window).transpose(1, 2).reshape(rows * columns, window**2)
    last = [(r == rows - 1, c == columns - 1) for r in range(rows) for c in range(columns)]
    return tokens, [int(below) + 2 * int(right) if shift else 0 for below, right in last]


def relative_index(window: int) -> Tensor:
    """Return the row of the bias table for every query and key of a window: int64 [N, N]."""
    grid = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
    offset = grid[:, :, None] - grid[:, None, :] + window - 1
    return offset[0] * (2 * window - 1) + offset[1]


def shift_masks(window: int, shift: int) -> list[Tensor | None]:
    """Return the masks [N, N] of inner, last-row, last-column and corner windows: 0 within a region of the map, APART across."""
    wrapped = torch.arange(window) >= window - shift
    row = wrapped[:, None].expand(window, window).flatten()
    column = wrapped[None, :].expand(window, window).flatten()
    apart_row = row[:, None] != row[None, :]
    apart_column = column[:, None] != column[None, :]
    return [None, *(torch.where(apart, APART, 0.0) for apart in (apart_row, apart_column, apart_row | apart_column))]


class _ToSlots(torch.autograd.Function):
    """Gather tokens [B * HW, C] into slots [T, C] and put `fill` [C] into the padding slots. The backward is a gather too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fill: Tensor, source: Tensor, slot: Tensor, padding: Tensor) -> Tensor:
        ctx.save_for_backward(slot, padding)
        slots = x.index_select(0, source)
        return slots.index_copy_(0, padding, fill.expand(len(padding), -1)) if len(padding) else slots

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        slot, padding = ctx.saved_tensors
        return grads[0].index_select(0, slot), grads[0].index_select(0, padding).sum(dim=0), None, None, None


class _Reorder(torch.autograd.Function):
    """Gather rows by a permutation; the backward gathers by its inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


def to_windows(x: Tensor, layout: WindowLayout, fill: Tensor) -> Tensor:
    """Gather tokens [B * HW, C] into slots [T, C]; padding slots hold `fill` [C]."""
    return _ToSlots.apply(x, fill.to(x.dtype), layout.source, layout.slot, layout.padding)


def from_windows(answers: Tensor, layout: WindowLayout) -> Tensor:
    """Gather the real tokens' answers, kind by kind [B * HW, C], back into the tokens' order."""
    return _Reorder.apply(answers, layout.answer, layout.asked)
