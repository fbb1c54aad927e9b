"""Multi-scale deformable attention (Deformable DETR, Zhu et al. 2021, equation 3) in pure PyTorch.

`deformable_attention` picks the fastest way for the device; `deformable_attention_reference` is the plain `grid_sample` formulation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = Sequence[tuple[int, int]]


def deformable_attention(value: Tensor, shapes: Shapes, points: Tensor, weights: Tensor) -> Tensor:
    """Sum bilinear samples of the value maps, zero outside them.

    value: float [B, S, A, D] (A heads), rows of the maps one after another, S = sum of h_l * w_l.  shapes: (h_l, w_l) of the maps.
    points: float [B, Q, 2, A, L, K], x and y of K points in cells of each map: (0, 0) is the centre of the first cell.
    weights: float [B, Q, A, L, K].  Returns float [B, Q, A * D].
    """
    if value.device.type == "cpu":
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
    """As `deformable_attention`: four weighted sums of value rows (`embedding_bag`, one per corner of the cells) per query and head.

    No sample is stored. Every map gets a border of zeros, so that corners outside it need no test: points are clamped to the border, where
    both the values and their gradients are zero.
    """
    batch, _, heads, depth = value.shape
    queries, per_head = points.shape[1], len(shapes) * points.shape[5]
    rows = add_borders(value, shapes).view(-1, depth)
    width, height, stride, start = _per_point(shapes, heads, points.shape[5], points)
    x, y = points.reshape(batch, queries, 2, heads * per_head).unbind(2)
    x, y = torch.minimum(x.clamp(min=-1), width), torch.minimum(y.clamp(min=-1), height)
    left, top = x.detach().floor(), y.detach().floor()
    x, y = x - left, y - top
    first = start + top.to(torch.int32) * stride + left.to(torch.int32) * heads
    if batch > 1:
        first = first + torch.arange(batch, device=value.device, dtype=torch.int32)[:, None, None] * (len(rows) // batch)
    # what is not a number must not become an address
    first = first.clamp(0, len(rows) - 1 - heads - max(w + 2 for _, w in shapes) * heads)
    share = weights.reshape(batch, queries, heads * per_head)
    lower = share * y
    upper = share - lower
    lower_right, upper_right = lower * x, upper * x
    corners = (
        (first, upper - upper_right),
        (first + heads, upper_right),
        (first + stride, lower - lower_right),
        (first + (stride + heads), lower_right),
    )
    out: Tensor | None = None
    for index, part in corners:
        part = part.to(rows.dtype).view(-1, per_head)
        bags = F.embedding_bag(index.view(-1, per_head), rows, per_sample_weights=part, mode="sum")
        out = bags if out is None else out + bags
    assert out is not None
    return out.view(batch, queries, heads * depth)


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
