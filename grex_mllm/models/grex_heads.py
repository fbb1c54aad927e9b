"""The way of any segmentation system to GREx: regions of its last map, and heads for minimap, no target, boxes and count over them.

The classic systems (ISFP, VLT, M3Att, LAVT) answer with one dense mask. That mask can hold the union of any number of targets. For "no
target" the papers' baseline empties masks of fewer than 50 pixels (`predict.no_target: pixels`); with the heads here such a system says so
itself, and has boxes, scores and a count as well. The same heads for all, so that comparisons differ in fusion and decoding alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.models.decoders.rela.heads import RegionHeads
from grex_mllm.types import GroundingOutput


@dataclass
class GrexHeadsConfig:
    """Which heads a system has. All off: the papers' baseline, a mask alone. Loss weights of absent heads must be 0."""

    minimap_side: int = 10  # regions are the cells of a grid of so many rows and columns
    minimap: bool = True
    no_target: bool = True
    boxes: bool = True
    count: bool = True

    @property
    def any(self) -> bool:
        """Tell whether there is a head at all."""
        return self.minimap or self.no_target or self.boxes or self.count


class HeadAnswers(NamedTuple):
    """What the heads say, as `GroundingOutput` wants it; None = no such head."""

    minimap_logits: Tensor | None = None
    no_target_logits: Tensor | None = None
    boxes_norm: Tensor | None = None
    box_logits: Tensor | None = None
    count_logits: Tensor | None = None
    minimap_prob: Tensor | None = None


class GrexHeads(nn.Module):
    """Heads over the cells of a map, or over region features that a system has anyhow (then one for each cell of the grid)."""

    def __init__(self, config: GrexHeadsConfig, channels: int, width: int) -> None:
        """channels: of the map or of the given regions.  width: of the regions that the heads read."""
        super().__init__()
        self.side = config.minimap_side
        self.project = nn.Linear(channels, width) if config.any else None
        self.norm = nn.LayerNorm(width) if config.any else None
        self.heads = (
            RegionHeads(width, 0, config.minimap_side, config.boxes, config.count, config.minimap, config.no_target) if config.any else None
        )

    def forward(self, features: Tensor) -> HeadAnswers:
        """Answer for E expressions.

        features: float [E, C, h, w], mean over the cells of the grid; or [E, P * P, C], row by row.
        """
        if self.project is None or self.norm is None or self.heads is None:
            return HeadAnswers()
        if features.dim() == 4:
            features = F.adaptive_avg_pool2d(features, self.side).flatten(2).transpose(1, 2)
        regions = self.norm(self.project(features))
        minimap = self.heads.predict_minimap(regions)
        boxes, scores = self.heads.predict_boxes(regions)
        return HeadAnswers(
            minimap_logits=minimap,
            no_target_logits=self.heads.predict_no_target(regions),
            boxes_norm=boxes,
            box_logits=scores,
            count_logits=self.heads.predict_count(regions),
            minimap_prob=None if minimap is None else minimap.softmax(dim=-1)[..., 1].unflatten(1, (self.side, self.side)),
        )


def two_way(logits: Tensor) -> Tensor:
    """Return mask logits [E, 2, h, w] of one-channel logits [E, h, w]: their cross-entropy is the binary one, their argmax "above 0"."""
    return torch.stack([torch.zeros_like(logits), logits], dim=1)


def dense_answer(logits: Tensor, heads: HeadAnswers, extra: NamedTuple | None = None) -> GroundingOutput:
    """Put a one-channel mask float [E, h, w] and the heads' answers together. extra: for the system's own criterion."""
    return GroundingOutput(two_way(logits), *heads, extra)
