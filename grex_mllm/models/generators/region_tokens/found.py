"""Training as in use: the objects beside a set are those that the grounding model finds, not those that are labelled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grex_mllm.models.describe import MAX_OVERLAP, SURE
from grex_mllm.models.generators.region_tokens.parts import GenerationPart
from grex_mllm.types import Batch, Proposals


@torch.no_grad()
def among_found(proposals: Proposals, batch: Batch, part: GenerationPart, share: float) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Add what was found to the objects of a batch, and say which objects may stand beside each of the G sets.

    share: of the images, those in which the found objects stand there, as `describe` has them; in the others the labelled ones do.
    Returns masks B x bool [N_b + M_b, H, W], boxes B x float [N_b + M_b, 4], and beside G x int64.
    """
    masks, boxes, chosen = [], [], (torch.rand(len(batch.instance_masks)) < share).tolist()
    for image, (known, known_boxes) in enumerate(zip(batch.instance_masks, batch.instance_boxes_norm, strict=True)):
        extra = found_masks(proposals, image, (int(batch.image.shape[-2]), int(batch.image.shape[-1]))) if chosen[image] else known[:0]
        masks.append(torch.cat([known, extra.to(known)]))
        boxes.append(torch.cat([known_boxes, known_boxes.new_zeros(len(extra), 4)]))
    beside = []
    for image, targets in zip(part.image_index.tolist(), part.target_index, strict=True):
        number = len(batch.instance_masks[image])
        labelled = torch.arange(number, device=part.image_index.device)
        beside.append(number + others(masks[image][number:], masks[image][targets]) if chosen[image] else labelled)
    return masks, boxes, beside


def found_masks(proposals: Proposals, image: int, size: tuple[int, int]) -> Tensor:
    """Return bool [M, H, W]: the proposals of an image that are sure and not empty, surest first. size: H, W of the network input."""
    scores, order = proposals.scores[image].sort(descending=True)
    sure = [int(place) for place, score in zip(order, scores, strict=True) if float(score) >= SURE]
    if not sure:
        return torch.zeros(0, *size, dtype=torch.bool, device=scores.device)
    found = F.interpolate(proposals.mask_logits[image][sure][None].float(), size=size, mode="bilinear", align_corners=False)[0] > 0
    return found[found.flatten(1).any(1)]


def others(found: Tensor, selected: Tensor) -> Tensor:
    """Return int64 positions of the found masks that are other objects than the selected ones, each object once; see `describe`."""
    every = torch.cat([selected.bool(), found.bool()]).flatten(1).float()
    area = every.sum(1).clamp(min=1)
    overlap = (every @ every.T) / torch.minimum(area[:, None], area)
    kept = list(range(len(selected)))
    for n in range(len(selected), len(every)):
        if all(float(overlap[n, k]) < MAX_OVERLAP for k in kept):
            kept.append(n)
    return torch.tensor(kept[len(selected) :], dtype=torch.int64, device=found.device) - len(selected)
