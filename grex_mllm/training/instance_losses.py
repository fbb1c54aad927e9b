"""Loss terms of `rela_instances`: regions against all objects of the image, then target selection per expression.

Source: small-scale study of the house plan (regions that know instances); Hungarian matching as in DETR, dice as in MaskFormer;
the box overlap is generalized box IoU (Rezatofighi et al.). The papers supervise regions by a minimap of the targets instead.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor
from torch.nn import functional as F

from grex_mllm.config import LossConfig
from grex_mllm.models.decoders.rela_instances import Regions, box_area
from grex_mllm.ops.boxes import cxcywh_to_xyxy, generalized_iou
from grex_mllm.training.matcher import Matches, match
from grex_mllm.types import Batch, GroundingOutput

IGNORED = -100
COUNT_CLAMP = 6


def region_terms(regions: Regions, batch: Batch) -> tuple[dict[str, Tensor], Matches]:
    """Return the language-free terms (means over the image layers) and the match of the last layer."""
    terms: dict[str, Tensor] = {}
    num_layers = len(regions.boxes_norm)
    masks = [_at_size(m, regions.mask_map) for m in batch.instance_masks]
    for layer in range(num_layers):
        matches = match(regions.boxes_norm[layer].detach(), batch.instance_boxes_norm, logits=regions.objectness[layer].detach())
        count = max(1, len(matches))
        goal = torch.zeros_like(regions.objectness[layer])
        goal[matches.problem, matches.query] = 1.0
        _add(terms, "objectness", _focal(regions.objectness[layer], goal) / count)
        predicted, wanted = regions.boxes_norm[layer][matches.problem, matches.query], matches.pick(batch.instance_boxes_norm)
        _add(terms, "box_l1", (predicted - wanted).abs().sum() / count)
        _add(terms, "box_giou", (1.0 - generalized_iou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))).sum() / count)
        embeddings = regions.mask_embeddings[layer][matches.problem, matches.query]
        bce, dice = _mask_terms(embeddings, matches.problem, regions.mask_map, wanted, matches.pick(masks))
        _add(terms, "mask_bce", bce / count)
        _add(terms, "mask_dice", dice / count)
    return {name: value / num_layers for name, value in terms.items()}, matches


def attribute_terms(regions: Regions, batch: Batch, matches: Matches) -> dict[str, Tensor]:
    """Return one cross-entropy per scene attribute on the kept regions that match an object (scene metadata; optional)."""
    if not regions.attribute_logits or batch.instance_attributes is None:
        return {}
    labels_kept = kept_instances(regions, matches)
    terms = {}
    for name, logits in regions.attribute_logits.items():
        labels = torch.full_like(labels_kept, IGNORED)
        for b, values in enumerate(batch.instance_attributes[name]):
            known = labels_kept[b] >= 0
            labels[b, known] = values[labels_kept[b, known]]
        flat = labels.flatten()
        if (flat != IGNORED).any():
            terms[f"attribute_{name}"] = F.cross_entropy(logits.flatten(0, 1), flat, ignore_index=IGNORED)
    return terms


def kept_instances(regions: Regions, matches: Matches) -> Tensor:
    """Return int64 [B, K]: the instance that each kept region was matched to, or -1."""
    owner = torch.full(regions.objectness[-1].shape, -1, dtype=torch.int64, device=regions.kept.device)
    owner[matches.problem, matches.query] = matches.target
    return owner.gather(1, regions.kept)


def selection_terms(output: GroundingOutput, batch: Batch, matches: Matches) -> dict[str, Tensor]:
    """Return target (binary, every language layer), no_target and count terms."""
    regions: Regions = output.auxiliary["regions"]
    owners = kept_instances(regions, matches)[batch.image_index]
    wanted = torch.zeros_like(output.auxiliary["target_logits"][-1])
    for e, targets in enumerate(batch.target_index):
        wanted[e] = torch.isin(owners[e], targets).float()
    layers = output.auxiliary["target_logits"]
    weight = 1.0 + wanted  # targets are the rarer class
    each = [F.binary_cross_entropy_with_logits(logits, wanted, weight=weight, reduction="sum") for logits in layers]
    terms = {
        "target": torch.stack(each).sum() / (len(layers) * max(1, len(wanted)) * 4.0),
        "no_target": F.cross_entropy(output.no_target_logits, batch.no_target.long()),
    }
    if output.count_logits is not None:
        terms["count"] = F.cross_entropy(output.count_logits, batch.gt_count.clamp(max=COUNT_CLAMP))
    return terms


class InstanceLoss:
    """Named terms of `rela_instances` and their weighted total. A weight of 0 leaves the term out."""

    def __init__(self, config: LossConfig) -> None:
        self.weights = asdict(config.instances)

    def __call__(self, output: GroundingOutput, batch: Batch) -> dict[str, Tensor]:
        """Return name -> unweighted scalar, and "total"."""
        regions: Regions = output.auxiliary["regions"]
        terms, matches = region_terms(regions, batch)
        terms |= attribute_terms(regions, batch, matches)
        terms |= selection_terms(output, batch, matches)
        total = output.no_target_logits.new_zeros(())
        for name, value in terms.items():
            total = total + self.weights.get("attribute" if name.startswith("attribute_") else name, 0.0) * value
        return terms | {"total": total}


def _add(terms: dict[str, Tensor], name: str, value: Tensor) -> None:
    terms[name] = terms[name] + value if name in terms else value


def _focal(logits: Tensor, goal: Tensor, alpha: float = 0.35, gamma: float = 2.0) -> Tensor:
    prob = logits.sigmoid()
    ce = F.binary_cross_entropy_with_logits(logits, goal, reduction="none")
    wrong = torch.where(goal > 0, 1.0 - prob, prob)
    return (torch.where(goal > 0, alpha, 1.0 - alpha) * wrong**gamma * ce).sum()


def _at_size(masks: Tensor, mask_map: Tensor) -> Tensor:
    """Bring bool masks [N, H, W] to the mask map's size as float shares in [0, 1]."""
    size = mask_map.shape[-2:]
    if masks.shape[-2:] == size:
        return masks.float()
    if not len(masks):
        return mask_map.new_zeros(0, *size).float()
    return F.interpolate(masks[:, None].float(), size=size, mode="area")[:, 0]


def _mask_terms(embeddings: Tensor, image: Tensor, mask_map: Tensor, boxes: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return sums over M regions of BCE and dice inside the true boxes with a margin; embeddings [M, D], masks float [M, H, W]."""
    if not len(embeddings):
        nothing = embeddings.float().sum() + mask_map.float().sum() * 0.0
        return nothing, nothing
    height, width = mask_map.shape[-2:]
    inside = box_area(boxes, height, width, margin=0.25).flatten(1)
    sizes = torch.bincount(image, minlength=len(mask_map)).tolist()
    maps = mask_map.flatten(2).unbind(0)  # the gradient of unbind is one stack; that of indexing would be a sum of full-size maps
    parts = [part @ pixels for part, pixels in zip(embeddings.split(sizes), maps, strict=True) if len(part)]
    logits, goal = torch.cat(parts).float(), masks.flatten(1)
    bce = F.binary_cross_entropy_with_logits(logits, goal, reduction="none").masked_fill(~inside, 0.0).sum(-1) / inside.sum(-1).clamp(min=1)
    prob = logits.sigmoid().masked_fill(~inside, 0.0)
    dice = 1.0 - (2.0 * (prob * goal).sum(-1) + 1.0) / (prob.sum(-1) + goal.sum(-1) + 1.0)
    return bce.sum(), dice.sum()
