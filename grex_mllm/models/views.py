"""One image seen twice, as it is and mirrored: the mean of both answers, as is common at test time (`predict.mirror`).

The mirrored image is asked with left and right swapped in the words; what it answers is laid back onto the image. An expression whose
mirrored words are not certain (`mirrored_words`) keeps its answer about the image as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from grex_mllm.data.augment.words import mirrored_words
from grex_mllm.models.grex_heads import two_way
from grex_mllm.ops.boxes import box_iou, cxcywh_to_xyxy, xyxy_to_cxcywh
from grex_mllm.types import Geometry, GroundingOutput

LEAST_CHANCE = 1e-6  # probabilities lie so far from 0 and 1
SAME_OBJECT = 0.6  # IoU from which boxes of both answers, each the other's nearest, are one


def mean_of_views(
    plain: GroundingOutput,
    mirrored: GroundingOutput,
    asked: Tensor,
    geometry: Geometry,
    canvas: tuple[int, int],
    decide: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> GroundingOutput:
    """Return the answers for E expressions of one image from those about it and about its mirror image.

    No target and count: the mean of the log-probabilities. Masks: `decide` (`target_prob`, `no_target_logits`) -> `mask_logits` of the mean
    probability where the decoder gives one, else the mean of the two answers. Boxes that both found are their mean, with the mean score;
    those of one answer alone stay with half of it. What the pictures and the criterion read is that of `plain`.

    asked: bool [E], which expressions were asked of the mirror image; the others keep `plain` (their boxes among others that score 0).
    geometry: how the image lies in the network's input, the same for both.  canvas: (H, W) that the maps cover, padding included.
    """
    share = asked.to(plain.mask_logits.device).float() / 2
    changed = mean_heads(plain, mirrored, share)
    if decide is not None and plain.target_prob is not None and mirrored.target_prob is not None:
        back = _unmirrored(plain.target_prob, mirrored.target_prob, geometry, canvas)
        changed["target_prob"] = torch.lerp(plain.target_prob, back, share[:, None, None])
        masks = decide(changed["target_prob"], changed["no_target_logits"])
    else:
        one, other = (answer.mask_logits.float() for answer in (plain, mirrored))
        one, other = (one[:, 1] - one[:, 0]).sigmoid(), (other[:, 1] - other[:, 0]).sigmoid()
        mean = torch.lerp(one, _unmirrored(one, other, geometry, canvas), share[:, None, None])
        masks = two_way(mean.logit(LEAST_CHANCE))
    changed["mask_logits"] = torch.where(share[:, None, None, None] > 0, masks.to(plain.mask_logits.dtype), plain.mask_logits)
    if plain.boxes_norm is not None and plain.box_logits is not None:
        changed["boxes_norm"], changed["box_logits"] = _boxes(plain, mirrored, share, geometry, canvas)
    return plain._replace(**changed)


def mirrored_all(expressions: Sequence[str]) -> tuple[list[str], Tensor]:
    """Return expressions for the mirror image, and bool [E]: which are certain; the others are returned as they are."""
    swapped = [mirrored_words(text) for text in expressions]
    return [text or own for text, own in zip(swapped, expressions, strict=True)], torch.tensor([text is not None for text in swapped])


def mirrored_boxes(boxes_norm: Tensor, geometry: Geometry, canvas: tuple[int, int]) -> Tensor:
    """Return boxes float [..., 4] cxcywh of an image where they lie in its mirror image, and the other way round."""
    centre = (2 * geometry.left + geometry.input_width) / canvas[1] - boxes_norm[..., :1]
    return torch.cat([centre, boxes_norm[..., 1:]], dim=-1)


def mean_heads(plain: GroundingOutput, mirrored: GroundingOutput, share: Tensor) -> dict[str, Tensor]:
    """Return the mean log-probabilities for no target and count, of those that are there. share: float [E] in [0, 1], of `mirrored`."""
    changed = {}
    for name in ("no_target_logits", "count_logits"):
        if (one := getattr(plain, name)) is not None:
            mean = torch.lerp(one.float().log_softmax(-1), getattr(mirrored, name).float().log_softmax(-1), share[:, None])
            changed[name] = torch.where(share[:, None] > 0, mean, one.float())
    return changed


def _unmirrored(plain: Tensor, mirrored: Tensor, geometry: Geometry, canvas: tuple[int, int]) -> Tensor:
    """Return maps [..., h, w] of the mirror image as they lie on the image, bilinear; in the padding those of `plain`."""
    width, cells = canvas[1], mirrored.shape[-1]
    centre = (torch.arange(cells, device=mirrored.device, dtype=torch.float32) + 0.5) * (width / cells)
    there = 2 * geometry.left + geometry.input_width - centre  # the same place in the mirror image
    inside = (there >= 0) & (centre <= geometry.seen_size[1])
    place = (there * (cells / width) - 0.5).clamp(0, cells - 1)
    low = place.floor().long()
    back = torch.lerp(mirrored[..., low], mirrored[..., (low + 1).clamp(max=cells - 1)], (place - low).to(mirrored.dtype))
    return torch.where(inside, back, plain)


def _boxes(
    plain: GroundingOutput, mirrored: GroundingOutput, share: Tensor, geometry: Geometry, canvas: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return boxes float [E, 2 Q, 4] cxcywh and logits [E, 2 Q]: those of the image, then those of the mirror image that it has not."""
    assert plain.boxes_norm is not None and plain.box_logits is not None and mirrored.boxes_norm is not None
    assert mirrored.box_logits is not None
    scores, others = plain.box_logits.float().sigmoid(), mirrored.box_logits.float().sigmoid()
    corners, turned = plain.boxes_norm.float(), mirrored_boxes(mirrored.boxes_norm.float(), geometry, canvas)
    corners, turned = cxcywh_to_xyxy(corners), cxcywh_to_xyxy(turned)
    overlap = torch.stack([box_iou(one, other) for one, other in zip(corners, turned, strict=True)])
    best, at = overlap.max(dim=2)
    mutual = overlap.argmax(dim=1).gather(1, at) == torch.arange(overlap.shape[1], device=at.device)
    paired = (best >= SAME_OBJECT) & mutual & (share[:, None] > 0)
    weight = share[:, None]
    partner = turned.gather(1, at[..., None].expand(-1, -1, 4))
    corners = torch.where(paired[..., None], torch.lerp(corners, partner, weight[..., None]), corners)
    scores = scores * (1 - weight) + torch.where(paired, others.gather(1, at), 0) * weight
    taken = torch.zeros_like(others).scatter_reduce(1, at, paired.float(), "amax")
    others = others * weight * (1 - taken)
    return xyxy_to_cxcywh(torch.cat([corners, turned], dim=1)), torch.cat([scores, others], dim=1).logit(LEAST_CHANCE)
