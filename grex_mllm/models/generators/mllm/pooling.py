"""Object tokens pooled from the image tokens of a multimodal model instead of from the maps of the grounding model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grex_mllm.models.generators.region_tokens.tokens import ObjectTokens, RegionTokens
from grex_mllm.models.multimodal.families import Layout

FINE = 8  # pixels of a mask on each side of an image token


def pool_objects(
    region_tokens: RegionTokens, tokens: list[Tensor], layouts: list[Layout], masks: list[Tensor], sizes: list[tuple[int, int]]
) -> ObjectTokens:
    """Pool every object of B images from the image tokens of each.

    tokens: B x float [n, D].  layouts: where they look.  masks: B x bool [N_b, H, W] on a network input.  sizes: B x height and width of
    the image there, without padding.
    """
    found = []
    for own, layout, mask, size in zip(tokens, layouts, masks, sizes, strict=True):
        features = own[layout.index.to(own.device)].permute(2, 0, 1)[None]
        found.append(region_tokens([features], [mask_on(layout, mask[:, : size[0], : size[1]])]))
    most = max(objects.tokens.shape[1] for objects in found)
    return _joined([_padded(objects, most) for objects in found])


def mask_on(layout: Layout, masks: Tensor) -> Tensor:
    """Return bool [N, FINE * h, FINE * w]: masks [N, H, W] of a picture on the part of the plane that its image tokens cover.

    A fine cell that an object touches is covered, so no object is lost.
    """
    height, width = masks.shape[1:]
    rows, columns = layout.index.shape
    left, top, right, bottom = layout.box
    pad = [round(-left * width), round((right - 1) * width), round(-top * height), round((bottom - 1) * height)]
    placed = F.pad(masks.float(), pad)
    if not len(masks):
        return masks.new_zeros(0, FINE * rows, FINE * columns, dtype=torch.bool)
    return F.adaptive_max_pool2d(placed[None], (FINE * rows, FINE * columns))[0] > 0


def _padded(objects: ObjectTokens, number: int) -> ObjectTokens:
    more = number - objects.tokens.shape[1]
    order = torch.arange(objects.order.shape[1], number, device=objects.order.device).expand(1, -1)
    tokens, present, area = F.pad(objects.tokens, (0, 0, 0, more)), F.pad(objects.present, (0, more)), F.pad(objects.area, (0, more))
    return ObjectTokens(tokens, present, torch.cat([objects.order, order], 1), area, objects.image)


def _joined(objects: list[ObjectTokens]) -> ObjectTokens:
    parts = zip(*((o.tokens, o.present, o.order, o.area, o.image) for o in objects), strict=True)
    tokens, present, order, area, image = (torch.cat(list(part)) for part in parts)
    return ObjectTokens(tokens, present, order, area, image)
