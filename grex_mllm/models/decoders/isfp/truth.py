"""Objects on the grid of ISFP: the cell of an object's centre of gravity and its neighbours (thesis, section 3.2.5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Truth:
    """What is given in place of a branch. kind: location | mask.  instance_masks: bool [N, H, W].  targets: of each expression."""

    kind: str
    instance_masks: Tensor
    targets: list[Tensor]


def centres(masks: Tensor, fallback: Tensor | None = None) -> Tensor:
    """Return the centres of gravity of masks bool [N, H, W] as shares of height and width, float32 [N, 2] (y, x).

    fallback: float [N, 2], taken where a mask is empty; default: the middle of the image.
    """
    height, width = masks.shape[-2:]
    weight = masks.float()
    area = weight.sum(dim=(1, 2)).clamp(min=1)
    y = (weight.sum(dim=2) @ ((torch.arange(height, device=masks.device) + 0.5) / height)) / area
    x = (weight.sum(dim=1) @ ((torch.arange(width, device=masks.device) + 0.5) / width)) / area
    found = torch.stack([y, x], dim=1)
    empty = ~masks.flatten(1).any(dim=1)
    return torch.where(empty[:, None], torch.full_like(found, 0.5) if fallback is None else fallback.to(found), found)


def cells_of_centres(masks: Tensor, side: int) -> Tensor:
    """Return int64 [N]: the cell i * S + j in which the centre of each mask lies; a centre on a border belongs to the later cell."""
    row, column = (centres(masks) * side).long().clamp(0, side - 1).unbind(dim=1)
    return row * side + column


def owners(points: Tensor, side: int) -> Tensor:
    """Return int64 [S^2]: which of the centres float [N, 2] each cell stands for, -1 = none.

    A centre's cell and its 8 neighbours within the grid stand for it; where several centres claim a cell, the nearest to its middle does.
    """
    if not len(points):
        return torch.full((side * side,), -1, dtype=torch.int64, device=points.device)
    place = torch.arange(side, device=points.device)
    cell = (points * side).long().clamp(0, side - 1)
    near = ((place[None] - cell[:, :1]).abs() <= 1)[:, :, None] & ((place[None] - cell[:, 1:]).abs() <= 1)[:, None, :]  # [N, S, S]
    middle = (place + 0.5) / side
    distance = (middle[None, :, None] - points[:, :1, None]).square() + (middle[None, None] - points[:, 1:, None]).square()
    best = torch.where(near, distance, torch.inf).flatten(1).min(dim=0)
    return torch.where(near.flatten(1).any(dim=0), best.indices, -1)


def nearest_centres(masks: Tensor, side: int) -> Tensor:
    """Return `owners` of the centres of masks bool [N, H, W]."""
    return owners(centres(masks), side)
