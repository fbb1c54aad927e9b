"""A number of regions that follows the image: few for a plain one, many for a crowded one.

A tutorial on GRES chooses P of 4, 8 or 16 by "the image's complexity" and leaves that open. Here it is the share of neighbouring pixels
that lie on an edge, which padding does not change, and every image has a P of its own, so that an answer does not depend on what stands
beside it in a batch. The regions of a smaller grid start as the means of those of the largest one: there is one table for all of them, and
every step trains all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from grex_mllm.errors import fault
from grex_mllm.models.decoders.rela.heads import box_start
from grex_mllm.types import GroundingOutput

if TYPE_CHECKING:
    from grex_mllm.models.decoders.rela.config import RelaConfig

LEAST_LOGIT = -1e4  # of a box that no region has
EDGE = 0.25  # difference of neighbouring pixels that is an edge, in standard deviations of ImageNet: about 14 of 255


def check_sides(config: RelaConfig) -> None:
    """Raise on grids that cannot be chosen between.

    Raises:
        GrexError: names the field.
    """
    sides, limits = config.region_sides, config.complexity
    if not sides:
        return
    if sorted(set(sides)) != sides or sides[0] < 1 or sides[-1] != config.minimap_side:
        raise fault(
            f"model.decoder.region_sides is {sides} with minimap_side {config.minimap_side}",
            "sides from small to large, the last of them minimap_side",
            "fix one of them",
        )
    if len(limits) != len(sides) - 1 or sorted(limits) != limits:
        raise fault(
            f"model.decoder.complexity is {limits} with {len(sides)} region_sides",
            "a limit between each two of them, rising",
            "fix the limits",
        )
    if config.ria != "attention":
        raise fault(f"model.decoder.region_sides with ria: {config.ria}", "ria: attention: cells are pooled to one grid", "leave one out")


@torch.no_grad()
def edge_share(image: Tensor) -> Tensor:
    """Return the share of neighbouring pixels (to the right, and below) that differ by an edge, float32 [B] in [0, 1].

    image: float [B, 3, H, W], normalised, all zero where it is padding: no pixel of an image is.
    """
    real = (image != 0).any(dim=1)
    grey = image.float().mean(dim=1)
    edges, pairs = torch.zeros(len(image), device=image.device), torch.zeros(len(image), device=image.device)
    for axis in (1, 2):
        size = image.shape[axis + 1] - 1
        both = real.narrow(axis, 0, size) & real.narrow(axis, 1, size)
        step = (grey.narrow(axis, 1, size) - grey.narrow(axis, 0, size)).abs() > EDGE
        edges += (both & step).sum(dim=(1, 2))
        pairs += both.sum(dim=(1, 2))
    return edges / pairs.clamp(min=1)


def chosen_sides(image: Tensor, sides: list[int], limits: list[float]) -> Tensor:
    """Return P of each image, int64 [B]: the first side whose limit of `edge_share` is not passed."""
    place = torch.bucketize(edge_share(image), torch.tensor(limits, device=image.device))
    return torch.tensor(sides, device=image.device)[place]


@dataclass(frozen=True)
class OwnGrids:
    """Grids of B images, or of E expressions, each with P * P regions of its own in the first of Q rows.

    side: int64 [B], P of each.  sides: the P that there are, from small to large.  active: bool [B, Q], rows that are regions.
    """

    side: Tensor
    sides: list[int]
    active: Tensor

    def of(self, index: Tensor) -> OwnGrids:
        """Return the grids of expressions, whose images stand in int64 [E]."""
        return OwnGrids(self.side.index_select(0, index), self.sides, self.active.index_select(0, index))

    def chosen(self, tables: dict[int, Tensor]) -> Tensor:
        """Return for each grid the rows [P * P, C] of its side, float [B, Q, C], zero behind its last region."""
        num = self.active.shape[1]
        padded = torch.stack([F.pad(tables[one][:num], (0, 0, 0, max(0, num - one * one))) for one in self.sides])
        place = torch.bucketize(self.side, torch.tensor(self.sides, device=self.side.device))
        return padded.index_select(0, place)

    def box_starts(self) -> Tensor:
        """Return what is added to the regions' boxes, float32 [B, Q, 4]."""
        return self.chosen({one: box_start(one).to(self.side.device) for one in self.sides})

    def spread(self, prob: Tensor) -> Tensor:
        """Return minimaps float [B, Q] at the size of the largest grid, [B, P, P], for pictures."""
        most = self.sides[-1]
        found = prob.new_zeros(len(prob), most, most)
        prob = F.pad(prob, (0, most * most - prob.shape[1]))
        for one in self.sides:
            own = prob[:, : one * one].unflatten(1, (one, one))[:, None]
            found = found + F.interpolate(own, size=(most, most), mode="nearest")[:, 0] * (self.side == one)[:, None, None]
        return found

    def filled(self, answer: GroundingOutput) -> GroundingOutput:
        """Return the answer with as many rows as the largest grid has, whatever else stood in the batch, and which of them are regions.

        The others' boxes have no size and the lowest score.
        """
        more = self.sides[-1] ** 2 - self.active.shape[1]
        active = F.pad(self.active, (0, more))
        rows = {name: getattr(answer, name) for name in ("minimap_logits", "boxes_norm", "box_logits")}
        found = {name: F.pad(v, (0, more) if v.dim() == 2 else (0, 0, 0, more)) for name, v in rows.items() if v is not None}
        if "boxes_norm" in found:
            found["boxes_norm"] = found["boxes_norm"] * active[..., None]
            found["box_logits"] = found["box_logits"].masked_fill(~active, LEAST_LOGIT)
        if "minimap_logits" in found:
            found["minimap_logits"] = found["minimap_logits"] * active[..., None]
        extra = answer.extra._replace(mask_embeddings=F.pad(answer.extra.mask_embeddings, (0, 0, 0, more)))
        return answer._replace(**found, extra=extra, active_regions=active)


def own_grids(side: Tensor, sides: list[int]) -> OwnGrids:
    """Return the grids of images with P int64 [B], with as many rows as the largest of them needs.

    Where a graph is recorded, or the host would wait for the numbers, there are as many rows as the largest grid of all has.
    """
    readable = side.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
    rows = (int(side.max()) if readable else sides[-1]) ** 2
    return OwnGrids(side, sides, torch.arange(rows, device=side.device) < side[:, None] ** 2)


def grid_rows(table: Tensor, grids: OwnGrids) -> Tensor:
    """Return the table [P * P, C] of the largest grid for each image's own, float [B, Q, C]: coarser cells are means of finer ones."""
    most = grids.sides[-1]
    whole = table.T.unflatten(1, (most, most))
    return grids.chosen({one: F.adaptive_avg_pool2d(whole, one).flatten(1).T for one in grids.sides})
