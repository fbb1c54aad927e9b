"""Multi-scale deformable attention (Deformable DETR, Zhu et al. 2021, equation 3) in pure PyTorch.

`deformable_attention` picks the fastest way for the device; `deformable_attention_reference` is the plain `grid_sample` formulation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = Sequence[tuple[int, int]]


def deformable_attention(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sum bilinear samples of the value maps, zero outside them.

    value: float [B, S, A, D] (A heads), rows of the maps one after another, S = sum of h_l * w_l.  shapes: (h_l, w_l) of the maps.
    locations: float [B, Q, A, L, K, 2], x and y in [0, 1] of each map (K points).  weights: float [B, Q, A, L, K].
    Returns float [B, Q, A * D].
    """
    if value.device.type == "cpu":
        return deformable_attention_bags(value, shapes, locations, weights)
    return deformable_attention_reference(value, shapes, locations, weights)


def deformable_attention_reference(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """As `deformable_attention`, one `grid_sample` per map (align_corners False, zero padding)."""
    batch, _, heads, depth = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).reshape(len(shapes), batch * heads, queries, points, 2)
    samples = []
    maps = value.split([h * w for h, w in shapes], dim=1)
    for (height, width), rows, grid in zip(shapes, maps, grids, strict=True):
        plane = rows.permute(0, 2, 3, 1).reshape(batch * heads, depth, height, width)
        samples.append(F.grid_sample(plane, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    share = weights.permute(0, 2, 1, 3, 4).reshape(batch * heads, 1, queries, len(shapes) * points)
    out = (torch.stack(samples, dim=-2).flatten(-2) * share).sum(dim=-1)
    return out.view(batch, heads * depth, queries).transpose(1, 2)


def deformable_attention_bags(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """As `deformable_attention`: four weighted sums of value rows (`embedding_bag`, one per corner of the cells) per query and head.

    No sample is stored. Every map gets a border of zeros, so that corners outside it need no test: points are clamped to the border, where
    both the values and their gradients are zero.
    """
    batch, _, heads, depth = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    rows = add_borders(value, shapes).view(-1, depth)
    per_head = len(shapes) * points
    width, height, stride, start = _per_point(shapes, heads, points, locations)
    x, y = (v.reshape(batch, queries, heads * per_head) for v in locations.unbind(-1))
    x = torch.minimum((x * width - 0.5).clamp(min=-1), width)
    y = torch.minimum((y * height - 0.5).clamp(min=-1), height)
    left, top = x.detach().floor(), y.detach().floor()
    x, y = x - left, y - top
    first = start + top.to(torch.int32) * stride + left.to(torch.int32) * heads
    if batch > 1:
        first = first + torch.arange(batch, device=value.device, dtype=torch.int32)[:, None, None] * (len(rows) // batch)
    # what is not a number must not become an address
    first = first.clamp(0, len(rows) - 1 - heads - int(stride.max()))
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
        bags = F.embedding_bag(index.view(-1, per_head), rows, per_sample_weights=part.view(-1, per_head), mode="sum")
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
