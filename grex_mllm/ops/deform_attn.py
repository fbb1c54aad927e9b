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
    """As `deformable_attention`, one weighted sum of value rows (`embedding_bag`) per query and head: no sample is ever stored."""
    batch, total, heads, depth = value.shape
    queries = locations.shape[1]
    rows, shares = corner_rows(shapes, locations, weights)
    head = torch.arange(heads, device=value.device)[None, None, :, None]
    image = torch.arange(batch, device=value.device)[:, None, None, None]
    rows = (rows.flatten(3) + image * total) * heads + head
    bags = F.embedding_bag(
        rows.view(batch * queries * heads, -1),
        value.reshape(batch * total * heads, depth),
        per_sample_weights=shares.reshape(batch * queries * heads, -1).to(value.dtype),
        mode="sum",
    )
    return bags.view(batch, queries, heads * depth)


def corner_rows(shapes: Shapes, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the four neighbours of every sample: row in S, int64 [B, Q, A, L, K, 4], and share, float, 0 where it lies outside its map."""
    size = torch.tensor([[w, h] for h, w in shapes], device=locations.device, dtype=locations.dtype)
    starts = torch.tensor([0, *(h * w for h, w in shapes)], device=locations.device)[:-1].cumsum(0)
    limit = size.to(torch.int64)
    point = locations * size[:, None] - 0.5
    low = point.floor()
    part = point - low
    # far outside, floats may not fit an integer; clamping keeps them outside
    low = torch.minimum(low.clamp(min=-2), size[:, None]).to(torch.int64)
    rows, shares = [], []
    for down in (0, 1):
        y = low[..., 1] + down
        share_y = torch.where((y >= 0) & (y < limit[:, 1:2]), part[..., 1] if down else 1 - part[..., 1], 0) * weights
        start = starts[:, None] + y.clamp(min=0).minimum(limit[:, 1:2] - 1) * limit[:, 0:1]
        for right in (0, 1):
            x = low[..., 0] + right
            inside = (x >= 0) & (x < limit[:, 0:1])
            shares.append(torch.where(inside, part[..., 0] if right else 1 - part[..., 0], 0) * share_y)
            rows.append(start + x.clamp(min=0).minimum(limit[:, 0:1] - 1))
    return torch.stack(rows, dim=-1), torch.stack(shares, dim=-1)
