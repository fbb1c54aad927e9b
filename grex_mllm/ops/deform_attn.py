"""Multi-scale deformable attention (Deformable DETR, Zhu et al. 2021, equation 3) in pure PyTorch.

`deformable_attention` picks the fastest way for the device; `deformable_attention_reference` is the plain `grid_sample` formulation.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from grex_mllm.ops.paths import on_cpu

Shapes = Sequence[tuple[int, int]]

MOST_POINTS = 2**19
_KEPT = threading.local()  # of each thread: one buffer of up to 4 * MOST_POINTS numbers per dtype


def deformable_attention(value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor) -> Tensor:
    """Sum bilinear samples of the value maps, zero outside them.

    value: float [B, S, A, D] (A heads), rows of the maps one after another, S = sum of h_l * w_l.  shapes: (h_l, w_l) of the maps.
    points: float [B, Q, 2, A, L, K], x and y of K points in cells of each map: (0, 0) is the centre of the first cell.
    weights: float [B, Q, A, L, K].  Returns float [B, Q, A * D].
    """
    if on_cpu(value):
        return deformable_attention_bags(value, shapes, points, weights)
    return deformable_attention_reference(value, shapes, points, weights)


def deformable_attention_reference(value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor) -> Tensor:
    """As `deformable_attention`, one `grid_sample` per map (align_corners False, zero padding)."""
    batch, _, heads, depth = value.shape
    queries, per_map = points.shape[1], points.shape[5]
    samples = []
    maps = value.to(points.dtype).split([h * w for h, w in shapes], dim=1)
    places = points.permute(4, 0, 3, 1, 5, 2).reshape(len(shapes), batch * heads, queries, per_map, 2)
    for (height, width), rows, place in zip(shapes, maps, places, strict=True):
        plane = rows.permute(0, 2, 3, 1).reshape(batch * heads, depth, height, width)
        grid = (2 * place + 1) / place.new_tensor([width, height]) - 1
        samples.append(F.grid_sample(plane, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    share = weights.permute(0, 2, 1, 3, 4).reshape(batch * heads, 1, queries, len(shapes) * per_map)
    out = (torch.stack(samples, dim=-2).flatten(-2) * share).sum(dim=-1)
    return out.view(batch, heads * depth, queries).transpose(1, 2).to(value.dtype)


def deformable_attention_bags(value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor) -> Tensor:
    """As `deformable_attention`: one weighted sum of value rows (`embedding_bag`, four corners of every point) per query and head.

    No sample is stored. Every map gets a border of zeros, so that corners outside it need no test: points are clamped to the border, where
    both the values and their gradients are zero. The work goes image by image where there are many points, so that its tables stay small.
    """
    if torch.is_grad_enabled() and (value.requires_grad or points.requires_grad or weights.requires_grad):
        if torch.compiler.is_compiling():  # compilers cannot follow the backward pass through sparse tensors
            return deformable_attention_reference(value, shapes, points, weights)
        return _DeformableAttention.apply(value, points, weights, tuple(shapes))
    return _attend(add_borders(value, shapes), shapes, points, weights)


class _DeformableAttention(torch.autograd.Function):
    """`deformable_attention_bags` with its derivative written out.

    The gradient of the values sums over the points of each cell: sorted by cell once, they serve all four corners, and the corners'
    gradient maps are added shifted. Points and weights need the product of the output's gradient with the value at each corner, which
    `sampled_addmm` computes without gathering the values.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, points: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
        rows = add_borders(value, shapes)
        ctx.shapes = shapes
        ctx.save_for_backward(rows, points, weights)
        return _attend(rows, shapes, points, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        rows, points, weights = ctx.saved_tensors
        batch, queries, _, heads, levels, per_map = points.shape
        exact = points.dtype  # float32 at least: sampled_addmm knows no bfloat16
        grad_value = rows.new_empty(batch, sum(h * w for h, w in ctx.shapes), heads, rows.shape[-1])
        grad_points, grad_weights = torch.empty_like(points, memory_format=torch.contiguous_format), torch.empty_like(weights)
        for some in _chunks(points):
            here = _locate(rows[some], ctx.shapes, points[some], weights[some])
            grad = grads[0][some].reshape(-1, rows.shape[-1]).to(exact)
            if ctx.needs_input_grad[0]:
                grad_value[some] = _value_gradient(here, grad, ctx.shapes, rows[some].shape)
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                x, y, share = _point_gradients(here, grad, rows[some].to(exact))
                shape = (-1, queries, heads, levels, per_map)
                grad_points[some] = torch.stack([x.view(shape), y.view(shape)], dim=2)
                grad_weights[some] = share.view(shape)
        return grad_value, grad_points, grad_weights, None


class _Located(NamedTuple):
    """The points of some images, as N = images * queries * heads bags of P points.

    corners: int32 [N, 4, P] rows of the value table: upper left, upper right, lower left, lower right.
    parts: float [N, 4, P] their shares.  x, y: float [N, P] place within the cell.  weights: float [N, P].
    moves_x, moves_y: bool [N, P], False where the point was clamped.
    """

    corners: Tensor
    parts: Tensor
    x: Tensor
    y: Tensor
    weights: Tensor
    moves_x: Tensor
    moves_y: Tensor


def _chunks(points: Tensor) -> list[slice]:
    """Cut the batch so that a chunk has at most MOST_POINTS points, or is one image."""
    images = max(1, MOST_POINTS * len(points) * 2 // max(points.numel(), 1))
    return [slice(start, start + images) for start in range(0, len(points), images)]


def _attend(rows: Tensor, shapes: Shapes, points: Tensor, weights: Tensor) -> Tensor:
    """rows: bordered values [B, S', A, D]."""
    outs = []
    for some in _chunks(points):
        here = _locate(rows[some], shapes, points[some], weights[some])
        table = rows[some].reshape(-1, rows.shape[-1])
        parts = here.parts.to(rows.dtype).flatten(1)
        outs.append(F.embedding_bag(here.corners.flatten(1), table, per_sample_weights=parts, mode="sum"))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out.view(len(points), points.shape[1], -1)


def _locate(rows: Tensor, shapes: Shapes, points: Tensor, weights: Tensor) -> _Located:
    batch, queries, _, heads, _, per_map = points.shape
    per_head = len(shapes) * per_map
    width, height, stride, start = _per_point(shapes, heads, per_map, points)
    given_x, given_y = points.reshape(batch, queries, 2, heads * per_head).unbind(2)
    x, y = torch.minimum(given_x.clamp(min=-1), width), torch.minimum(given_y.clamp(min=-1), height)
    moves_x, moves_y = given_x == x, given_y == y
    left, top = x.floor(), y.floor()
    x, y = x.sub_(left), y.sub_(top)
    first = top.to(torch.int32).mul_(stride).add_(left.to(torch.int32).mul_(heads)).add_(start)
    table = batch * rows.shape[1] * heads
    if batch > 1:
        first += torch.arange(batch, device=points.device, dtype=torch.int32)[:, None, None] * (table // batch)
    # what is not a number must not become an address
    first = first.clamp_(0, table - 1 - heads - max(w + 2 for _, w in shapes) * heads)
    share = weights.reshape(batch, queries, heads * per_head)
    lower = share * y
    upper = share - lower
    lower_right, upper_right = lower * x, upper * x
    grid = (batch * queries * heads, per_head)
    below = first + stride
    corners = _stack([t.view(grid) for t in (first, first + heads, below, below + heads)])
    parts = _stack([t.view(grid) for t in (upper.sub_(upper_right), upper_right, lower.sub_(lower_right), lower_right)])
    return _Located(corners, parts, x.view(grid), y.view(grid), share.reshape(grid), moves_x.view(grid), moves_y.view(grid))


def _stack(tables: list[Tensor]) -> Tensor:
    """Stack four tables [N, P] to [N, 4, P], in memory that the thread keeps: fresh memory would be mapped and cleared page by page.

    Valid until the next call with the same dtype.
    """
    like, wanted = tables[0], 4 * tables[0].numel()
    if torch.compiler.is_compiling() or type(like) is not Tensor or not on_cpu(like) or wanted > 4 * MOST_POINTS:
        return torch.stack(tables, dim=1)
    kept = _KEPT.__dict__.setdefault("tables", {})
    if like.dtype not in kept or kept[like.dtype].numel() < wanted:
        with torch.inference_mode(False):  # what is kept must serve training too
            kept[like.dtype] = torch.empty(wanted, dtype=like.dtype)
    return torch.stack(tables, dim=1, out=kept[like.dtype][:wanted].view(len(like), 4, -1))


def _value_gradient(here: _Located, grad: Tensor, shapes: Shapes, table: torch.Size) -> Tensor:
    """Return the values' gradient [B, S, A, D]. grad: [N, D] of the output.  table: shape [B, S', A, D] of the bordered values."""
    batch, total, heads, depth = table
    cells, order = here.corners[:, 0].flatten().sort(stable=True)
    bag = order.div(here.x.shape[1], rounding_mode="floor").to(torch.int32)
    starts = torch.searchsorted(cells, torch.arange(batch * total * heads, dtype=torch.int32, device=cells.device), out_int32=True)
    corners = []
    for corner in range(4):
        parts = here.parts[:, corner].flatten().index_select(0, order).to(grad.dtype)
        corners.append(F.embedding_bag(bag, grad, starts, per_sample_weights=parts, mode="sum").view(batch, total, heads * depth))
    maps, start = [], 0
    for height, width in shapes:
        end = start + (height + 2) * (width + 2)
        upper_left, upper_right, lower_left, lower_right = (c[:, start:end].view(batch, height + 2, width + 2, -1) for c in corners)
        # a cell is the upper left corner of its own points, the upper right one of the points of the cell to its left, and so on
        grown = upper_left[:, 1:-1, 1:-1] + upper_right[:, 1:-1, :-2]
        grown += lower_left[:, :-2, 1:-1]
        grown += lower_right[:, :-2, :-2]
        maps.append(grown.flatten(1, 2))
        start = end
    return torch.cat(maps, dim=1).view(batch, -1, heads, depth)


def _point_gradients(here: _Located, grad: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients [N, P] of x, y and weights. grad: [N, D] of the output.  rows: bordered values [B, S', A, D]."""
    _silence_sparse()
    table = rows.reshape(-1, rows.shape[-1])
    flat = here.corners.flatten()
    step = here.corners[0].numel()
    starts = torch.arange(0, flat.numel() + 1, step, dtype=torch.int32, device=flat.device)
    size = (len(grad), len(table))
    wanted = torch.sparse_csr_tensor(starts, flat, grad.new_zeros(flat.numel()), size=size, check_invariants=False)
    products = torch.sparse.sampled_addmm(wanted, grad, table.t(), beta=0.0).values()
    upper, upper_right, lower, lower_right = products.view(here.corners.shape).unbind(1)
    across_upper, across_lower = upper_right - upper, lower_right - lower
    upper = torch.addcmul(upper, here.x, across_upper)
    down = torch.addcmul(lower, here.x, across_lower).sub_(upper)
    share = torch.addcmul(upper, here.y, down)
    across = across_lower.sub_(across_upper).mul_(here.y).add_(across_upper)
    return across.mul_(here.weights).mul_(here.moves_x), down.mul_(here.weights).mul_(here.moves_y), share


@functools.cache
def _silence_sparse() -> None:
    """Swallow torch's remark, made once a process, that sparse CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index = torch.zeros(1, dtype=torch.int32)
        torch.sparse_csr_tensor(torch.tensor([0, 1], dtype=torch.int32), index, torch.zeros(1), size=(1, 1), check_invariants=False)


def add_borders(value: Tensor, shapes: Shapes) -> Tensor:
    """Surround every map with one cell of zeros: [B, S, A, D] -> [B, S', A, D], S' = sum of (h_l + 2) * (w_l + 2), plus one row's reach."""
    batch, _, heads, depth = value.shape
    maps = []
    for (height, width), rows in zip(shapes, value.split([h * w for h, w in shapes], dim=1), strict=True):
        maps.append(F.pad(rows.reshape(batch, height, width, heads * depth), (0, 0, 1, 1, 1, 1)).flatten(1, 2))
    # a point on the last corner reads (with share zero) one row and one cell further
    maps.append(value.new_zeros(batch, max(w for _, w in shapes) + 3, heads * depth))
    return torch.cat(maps, dim=1).view(batch, -1, heads, depth)


def _per_point(shapes: Shapes, heads: int, points: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return width, height (float), row stride and address of cell (0, 0) (int32) of every point of a query: each [heads * L * points]."""
    starts, total = [], 0
    for height, width in shapes:
        starts.append(total + width + 3)
        total += (height + 2) * (width + 2)
    head = torch.arange(heads, device=like.device, dtype=torch.int32).repeat_interleave(len(shapes) * points)

    def spread(numbers: list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(numbers, device=like.device, dtype=dtype).repeat_interleave(points).repeat(heads)

    stride = spread([(w + 2) * heads for _, w in shapes], torch.int32)
    start = spread([n * heads for n in starts], torch.int32) + head
    return spread([w for _, w in shapes], like.dtype), spread([h for h, _ in shapes], like.dtype), stride, start
