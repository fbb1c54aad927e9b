"""Region queries that know instances: image work once per image, language work once per expression.

Our own decoder. It keeps the idea of ReLA (GRES paper, section 4.2: regions gather image features, then model region-region and
region-language relations, and a region-wise probability x_r selects what belongs to the answer, Eq. 1) and differs from it in three points:

- The region-image part (RIA) is language-free and runs once per image. It is supervised against *all* objects of the image, so that a
  region is an instance: a box, a mask and a feature.
- Only the best regions go through the region-language part (RLA), which is therefore cheap: hundreds of expressions per image cost little.
- Region-region attention sees the boxes' relative geometry, weighted by what a region has read in the expression; half of its heads are not
  normalised, so that they can count ("the second from the left").

The answer is the union of the masks of the selected regions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grex_mllm.errors import fault
from grex_mllm.models.decoders.instance_selection.config import InstanceSelectionConfig
from grex_mllm.models.decoders.instance_selection.regions import (
    BOX_CODE_WIDTH,
    OUTSIDE_LOGIT,
    PAIR_WIDTH,
    ImagePart,
    Regions,
    box_code,
    gather,
    mlp,
    pair_geometry,
    precise,
)
from grex_mllm.models.grex_heads import two_way
from grex_mllm.ops.attention import attend, split_heads
from grex_mllm.ops.boxes import box_iou, cxcywh_to_xyxy
from grex_mllm.ops.paths import traced
from grex_mllm.ops.recordable import stable_order
from grex_mllm.types import NUM_COUNTS, DecoderInputs, GroundingOutput, Proposals, TextFeatures

LEAST_REAL = 1e-3
THRESHOLD, COUNT, OVERLAP = ANSWERS = ("threshold", "count", "overlap")
SMALLEST_LOGIT = 1e-3  # of a region that is part of the answer
LEAST_CHANCE = 1e-6  # probabilities lie so far from 0 and 1
SAME_OBJECT = 0.6  # IoU above which two regions are one object


class LanguageLayer(nn.Module):
    """Region-language attention, a multiplicative gate by what was read, and region-region attention with geometry (pre-norm)."""

    def __init__(self, width: int, num_heads: int, feedforward: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_text, self.norm_gate, self.norm_self, self.norm_ffn = (nn.LayerNorm(width) for _ in range(4))
        self.text_query, self.text_key_value, self.text_out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.gate, self.gate_out = nn.Linear(width, width), nn.Linear(width, width)
        self.self_in, self.self_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.geometry = nn.Linear(width, num_heads * PAIR_WIDTH)
        self.ffn = mlp(width, feedforward, width)

    def forward(self, x: Tensor, geometry: Tensor, real: Tensor, tokens: Tensor, token_mask: Tensor, sentence: Tensor) -> Tensor:
        """Update x [E, K, C]; geometry [E, K, K, G]; real [E, K]: how likely each region is an object; tokens [E, L, C], token_mask bool
        [E, 1, 1, L]; sentence [E, C]."""
        key, value = (split_heads(t, self.num_heads) for t in self.text_key_value(tokens).chunk(2, dim=-1))
        read = attend(split_heads(self.text_query(self.norm_text(x)), self.num_heads), key, value, token_mask).transpose(1, 2).flatten(2)
        x = x + self.text_out(read)
        x = x + self.gate_out(self.norm_gate(x) * self.gate(read + sentence[:, None]))
        x = x + self.self_out(self._relate(self.norm_self(x), geometry, real))
        return x + self.ffn(self.norm_ffn(x))

    def _relate(self, x: Tensor, geometry: Tensor, real: Tensor) -> Tensor:
        query, key, value = (split_heads(t, self.num_heads) for t in self.self_in(x).chunk(3, dim=-1))
        wanted = self.geometry(x).unflatten(-1, (self.num_heads, PAIR_WIDTH))  # which relation each region looks for, from what it has read
        bias = torch.einsum("eihg,eijg->ehij", wanted, geometry.to(wanted.dtype))
        logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias
        half = self.num_heads // 2  # the first half selects (softmax), the second half sums up (sigmoid), which can count
        real = real[:, None, None].to(logits.dtype)  # what is no object takes no part
        chosen = (logits[:, :half] + real.clamp(min=LEAST_REAL).log()).softmax(dim=-1)
        weights = torch.cat([chosen, logits[:, half:].sigmoid() * real * 0.25], dim=1)
        return (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)


def answer_by_count(logits: Tensor, count_logits: Tensor | None, no_target_logits: Tensor) -> Tensor:
    """Return target logits [E, K], moved so that as many regions lie above 0 as the answer has objects: the best ones.

    That is the likeliest number of `count_logits` [E, 7], at least 1 (without a count head: at least the one), where the likelier of
    `no_target_logits` [E, 2] is a target. "More than five" leaves what else is above 0. Expressions without a target keep their logits.
    """
    number = count_logits.argmax(dim=-1) if count_logits is not None else torch.full_like(no_target_logits[:, 0], NUM_COUNTS).long()
    open_ended = (number >= NUM_COUNTS - 1)[:, None]
    wanted = (number.clamp(min=1) if count_logits is not None else torch.ones_like(number)).clamp(max=logits.shape[1])
    place = stable_order(stable_order(logits, descending=True))
    chosen = place < wanted[:, None]
    moved = torch.where(chosen, logits.clamp(min=SMALLEST_LOGIT), torch.where(open_ended, logits, logits.clamp(max=-SMALLEST_LOGIT)))
    return torch.where((no_target_logits[:, 1] > no_target_logits[:, 0])[:, None], logits, moved)


def duplicates(boxes_norm: Tensor, objectness: Tensor) -> Tensor:
    """Return bool [B, K]: regions whose box overlaps that of a surer one, itself no duplicate, by an IoU above SAME_OBJECT."""
    order = stable_order(objectness, descending=True)
    corners = cxcywh_to_xyxy(gather(boxes_norm, order))
    overlap = torch.stack([box_iou(each, each) for each in corners]) > SAME_OBJECT
    repeated = torch.zeros_like(objectness, dtype=torch.bool)
    for k in range(1, order.shape[1]):
        repeated[:, k] = (overlap[:, k, :k] & ~repeated[:, :k]).any(dim=-1)
    return torch.zeros_like(repeated).scatter(1, order, repeated)


def union_logits(masks: Tensor, logits: Tensor) -> Tensor:
    """Return float [..., H, W]: of masks [..., K, H, W] the largest; of regions that are no target none above their logit [..., K].

    Targets keep their masks as they are: lowered to a logit just above 0 they would lose their rims when the answer is resized.
    """
    logits = logits[..., None, None]
    return torch.where(logits > 0, masks, torch.minimum(masks, logits)).amax(dim=-3)


def union_probability(masks: Tensor, targets: Tensor) -> Tensor:
    """Return float [..., H, W]: how likely a pixel is of any target, regions being independent.

    masks: float [..., K, H, W], how likely it is of each region.  targets: float [..., K], how likely the region is a target.
    """
    return 1 - (1 - masks * targets[..., None, None]).prod(dim=-3)


def largest_overlap(probability: Tensor, no_target_logits: Tensor) -> Tensor:
    """Return logits [E, H, W] that are above 0 where the answer is: the surest pixels, as many as have the largest expected overlap.

    The expected IoU of the n surest pixels is taken as the sum of their probabilities over n plus the sum of all others', the expectation
    of intersection and of union, each by itself (as Nowozin, CVPR 2014, for labels of pixels). Where no target is the likelier, the answer
    is what is likelier than not.  probability: float [E, H, W].  no_target_logits: float [E, 2].
    """
    flat = probability.flatten(1)
    best = flat.topk(flat.shape[1], dim=1).values  # sorted
    inside = best.cumsum(dim=1)
    number = torch.arange(1, best.shape[1] + 1, device=best.device, dtype=best.dtype)
    last = (inside / (number + inside[:, -1:] - inside)).argmax(dim=1, keepdim=True)
    least = (best.gather(1, last) + F.pad(best, (0, 1)).gather(1, last + 1)) / 2
    least = torch.where((no_target_logits[:, 1:] > no_target_logits[:, :1]), torch.full_like(least, 0.5), least)
    return precise(_logit(probability) - _logit(least)[..., None])


def _logit(probability: Tensor) -> Tensor:
    probability = probability.clamp(LEAST_CHANCE, 1 - LEAST_CHANCE)
    return (probability / (1 - probability)).log()


def _fused(rule: Callable[[Tensor, Tensor], Tensor], masks: Tensor, image_index: Tensor, targets: Tensor) -> Tensor:
    """Apply a rule to the masks [B, K, H, W] of each expression's image and what it says of each region [E, K]."""
    if traced():  # of any number of expressions
        return rule(masks[image_index], targets)
    return torch.stack([rule(masks[b], target) for b, target in zip(image_index.tolist(), targets, strict=True)])


class InstanceExtra(NamedTuple):
    """What only the criterion reads. regions: of the B images.  target_logits: float [E, K] of each language layer."""

    regions: Regions
    target_logits: list[Tensor]


class LanguagePart(nn.Module):
    """Select the regions that an expression means.

    Source: GRES paper section 4 for the idea; differences are listed above. `minimap_logits` are those of the K kept regions
    (not of P x P cells); `minimap_prob` lays their probabilities out on P x P cells.
    """

    def __init__(self, config: InstanceSelectionConfig, text_width: int) -> None:
        super().__init__()
        if config.answer not in ANSWERS:
            raise fault(f'model.decoder.answer is "{config.answer}"', " or ".join(ANSWERS), "choose one of them")
        channels = config.width
        self.config = config
        self.text_in = nn.Linear(text_width, channels)
        self.sentence = mlp(2 * text_width, channels, channels)
        self.box_features, self.box_norm = mlp(BOX_CODE_WIDTH, channels, channels), nn.LayerNorm(channels)
        self.known = nn.Linear(1 + sum(config.attribute_classes.values()), channels, bias=False)
        self.layers = nn.ModuleList([LanguageLayer(channels, config.num_heads, config.feedforward) for _ in range(config.language_layers)])
        self.norm = nn.LayerNorm(channels)
        self.target, self.target_sentence = nn.Linear(channels, 1), nn.Linear(channels, channels)
        pooled = 3 * channels + 4
        self.no_target = mlp(pooled, channels, 2)
        self.count = mlp(pooled, channels, NUM_COUNTS) if config.count else None

    def forward(self, regions: Regions, image_index: Tensor, text: TextFeatures) -> GroundingOutput:
        """Ground E expressions. image_index: int64 [E].

        In training, and for regions that `restore` gave, `mask_logits` is empty ([E, 2, 0, 0]).
        """
        mask = text.mask.bool()
        mean = (text.tokens * text.mask[..., None]).sum(dim=1) / text.mask.sum(dim=1, keepdim=True).clamp(min=1)
        sentence = self.sentence(torch.cat([text.tokens[:, 0], mean], dim=-1))
        tokens, token_mask = self.text_in(text.tokens), mask[:, None, None, :]
        place = self.box_norm(self.box_features(box_code(regions.boxes_norm[-1].detach())))
        real = regions.objectness[-1].detach().sigmoid()
        known = [real[..., None], *(logits.softmax(dim=-1) for logits in regions.attribute_logits.values())]
        x = (regions.features + place + self.known(torch.cat(known, dim=-1)))[image_index]
        geometry, real = regions.geometry[image_index], real[image_index]
        logits = []
        for layer in self.layers:
            x = layer(x, geometry, real, tokens, token_mask, sentence)
            normed = self.norm(x)
            bilinear = (normed * self.target_sentence(sentence)[:, None]).sum(dim=-1) / math.sqrt(normed.shape[-1])
            logits.append(precise(self.target(normed).squeeze(-1) + bilinear))
        pooled = self._pool(normed, logits[-1], regions.objectness[-1][image_index], sentence)
        final, no_target = logits[-1], precise(self.no_target(pooled))
        count = precise(self.count(pooled)) if self.count is not None else None
        if self.config.answer != THRESHOLD and not self.training:
            repeated = duplicates(regions.boxes_norm[-1], regions.objectness[-1])[image_index]
            final = final.masked_fill(repeated, OUTSIDE_LOGIT)
        masks, likely = self._answer(regions, image_index, final, count, no_target)
        return GroundingOutput(
            mask_logits=masks,
            minimap_logits=torch.stack([torch.zeros_like(final), final], dim=-1),
            no_target_logits=no_target,
            boxes_norm=regions.boxes_norm[-1][image_index],
            box_logits=final,
            count_logits=count,
            minimap_prob=self._minimap(regions, image_index, final),
            extra=InstanceExtra(regions, logits),
            target_prob=likely,
        )

    def _pool(self, x: Tensor, logits: Tensor, objectness: Tensor, sentence: Tensor) -> Tensor:
        prob = (logits.sigmoid() * objectness.sigmoid()).to(x.dtype)
        total = (x * prob[..., None]).sum(dim=1) * 0.5
        top = prob.topk(min(2, prob.shape[1]), dim=1).values
        top = F.pad(top, (0, 2 - top.shape[1]))
        sums = torch.stack([prob.sum(dim=1), (prob * prob).sum(dim=1)], dim=-1)
        return torch.cat([total, x.amax(dim=1), sentence.to(x.dtype), sums, top], dim=-1)

    def _answer(
        self, regions: Regions, image_index: Tensor, logits: Tensor, count: Tensor | None, no_target: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if self.training or regions.mask_map.shape[-1] == 0:
            return logits.new_zeros(logits.shape[0], 2, 0, 0), None
        masks = regions.masks()
        if self.config.answer == OVERLAP:
            likely = _fused(union_probability, masks.sigmoid(), image_index, (logits + self.config.overlap_bias).sigmoid())
            return two_way(largest_overlap(likely, no_target)), likely
        chosen = answer_by_count(logits, count, no_target) if self.config.answer == COUNT else logits
        return two_way(_fused(union_logits, masks, image_index, chosen)), None

    def _minimap(self, regions: Regions, image_index: Tensor, logits: Tensor) -> Tensor:
        """Lay the regions' target probabilities out on P x P cells by their centres; the largest wins a cell."""
        side = self.config.minimap_side
        place = (regions.boxes_norm[-1][..., :2].detach() * side).long().clamp(0, side - 1)
        cell = (place[..., 1] * side + place[..., 0])[image_index]
        flat = logits.new_zeros(logits.shape[0], side * side)
        return flat.scatter_reduce(1, cell, logits.detach().sigmoid(), "amax").unflatten(1, (side, side))


class InstanceSelection(nn.Module):
    """See the module's docstring. Its regions are found once in an image, so it stands behind image encoders without language alone."""

    answers_boxes = True

    def __init__(self, config: InstanceSelectionConfig, inputs: DecoderInputs) -> None:
        super().__init__()
        self.image_part = ImagePart(config, inputs.width, inputs.mask_width)
        self.language_part = LanguagePart(config, inputs.text_width)

    @staticmethod
    def check(model: Any) -> None:
        """Refuse an image encoder that fuses language, and more words than the text encoder has.

        Raises:
            GrexError: names both settings.
        """
        words, known = model.decoder.words, model.text.vocab_size
        if words < 0 or (words > known and model.text.path is None):
            raise fault(f"model.decoder.words is {words}", f"0 to {known}, the text encoder's vocabulary", "change it")
        if model.vision.fusion != "none":
            raise fault(
                f"model.vision.fusion is {model.vision.fusion} with model.decoder.name {model.decoder.name}",
                "no fusion there: its regions are found once in an image, for all expressions",
                "set model.vision.fusion to none, or model.decoder.name to rela",
            )

    def decide(self, target_prob: Tensor, no_target_logits: Tensor) -> Tensor:
        """Return mask logits [E, 2, h, w] of `answer: overlap`. target_prob: float [E, h, w].  no_target_logits: float [E, 2]."""
        return two_way(largest_overlap(target_prob, no_target_logits))

    def proposals(self, regions: Regions) -> Proposals:
        """Return the objects that were found in B images."""
        return Proposals(regions.masks(), regions.boxes_norm[-1], regions.objectness[-1].sigmoid())

    def known(self, features: Any, boxes_norm: Tensor) -> Regions:
        """Return regions for `language_part` that are the known objects of B images, without masks.

        features: `ImageFeatures` of the images, encoded.  boxes_norm: float [B, N, 4] cxcywh of the padded images.
        """
        regions = self.image_part(features.maps, features.pixels, boxes_norm)
        return regions._replace(mask_map=regions.mask_map[..., :0, :0])  # nobody asks for masks

    def likely_targets(self, output: GroundingOutput) -> Tensor:
        """Return logits float [E, N]: which of the `known` objects each expression means, also where one covers another."""
        extra: InstanceExtra = output.extra
        return extra.target_logits[-1]

    def compact(self, regions: Regions) -> dict[str, Tensor]:
        """Return what the language part reads of B images, but for masks: places, which are compared, as float32, the rest as float16."""
        places = {"boxes_norm": regions.boxes_norm[-1].float(), "objectness": regions.objectness[-1].float()}
        attributes = {f"attribute_{name}": logits.half() for name, logits in regions.attribute_logits.items()}
        return {"features": regions.features.half()} | places | attributes

    def restore(self, kept: dict[str, Tensor]) -> Regions:
        """Return the regions of B images that `compact` gave, without masks."""
        features, boxes = kept["features"].float(), kept["boxes_norm"]
        num_images, num_regions = features.shape[:2]
        return Regions(
            heat_logits=features.new_zeros(num_images, 0),
            cell_boxes_norm=features.new_zeros(num_images, 0, 4),
            heat_size=(0, 0),
            kept=features.new_zeros(num_images, num_regions, dtype=torch.int64),
            objectness=[kept["objectness"]],
            boxes_norm=[boxes],
            mask_embeddings=[],
            mask_map=features.new_zeros(num_images, 0, 0, 0),
            features=features,
            geometry=pair_geometry(boxes),
            attribute_logits={name: kept[f"attribute_{name}"].float() for name in self.language_part.config.attribute_classes},
        )
