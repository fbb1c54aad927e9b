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
from grex_mllm.models.hard_examples import HardConfig, hardest_masks, pixel_losses
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


def segmentation(cell_masks: Tensor, owner: Tensor, batch: Batch, hard: HardConfig | None = None) -> Tensor:
    """Compute l_seg: the binary cross-entropy of the masks of positive cells, a mean over their pixels; other cells teach nothing.

    cell_masks: float [E, S^2, h, w].  The truth is the share of each of its pixels that the object covers.
    """
    chosen = (owner >= 0).nonzero()
    size = cell_masks.shape[-2:]
    if not len(chosen):
        logits, wanted = cell_masks.flatten(2)[:0, 0].float(), cell_masks.new_zeros(0, size[0] * size[1])
        return mean_of_pixels(logits, wanted, hard) + (cell_masks.float() * 0.0).sum()
    masks = []
    for e, cells in enumerate(owner):
        own = batch.instance_masks[int(batch.image_index[e])][batch.target_index[e]]
        small = F.interpolate(own[:, None].float(), size=size, mode="area")[:, 0]
        masks.append(small[cells[cells >= 0].to(small.device)])
    return mean_of_pixels(cell_masks[chosen[:, 0], chosen[:, 1]].flatten(1), torch.cat(masks).flatten(1).to(cell_masks.device), hard)


def mean_of_pixels(logits: Tensor, wanted: Tensor, hard: HardConfig | None) -> Tensor:
    """Compute the mean binary cross-entropy of M masks float [M, S], or what `hard` makes of it."""
    each, weight = hardest_masks(*pixel_losses(logits, wanted, hard or HardConfig()), hard or HardConfig())
    return each.sum() / shared_count(weight.sum(), each)


def refinement(mask_logits: Tensor, coarse: Tensor, gt_masks: Tensor, least_iou: float, hard: HardConfig | None = None) -> Tensor:
    """Compute l_ref: the binary cross-entropy of the final mask, a mean over pixels and expressions.

    It is 0 for an expression whose selected mask's IoU with the truth is not above theta, because a wrong choice must not be taught.
    mask_logits: float [E, 2, h, w].  coarse: float [E, h', w'].  gt_masks: bool [E, H, W].
    """
    hard = hard or HardConfig()
    size = gt_masks.shape[-2:]
    with torch.no_grad():
        chosen = F.interpolate(coarse[:, None].float(), size=size, mode="bilinear", align_corners=False)[:, 0] > 0
        shared = (chosen & gt_masks).sum(dim=(1, 2)).float()
        right = shared > least_iou * (chosen | gt_masks).sum(dim=(1, 2)).float()
    logits = F.interpolate((mask_logits[:, 1:] - mask_logits[:, :1]).float(), size=size, mode="bilinear", align_corners=False)[:, 0]
    each, weight = pixel_losses(logits.flatten(1), gt_masks.flatten(1), hard)
    each, weight = hardest_masks(torch.where(right[:, None], each, each * 0.0), weight, hard)
    num = weight.sum(dim=1)
    return (each.sum(dim=1) / num.clamp(min=1)).sum() / shared_count((num > 0).sum(), each)


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
                terms["segmentation"] = mean_of_pixels(extra.cell_masks.flatten(1), wanted.flatten(1), self.config.loss.hard)
        else:
            owner = target_cells(batch, self.config.minimap_side)
            if weight["identification"]:
                terms["identification"] = identification(extra.cell_logits, owner)
            if weight["segmentation"]:
                terms["segmentation"] = segmentation(extra.cell_masks, owner, batch, self.config.loss.hard)
        if self.config.refinement and weight["refinement"]:
            loss = self.config.loss
            terms["refinement"] = refinement(output.mask_logits, extra.coarse, batch.gt_masks, loss.least_iou, loss.hard)
        return {**terms, "total": torch.stack([weight[name] * value for name, value in terms.items()]).sum()}
