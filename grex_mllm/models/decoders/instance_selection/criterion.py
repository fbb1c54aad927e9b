"""Loss terms of `instance_selection`: regions against all objects of the image, then target selection per expression.

Source: small-scale study of the house plan (regions that know instances); Hungarian matching as in DETR, dice as in MaskFormer;
the box overlap is generalized box IoU (Rezatofighi et al.). The papers supervise regions by a minimap of the targets instead.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor
from torch.nn import functional as F

from grex_mllm.models.decoders.instance_selection.config import InstanceSelectionConfig
from grex_mllm.models.decoders.instance_selection.regions import Regions, box_area, gather, grid_boxes
from grex_mllm.models.hard_examples import HardConfig, check_hard, hardest_masks, pixel_losses
from grex_mllm.models.word_bags import bag_loss, places_of
from grex_mllm.ops.losses import count_cross_entropy, focal_sum, giou_each, matched_boxes, shared_count
from grex_mllm.ops.matching import match
from grex_mllm.types import Batch, GroundingOutput

IGNORED = -100
FOCAL_ALPHA = 0.35
CENTRE_SPREAD = 0.15  # standard deviation of the heat around a centre, as a share of the box
NEAR_CENTRE = 0.4  # cells with more heat than this learn the object's box
LEAST_OVERLAP = 0.2  # generalized IoU under which a matched region does not stand for the object


def heat_terms(regions: Regions, batch: Batch) -> dict[str, Tensor]:
    """Return heat, cell_box_l1, cell_box_giou: the proposals against the centres and boxes of all objects.

    The heat map learns one peak for each object, with CenterNet's penalty-reduced focal loss (Zhou et al. 2019, equation 1) and a Gaussian
    that grows with the box; every cell near a centre learns the object's box.
    """
    height, width = regions.heat_size
    cells = grid_boxes(height, width, regions.heat_logits)
    boxes = torch.nn.utils.rnn.pad_sequence(batch.instance_boxes_norm, batch_first=True).to(cells)  # [B, N, 4]; padding has no area
    if boxes.shape[1] == 0:
        boxes = boxes.new_zeros(len(boxes), 1, 4)
    real = boxes[..., 2] > 0
    offset = cells[None, :, None, :2] - boxes[:, None, :, :2]
    spread = (boxes[:, None, :, 2:] * CENTRE_SPREAD).clamp(min=1e-6).maximum(0.55 * cells[0, 2:])
    near = (-(offset / spread).square().sum(-1) / 2.0).exp() * real[:, None]  # [B, S, N]
    column = (boxes[..., 0] * width).long().clamp(0, width - 1)
    centre = (boxes[..., 1] * height).long().clamp(0, height - 1) * width + column
    peak = torch.zeros_like(regions.heat_logits).scatter_reduce(1, centre, real.to(regions.heat_logits), "amax")
    best, owner = near.max(dim=-1)
    logits = regions.heat_logits
    prob = logits.sigmoid()
    positive = -F.logsigmoid(logits) * (1.0 - prob).square() * peak
    negative = -F.logsigmoid(-logits) * prob.square() * (1.0 - best).pow(4) * (1.0 - peak)
    count = shared_count(real.sum(), logits)
    inside = best > NEAR_CENTRE
    predicted = regions.cell_boxes_norm[inside]
    wanted = gather(boxes, owner)[inside]
    near_count = shared_count(len(wanted), logits)
    return {
        "heat": (positive.sum() + negative.sum()) / count,
        "cell_box_l1": (predicted - wanted).abs().sum() / near_count,
        "cell_box_giou": (1.0 - giou_each(predicted, wanted)).sum() / near_count,
    }


def region_terms(regions: Regions, batch: Batch, hard: HardConfig | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Return the regions' terms (box and score: means over the image layers) and int64 [B, K]: the instance each region stands for, or -1.

    A region that overlaps its match too little stands for nothing.
    """
    terms: dict[str, Tensor] = {}
    num_layers = len(regions.boxes_norm)
    owner = torch.full_like(regions.kept, -1)
    for layer in range(num_layers):
        matches = match(regions.boxes_norm[layer].detach(), batch.instance_boxes_norm, logits=regions.objectness[layer].detach())
        count = shared_count(len(matches), regions.mask_map)
        predicted, wanted = matched_boxes(regions.boxes_norm[layer], batch.instance_boxes_norm, matches)
        giou = giou_each(predicted, wanted)
        close = giou.detach() > LEAST_OVERLAP
        goal = torch.zeros_like(regions.objectness[layer])
        goal[matches.problem, matches.query] = close.to(goal.dtype)
        _add(terms, "objectness", focal_sum(regions.objectness[layer], goal, FOCAL_ALPHA) / count)
        _add(terms, "box_l1", (predicted - wanted).abs().sum() / count)
        _add(terms, "box_giou", (1.0 - giou).sum() / count)
        if layer == num_layers - 1:
            owner[matches.problem, matches.query] = torch.where(close, matches.target, -1)
    terms = {name: value / num_layers for name, value in terms.items()}
    masks = matches.pick([_at_size(m, regions.mask_map) for m in batch.instance_masks]) if len(matches) else regions.mask_map.new_zeros(0)
    hard = hard or HardConfig()
    embeddings = regions.mask_embeddings[-1][matches.problem, matches.query]
    bce, dice, num = _mask_terms(embeddings, matches.problem, regions.mask_map, wanted, masks, hard)
    learned = count if hard.masks == 1 else shared_count(num, regions.mask_map)
    return terms | {"mask_bce": bce / learned, "mask_dice": dice / count}, owner


def attribute_terms(regions: Regions, batch: Batch, owner: Tensor) -> dict[str, Tensor]:
    """Return one cross-entropy per scene attribute, a mean over the kept regions that match an object with a known value; 0 without any."""
    terms = {}
    for name, logits in regions.attribute_logits.items():
        labels = torch.full_like(owner, IGNORED)
        for b, values in enumerate((batch.instance_attributes or {}).get(name, ())):
            known = owner[b] >= 0
            labels[b, known] = values[owner[b, known]]
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        terms[f"attribute_{name}"] = total / shared_count((labels != IGNORED).sum(), total)
    return terms


def word_terms(regions: Regions, batch: Batch, owner: Tensor) -> dict[str, Tensor]:
    """Return `bag_loss` of the expressions' words from the kept regions that stand for their targets; nothing without words."""
    if regions.word_logits is None or regions.word_ids is None:
        return {}
    owners = owner[batch.image_index]
    member = torch.stack([torch.isin(row, targets) for row, targets in zip(owners, batch.target_index, strict=True)])
    ids, listed = places_of(batch.text_ids, regions.word_ids[0])
    return {"words": bag_loss(regions.word_logits, batch.image_index, member, ids, batch.text_mask.bool() & listed)}


def selection_terms(output: GroundingOutput, batch: Batch, owner: Tensor) -> dict[str, Tensor]:
    """Return target (binary, every language layer), no_target and count terms."""
    owners = owner[batch.image_index]
    wanted = torch.zeros_like(output.extra.target_logits[-1])
    for e, targets in enumerate(batch.target_index):
        wanted[e] = torch.isin(owners[e], targets).float()
    layers = output.extra.target_logits
    weight = 1.0 + wanted  # targets are the rarer class
    each = [F.binary_cross_entropy_with_logits(logits, wanted, weight=weight, reduction="sum") for logits in layers]
    num_expressions = shared_count(len(wanted), wanted)
    assert output.no_target_logits is not None
    no_target = F.cross_entropy(output.no_target_logits, batch.no_target.long(), reduction="sum")
    terms = {"target": torch.stack(each).sum() / (len(layers) * num_expressions * 4.0), "no_target": no_target / num_expressions}
    if output.count_logits is not None:
        terms["count"] = count_cross_entropy(output.count_logits, batch.gt_count)
    return terms


class InstanceSelectionCriterion:
    """Named terms of `instance_selection` and their weighted total. A weight of 0 leaves the term out."""

    def __init__(self, config: InstanceSelectionConfig) -> None:
        self.hard = config.loss.hard
        check_hard(self.hard)
        self.weights = {name: value for name, value in asdict(config.loss).items() if name != "hard"}

    def __call__(self, output: GroundingOutput, batch: Batch) -> dict[str, Tensor]:
        """Return name -> unweighted scalar, and "total"."""
        regions: Regions = output.extra.regions
        terms, owner = region_terms(regions, batch, self.hard)
        terms |= heat_terms(regions, batch)
        terms |= attribute_terms(regions, batch, owner)
        terms |= word_terms(regions, batch, owner)
        terms |= selection_terms(output, batch, owner)
        total = regions.heat_logits.new_zeros(())
        for name, value in terms.items():
            total = total + self.weights.get("attribute" if name.startswith("attribute_") else name, 0.0) * value
        return terms | {"total": total}


def _add(terms: dict[str, Tensor], name: str, value: Tensor) -> None:
    terms[name] = terms[name] + value if name in terms else value


def _at_size(masks: Tensor, mask_map: Tensor) -> Tensor:
    """Bring bool masks [N, H, W] to the mask map's size as float shares in [0, 1]."""
    size = mask_map.shape[-2:]
    if masks.shape[-2:] == size:
        return masks.float()
    if not len(masks):
        return mask_map.new_zeros(0, *size).float()
    return F.interpolate(masks[:, None].float(), size=size, mode="area")[:, 0]


def _mask_terms(
    embeddings: Tensor, image: Tensor, mask_map: Tensor, boxes: Tensor, masks: Tensor, hard: HardConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums over M regions of BCE and dice inside the true boxes with a margin, and how many of them the BCE learned.

    embeddings: [M, D].  masks: float [M, H, W].
    """
    if not len(embeddings):
        nothing = embeddings.float().sum() + mask_map.float().sum() * 0.0
        empty = mask_map.new_zeros(0, 1)
        hardest_masks(empty, empty, hard)  # the other processes may have regions, and wait for this one
        return nothing, nothing, torch.zeros_like(nothing)
    height, width = mask_map.shape[-2:]
    inside = box_area(boxes, height, width, margin=0.25).flatten(1)
    sizes = torch.bincount(image, minlength=len(mask_map)).tolist()
    maps = mask_map.flatten(2).unbind(0)  # the gradient of unbind is one stack; that of indexing would be a sum of full-size maps
    parts = [part @ pixels for part, pixels in zip(embeddings.split(sizes), maps, strict=True) if len(part)]
    logits, goal = torch.cat(parts).float(), masks.flatten(1)
    each, weight = hardest_masks(*pixel_losses(logits, goal, hard, inside=inside), hard)
    num = weight.sum(-1)
    bce = each.sum(-1) / num.clamp(min=1)
    prob = logits.sigmoid().masked_fill(~inside, 0.0)
    dice = 1.0 - (2.0 * (prob * goal).sum(-1) + 1.0) / (prob.sum(-1) + goal.sum(-1) + 1.0)
    return bce.sum(), dice.sum(), (num > 0).sum()
