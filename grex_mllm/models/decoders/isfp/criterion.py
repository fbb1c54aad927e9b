"""The loss of ISFP (thesis, equation 3.4): which cells are targets, what their masks are, and the refined mask where the choice was right.

With several targets, a cell that stands for one of them learns the mask of the nearest; the refinement learns the union. No target: all
cells are negative, and neither of the other terms teaches anything. The terms of GREx's heads come beside.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor

from grex_mllm.errors import fault
from grex_mllm.models.decoders.isfp.config import IsfpConfig
from grex_mllm.models.decoders.isfp.network import IsfpExtra
from grex_mllm.models.decoders.isfp.truth import centres, owners
from grex_mllm.models.grex_losses import GrexLosses
from grex_mllm.ops.losses import shared_count
from grex_mllm.types import Batch, GroundingOutput

OWN_TERMS = ("identification", "segmentation", "refinement")


def target_cells(batch: Batch, side: int) -> Tensor:
    """Return int64 [E, S^2]: which of the expression's targets (place in `target_index`) each cell stands for, -1 = none."""
    found = []
    for e, targets in enumerate(batch.target_index):
        image = int(batch.image_index[e])
        middle = batch.instance_boxes_norm[image][targets][:, :2].flip(1)
        found.append(owners(centres(batch.instance_masks[image][targets], middle), side))
    return torch.stack(found).to(batch.image.device)


def identification(cell_logits: Tensor, owner: Tensor) -> Tensor:
    """Compute l_ide: the binary cross-entropy of all cells [E, S^2], a mean. owner: int64 [E, S^2], -1 = no target."""
    target = (owner >= 0).to(torch.float32)
    total = F.binary_cross_entropy_with_logits(cell_logits.float(), target, reduction="sum")
    return total / shared_count(target.numel(), total)


def segmentation(cell_masks: Tensor, owner: Tensor, batch: Batch) -> Tensor:
    """Compute l_seg: the binary cross-entropy of the masks of positive cells, a mean over their pixels; other cells teach nothing.

    cell_masks: float [E, S^2, h, w].  The truth is the share of each of its pixels that the object covers.
    """
    chosen = (owner >= 0).nonzero()
    size = cell_masks.shape[-2:]
    count = shared_count(len(chosen) * size[0] * size[1], cell_masks)
    if not len(chosen):
        return (cell_masks.float() * 0.0).sum() / count
    logits = cell_masks[chosen[:, 0], chosen[:, 1]].float()
    wanted = []
    for e, cells in enumerate(owner):
        masks = batch.instance_masks[int(batch.image_index[e])][batch.target_index[e]]
        small = F.interpolate(masks[:, None].float(), size=size, mode="area")[:, 0]
        wanted.append(small[cells[cells >= 0].to(small.device)])
    return F.binary_cross_entropy_with_logits(logits, torch.cat(wanted).to(logits), reduction="sum") / count


def refinement(mask_logits: Tensor, coarse: Tensor, gt_masks: Tensor, least_iou: float) -> Tensor:
    """Compute l_ref: the binary cross-entropy of the final mask, a mean over pixels and expressions.

    It is 0 for an expression whose selected mask's IoU with the truth is not above theta, because a wrong choice must not be taught.
    mask_logits: float [E, 2, h, w].  coarse: float [E, h', w'].  gt_masks: bool [E, H, W].
    """
    size = gt_masks.shape[-2:]
    with torch.no_grad():
        chosen = F.interpolate(coarse[:, None].float(), size=size, mode="bilinear", align_corners=False)[:, 0] > 0
        shared = (chosen & gt_masks).sum(dim=(1, 2)).float()
        right = shared > least_iou * (chosen | gt_masks).sum(dim=(1, 2)).float()
    logits = F.interpolate((mask_logits[:, 1:] - mask_logits[:, :1]).float(), size=size, mode="bilinear", align_corners=False)[:, 0]
    each = F.binary_cross_entropy_with_logits(logits, gt_masks.float(), reduction="none").mean(dim=(1, 2))
    return torch.where(right, each, each * 0.0).sum() / shared_count(len(each), each)


class IsfpCriterion:
    """Turn a grounding answer and its batch into named, unweighted terms and their weighted `total`."""

    reads_targets_only = True

    def __init__(self, decoder: IsfpConfig) -> None:
        self.config, config = decoder, decoder.loss
        self.grex = GrexLosses(config, config.class_weights)
        weights = asdict(config)
        self.weights = self.grex.weights | {name: float(weights[name]) for name in OWN_TERMS}

    def __call__(self, output: GroundingOutput, batch: Batch) -> dict[str, Tensor]:
        """Return name -> scalar of the terms with a weight, and `total`.

        Raises:
            GrexError: a batch without masks, or a term whose head the model lacks.
        """
        if batch.gt_masks is None:
            raise fault("a batch without masks", "masks: ISFP learns the mask of every cell", "use data with masks")
        extra: IsfpExtra = output.extra
        terms, weight = self.grex.terms(output, batch), self.weights
        if extra.cell_logits is None:  # a single mask, of every expression
            if weight["segmentation"]:
                wanted = F.interpolate(batch.gt_masks[:, None].float(), size=extra.cell_masks.shape[-2:], mode="area")
                total = F.binary_cross_entropy_with_logits(extra.cell_masks.float(), wanted, reduction="sum")
                terms["segmentation"] = total / shared_count(wanted.numel(), wanted)
        else:
            owner = target_cells(batch, self.config.minimap_side)
            if weight["identification"]:
                terms["identification"] = identification(extra.cell_logits, owner)
            if weight["segmentation"]:
                terms["segmentation"] = segmentation(extra.cell_masks, owner, batch)
        if self.config.refinement and weight["refinement"]:
            terms["refinement"] = refinement(output.mask_logits, extra.coarse, batch.gt_masks, self.config.loss.least_iou)
        return {**terms, "total": torch.stack([weight[name] * value for name, value in terms.items()]).sum()}
