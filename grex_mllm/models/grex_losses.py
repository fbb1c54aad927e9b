"""The loss terms of GREx, each a named function, and their weighted sum: shared by every decoder that answers with one dense mask.

Released ReLA: 5 (mask + 0.1 minimap + 0.1 no_target). GREx article, equation 2: 2 mask + 5 box + 0.2 region + 1 count. The weights stand
in the configuration; no term knows its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from grex_mllm.errors import fault
from grex_mllm.models.hard_examples import HardConfig, check_hard, hardest_masks, pixel_losses
from grex_mllm.ops.losses import count_cross_entropy, focal_sum, giou_each, matched_boxes, shared_count
from grex_mllm.ops.matching import MatchCost, Matches, match
from grex_mllm.types import Batch, GroundingOutput

FOCAL_ALPHA = 0.25
LEAST_WEIGHT = 1e-12  # what a sum of weights is at least
MASK_TERMS = ("mask", "minimap")
BOX_TERMS = ("box_l1", "box_giou", "box_score")
TERMS = (*MASK_TERMS, "no_target", *BOX_TERMS, "count")


@dataclass
class GrexLossConfig:
    """Weights of the named loss terms; 0 switches a term off. The defaults are the article's joint weights (2, 5, 0.2, 1)."""

    mask: float = 2.0
    minimap: float = 0.2
    no_target: float = 0.2
    box_l1: float = 5.0
    box_giou: float = 5.0
    box_score: float = 2.0
    count: float = 1.0
    minimap_target: str = "area"  # area (share of the cell, a soft target) | truncated (as released: 1 where all sampled pixels are)
    box_score_kind: str = "focal"  # focal | bce
    match_score: float = 2.0  # weights of the pairing cost of boxes and queries
    match_l1: float = 5.0
    match_giou: float = 2.0
    hard: HardConfig = field(default_factory=HardConfig)  # hard pixels and masks count more; of `mask` (isfp: of its own mask terms, too)


def mask_cross_entropy(mask_logits: Tensor, gt_masks: Tensor, class_weights: Tensor, hard: HardConfig | None = None) -> Tensor:
    """Compute the weighted two-class cross-entropy of masks, a scalar.

    The logits [E, 2, h, w] are resized bilinearly to the masks' size [E, H, W]; the mean is over all pixels of the batch, weighted by class
    (sum of w_y ce over sum of w_y), as released. Samples without target have all-background masks and count like any other.
    hard: the focal loss in its place, or a mean over the hardest pixels and masks alone.
    """
    logits = F.interpolate(mask_logits.float(), size=gt_masks.shape[-2:], mode="bilinear", align_corners=False)
    if hard is None or hard.off:
        return _weighted_cross_entropy(logits, gt_masks.long(), class_weights)
    each, weight = pixel_losses((logits[:, 1] - logits[:, 0]).flatten(1), gt_masks.flatten(1), hard, class_weights)
    each, weight = hardest_masks(each, weight, hard)
    return each.sum() / shared_count(weight.sum(), each, least=LEAST_WEIGHT)


def minimap_target(gt_masks: Tensor, side: int, kind: str) -> Tensor:
    """Shrink masks [E, H, W] to the target share float32 [E, P * P] of each region, row by row.

    truncated: bilinear to P x P without antialiasing, then cut to an integer, as released: at 480 pixels and P = 10 a cell reads the four
    pixels at its centre, and is 1 only where all four are. area: the share of the cell that the target covers (small targets then reach
    the minimap).

    Raises:
        GrexError: unknown kind.
    """
    masks = gt_masks[:, None].float()
    if kind == "truncated":
        return F.interpolate(masks, size=(side, side), mode="bilinear", align_corners=False).long().float().flatten(1)
    if kind == "area":
        return F.adaptive_avg_pool2d(masks, (side, side)).flatten(1)
    raise fault(f'model.decoder.loss.minimap_target is "{kind}"', '"area" or "truncated"', "choose one of them")


def own_minimap_target(gt_masks: Tensor, active: Tensor, kind: str) -> Tensor:
    """Return `minimap_target` where each expression has a grid of its own, float32 [E, Q], 0 behind its last region.

    active: bool [E, Q], the first P_e * P_e of each row True.
    """
    sides = [math.isqrt(num) for num in active.sum(dim=1).tolist()]
    found = torch.zeros(active.shape, device=active.device)
    for side in sorted(set(sides)):
        own = torch.tensor([e for e, other in enumerate(sides) if other == side], device=active.device)
        found[own, : side * side] = minimap_target(gt_masks[own], side, kind)
    return found


def minimap_cross_entropy(minimap_logits: Tensor, target: Tensor, class_weights: Tensor, active: Tensor | None = None) -> Tensor:
    """Compute the weighted two-class cross-entropy of the minimap, a scalar.

    minimap_logits: [E, Q, 2].  target: [E, Q] in [0, 1]; a share counts for both classes. The weighted mean equals the hard one for 0 and
    1.  active: bool [E, Q], the regions that count; None = all.
    """
    share = torch.stack([1 - target, target], dim=-1) * class_weights.to(target)
    share = share if active is None else share * active[..., None]
    return -(share * minimap_logits.float().log_softmax(-1)).sum() / shared_count(share.sum(), share, least=LEAST_WEIGHT)


def no_target_cross_entropy(no_target_logits: Tensor, no_target: Tensor, class_weights: Tensor) -> Tensor:
    """Compute the weighted cross-entropy of logits [E, 2] against bool [E] (1 = no target), a scalar."""
    return _weighted_cross_entropy(no_target_logits.float(), no_target.long(), class_weights)


def box_l1(boxes_norm: Tensor, gt_boxes_norm: Sequence[Tensor], matches: Matches) -> Tensor:
    """Compute the L1 distance of matched boxes, the four numbers summed, mean over matches; 0 (with a gradient path) without matches."""
    predicted, wanted = matched_boxes(boxes_norm, gt_boxes_norm, matches)
    return (predicted - wanted).abs().sum() / shared_count(len(matches), boxes_norm)


def box_giou(boxes_norm: Tensor, gt_boxes_norm: Sequence[Tensor], matches: Matches) -> Tensor:
    """Compute 1 - generalized IoU of matched boxes, mean over matches; 0 (with a gradient path) without matches."""
    giou = giou_each(*matched_boxes(boxes_norm, gt_boxes_norm, matches))
    return (1 - giou).sum() / shared_count(len(matches), boxes_norm)


def box_score(box_logits: Tensor, matches: Matches, kind: str, active: Tensor | None = None) -> Tensor:
    """Score every query [E, Q]: 1 where it was matched, 0 elsewhere, so that no target means all low.

    focal: Lin et al. 2017 (alpha 0.25, gamma 2), summed, over the matches or the expressions, whichever are more (the mean over queries
    would drown the few matched ones; division by the matches alone explodes in a batch with few targets). bce: the plain mean. The papers
    give no loss for scores; a score is needed to rank boxes for the N_O best.  active: bool [E, Q], queries that there are; None = all.

    Raises:
        GrexError: unknown kind.
    """
    logits = box_logits.float()
    target = matches.indicator(logits.shape[1]).to(logits)
    if kind == "bce":
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        return entropy / shared_count(logits.numel() if active is None else active.sum(), logits)
    num_expressions = shared_count(logits.shape[0], logits)
    if kind != "focal":
        raise fault(f'model.decoder.loss.box_score_kind is "{kind}"', '"focal" or "bce"', "choose one of them")
    return focal_sum(logits, target, FOCAL_ALPHA) / shared_count(len(matches), logits).maximum(num_expressions)


class GrexLosses:
    """Turn a grounding answer and its batch into named, unweighted terms and their weighted `total`.

    class_weights: of background and target in the cross-entropies.  where: the configuration field that has the heads' switches.
    """

    reads_targets_only = True

    def __init__(self, config: GrexLossConfig, class_weights: list[float], where: str = "model.decoder.heads") -> None:
        self.config, self.where = config, where
        self.weights = {name: float(getattr(config, name)) for name in TERMS}
        if len(class_weights) != 2:
            raise fault(f"model.decoder.loss.class_weights is {class_weights}", "two numbers, for background and target", "give both")
        check_hard(config.hard)
        self.class_weights = torch.tensor(class_weights)
        self.cost = MatchCost(score=config.match_score, box_l1=config.match_l1, box_giou=config.match_giou)

    def __call__(self, output: GroundingOutput, batch: Batch) -> dict[str, Tensor]:
        """Return what `terms` gives, and `total`."""
        terms = self.terms(output, batch)
        return {**terms, "total": self.total(terms)}

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of what `terms` gave."""
        return torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()

    def terms(self, output: GroundingOutput, batch: Batch) -> dict[str, Tensor]:
        """Return name -> scalar of the terms with a weight.

        Raises:
            GrexError: a term has a weight, but the model lacks its head or the batch its target.
        """
        terms: dict[str, Tensor] = {}
        weight = self.weights
        if weight["mask"] or weight["minimap"]:
            if batch.gt_masks is None:
                raise fault("a batch without masks", "masks, for model.decoder.loss.mask and minimap", "set both to 0 for box-only data")
            if weight["mask"]:
                terms["mask"] = mask_cross_entropy(output.mask_logits, batch.gt_masks, self.class_weights, self.config.hard)
            if weight["minimap"]:
                if output.minimap_logits is None:
                    raise _headless("minimap", f"{self.where}.minimap")
                active, kind = output.active_regions, self.config.minimap_target
                side = math.isqrt(output.minimap_logits.shape[1])
                masks = batch.gt_masks
                target = minimap_target(masks, side, kind) if active is None else own_minimap_target(masks, active, kind)
                terms["minimap"] = minimap_cross_entropy(output.minimap_logits, target, self.class_weights, active)
        if weight["no_target"]:
            if output.no_target_logits is None:
                raise _headless("no_target", f"{self.where}.no_target")
            terms["no_target"] = no_target_cross_entropy(output.no_target_logits, batch.no_target, self.class_weights)
        if any(weight[name] for name in BOX_TERMS):
            terms.update(self._box_terms(output, batch))
        if weight["count"]:
            if output.count_logits is None:
                raise _headless("count", f"{self.where}.count")
            terms["count"] = count_cross_entropy(output.count_logits, batch.gt_count)
        return terms

    def _box_terms(self, output: GroundingOutput, batch: Batch) -> dict[str, Tensor]:
        if output.boxes_norm is None or output.box_logits is None:
            raise _headless("box_l1, box_giou, box_score", f"{self.where}.boxes")
        boxes, gt = output.boxes_norm, batch.gt_boxes_norm
        matches = _matches(output, gt, self.cost)
        made = {
            "box_l1": lambda: box_l1(boxes, gt, matches),
            "box_giou": lambda: box_giou(boxes, gt, matches),
            "box_score": lambda: box_score(output.box_logits, matches, self.config.box_score_kind, output.active_regions),
        }
        return {name: make() for name, make in made.items() if self.weights[name]}


def _weighted_cross_entropy(logits: Tensor, target: Tensor, class_weights: Tensor) -> Tensor:
    """Cross-entropy of logits [E, 2, ...] against int64 [E, ...], weighted by class: the sum of w_y ce over the sum of w_y."""
    weights = class_weights.to(logits)
    positive = target.sum()
    count = weights[0] * (target.numel() - positive) + weights[1] * positive
    return F.cross_entropy(logits, target, weight=weights, reduction="sum") / shared_count(count, logits, least=LEAST_WEIGHT)


def _matches(output: GroundingOutput, gt_boxes_norm: Sequence[Tensor], cost: MatchCost) -> Matches:
    """Pair the targets' boxes with regions; a row that is no region is never paired."""
    assert output.boxes_norm is not None
    active = output.active_regions
    if active is None:
        return match(output.boxes_norm, gt_boxes_norm, logits=output.box_logits, cost=cost)
    nowhere = output.boxes_norm.detach().masked_fill(~active[..., None], math.nan)  # the worst cost
    found = match(nowhere, gt_boxes_norm, logits=output.box_logits, cost=cost)
    real = active[found.problem, found.query]
    return replace(found, problem=found.problem[real], query=found.query[real], target=found.target[real])


def _headless(terms: str, field: str) -> Exception:
    return fault(f"loss weights for {terms}, but the model has no such head", f"{field}: true", "turn the head on, or set the weights to 0")
