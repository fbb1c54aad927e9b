"""What region features say: masks, minimap, no-target, boxes, box scores, count."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.types import NUM_COUNTS

BOX_START_SIZE = 0.25
BOX_EPS = 1e-4


class Mlp(nn.Module):
    """Linear layers with ReLU between: `num_layers` of them, all but the last `hidden` wide."""

    def __init__(self, width: int, hidden: int, out: int, num_layers: int) -> None:
        super().__init__()
        widths = [width, *[hidden] * (num_layers - 1), out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def box_start(side: int) -> Tensor:
    """Return what is added to the boxes of a grid's regions before the sigmoid, float32 [side * side, 4]: a square at the cell's centre."""
    cells = (torch.arange(side) + 0.5) / side
    start = torch.full((side, side, 4), BOX_START_SIZE)
    start[..., 0], start[..., 1] = cells[None, :], cells[:, None]
    return torch.logit(start.flatten(0, 1), BOX_EPS)


def mean_over(values: Tensor, active: Tensor | None) -> Tensor:
    """Return the mean [E, C] of values [E, Q, C] over the regions, or over those that are active, bool [E, Q]."""
    if active is None:
        return values.mean(dim=1)
    share = active.to(values)[..., None]
    return (values * share).sum(dim=1) / share.sum(dim=1)


class RegionHeads(nn.Module):
    """The heads over normalised region features [E, Q, C] (GRES paper, section 4.1; GREx article for boxes and count).

    Masks, minimap and no-target are the released ones. What the papers leave open about boxes, and what we chose:
    a region's box is a shift from the centre of its minimap cell and a size (the minimap already binds the region to that cell),
    `box_score` says how sure the region is that its box is one of the targets' boxes, and the count is averaged over regions like the
    no-target answer.
    `boxes`, `count`, ... False, `mask_width` 0: the head does not exist, so a released checkpoint has nothing missing.
    """

    def __init__(
        self, width: int, mask_width: int, side: int, boxes: bool, count: bool, minimap: bool = True, no_target: bool = True
    ) -> None:
        super().__init__()
        self.mask: Any = Mlp(width, width, mask_width, 3) if mask_width else None
        self.minimap: Any = nn.Linear(width, 2) if minimap else None
        self.no_target: Any = Mlp(width, width, 2, 2) if no_target else None
        self.box = Mlp(width, width, 4, 3) if boxes else None
        self.box_score = nn.Linear(width, 1) if boxes else None
        self.count = Mlp(width, width, NUM_COUNTS, 2) if count else None
        self.register_buffer("box_start", box_start(side), persistent=False)
        if self.box is not None:
            for parameter in self.box.layers[-1].parameters():
                nn.init.zeros_(parameter)

    def predict_boxes(self, regions: Tensor, start: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Return boxes_norm [E, Q, 4] cxcywh and box_logits [E, Q], or None twice.

        start: what `box_start` is for the regions [E, Q, 4] of other grids; None = of the grid that the heads were built for.
        """
        if self.box is None or self.box_score is None:
            return None, None
        return (self.box(regions) + (self.box_start if start is None else start)).sigmoid(), self.box_score(regions).squeeze(-1)

    def predict_count(self, regions: Tensor, active: Tensor | None = None) -> Tensor | None:
        """Return count_logits [E, 7], or None. active: bool [E, Q], regions that are averaged; None = all."""
        return None if self.count is None else mean_over(self.count(regions), active)

    def predict_no_target(self, regions: Tensor, active: Tensor | None = None) -> Tensor | None:
        """Return no_target_logits [E, 2], or None. active: bool [E, Q], regions that are averaged; None = all."""
        return None if self.no_target is None else mean_over(self.no_target(regions), active)

    def predict_minimap(self, regions: Tensor) -> Tensor | None:
        """Return minimap_logits [E, Q, 2], or None."""
        return None if self.minimap is None else self.minimap(regions)
