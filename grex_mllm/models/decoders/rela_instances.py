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
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grex_mllm.config import DecoderConfig
from grex_mllm.ops.attention import attend
from grex_mllm.types import GroundingOutput, PixelFeatures, TextFeatures

NUM_COUNT_CLASSES = 7
PAIR_WIDTH = 10
OUTSIDE_LOGIT = -30.0
BOX_MARGIN = 0.125  # a region's mask is cut off outside its box enlarged by this share of the box on each side


@dataclass
class Regions:
    """What the language-free part knows of B images. Lists run over the image layers, last = final.

    objectness: float [B, Q].  boxes_norm: float [B, Q, 4] cxcywh.  mask_embeddings: float [B, Q, M].
    mask_map: float [B, M, H, W].  kept: int64 [B, K] the regions that meet the language.
    features: float [B, K, C].  kept_boxes_norm: float [B, K, 4].  geometry: float [B, K, K, G].
    attribute_logits: name -> float [B, K, classes].
    """

    objectness: list[Tensor]
    boxes_norm: list[Tensor]
    mask_embeddings: list[Tensor]
    mask_map: Tensor
    kept: Tensor
    features: Tensor
    kept_boxes_norm: Tensor
    kept_mask_embeddings: Tensor
    geometry: Tensor
    attribute_logits: dict[str, Tensor]


def box_code(boxes_norm: Tensor) -> Tensor:
    """Return float [..., 4 + 16 + 2] features of normalised cxcywh boxes: values, sines and cosines of the centre, log size."""
    centre, size = boxes_norm[..., :2], boxes_norm[..., 2:]
    waves = [f(centre * (math.pi * 2**k)) for k in range(4) for f in (torch.sin, torch.cos)]
    return torch.cat([boxes_norm, *waves, torch.log(size.clamp(min=1e-3))], dim=-1)


def pair_geometry(boxes_norm: Tensor) -> Tensor:
    """Return float [B, K, K, 10] relative geometry of region j seen from region i (offsets, their signs, distance, size ratios)."""
    centre, size = boxes_norm[..., :2], boxes_norm[..., 2:].clamp(min=1e-3)
    offset = centre[:, None, :, :] - centre[:, :, None, :]
    ratio = torch.log(size[:, None, :, :] / size[:, :, None, :])
    sharp = torch.tanh(offset * 20.0)
    distance = offset.norm(dim=-1, keepdim=True)
    area = ratio.sum(dim=-1, keepdim=True)
    same = torch.eye(boxes_norm.shape[1], device=boxes_norm.device, dtype=boxes_norm.dtype)[None, :, :, None].expand_as(distance)
    return torch.cat([offset * 2.0, sharp, offset.abs() * 2.0, distance, area, torch.tanh(area * 3.0), same], dim=-1)


def _mlp(width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, hidden), nn.GELU(), nn.Linear(hidden, width_out))


class ImageLayer(nn.Module):
    """One language-free layer: regions look at the image, at each other, and think (pre-norm)."""

    def __init__(self, width: int, num_heads: int, feedforward: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_cross, self.norm_self, self.norm_ffn = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key_value, self.cross_out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.self_in, self.self_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = _mlp(width, feedforward, width)

    def forward(self, regions: Tensor, position: Tensor, image_tokens: Tensor) -> Tensor:
        """Update regions [B, Q, C]; position [Q, C]; image_tokens [B, S, C]."""
        key, value = self.key_value(image_tokens).chunk(2, dim=-1)
        x = regions + self.cross_out(self._attend(self.query(self.norm_cross(regions) + position), key, value))
        query, key, value = self.self_in(self.norm_self(x) + position).chunk(3, dim=-1)
        x = x + self.self_out(self._attend(query, key, value))
        return x + self.ffn(self.norm_ffn(x))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        def split(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        return attend(split(query), split(key), split(value)).transpose(1, 2).flatten(2)


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
        self.ffn = _mlp(width, feedforward, width)

    def forward(self, x: Tensor, geometry: Tensor, image_index: Tensor, tokens: Tensor, token_mask: Tensor, sentence: Tensor) -> Tensor:
        """Update x [E, K, C]; geometry [B, K, K, G]; tokens [E, L, C], token_mask bool [E, 1, 1, L]; sentence [E, C]."""
        key, value = (self._split(t) for t in self.text_key_value(tokens).chunk(2, dim=-1))
        read = attend(self._split(self.text_query(self.norm_text(x))), key, value, token_mask).transpose(1, 2).flatten(2)
        x = x + self.text_out(read)
        x = x + self.gate_out(self.norm_gate(x) * self.gate(read + sentence[:, None]))
        x = x + self.self_out(self._relate(self.norm_self(x), geometry, image_index))
        return x + self.ffn(self.norm_ffn(x))

    def _split(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _relate(self, x: Tensor, geometry: Tensor, image_index: Tensor) -> Tensor:
        query, key, value = (self._split(t) for t in self.self_in(x).chunk(3, dim=-1))
        wanted = self.geometry(x).unflatten(-1, (self.num_heads, PAIR_WIDTH))  # which relation each region looks for, from what it has read
        bias = torch.einsum("eihg,eijg->ehij", wanted, geometry[image_index].to(wanted.dtype))
        logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias
        half = self.num_heads // 2  # the first half selects (softmax), the second half sums up (sigmoid), which can count
        weights = torch.cat([logits[:, :half].softmax(dim=-1), logits[:, half:].sigmoid() * 0.25], dim=1)
        return (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)


class ImageRegions(nn.Module):
    """The language-free part: a grid of queries becomes instances with boxes, masks and features."""

    def __init__(self, config: DecoderConfig, width: int, mask_width: int) -> None:
        super().__init__()
        self.side, self.kept, self.roi_size = config.minimap_side, config.kept_regions, config.roi_size
        self.upsample = config.mask_upsample
        channels = config.width
        self.mask_channels = mask_width if self.upsample == 1 else max(16, mask_width // 2)
        self.inputs = nn.ModuleList([nn.Linear(width, channels) for _ in range(config.num_levels)])
        self.level_embedding = nn.Parameter(torch.randn(config.num_levels, channels) * 0.02)
        self.position = nn.Sequential(nn.Linear(22, channels), nn.GELU(), nn.Linear(channels, channels))
        self.layers = nn.ModuleList([ImageLayer(channels, config.num_heads, config.feedforward) for _ in range(config.image_layers)])
        self.norm = nn.LayerNorm(channels)
        self.objectness, self.box, self.mask_embedding = (
            nn.Linear(channels, 1),
            _mlp(channels, channels, 4),
            _mlp(channels, channels, self.mask_channels),
        )
        nn.init.constant_(self.objectness.bias, -2.0)
        self.mask_map = nn.Conv2d(mask_width, self.mask_channels * self.upsample**2, 3, padding=1)
        self.roi_fine = nn.Conv2d(mask_width, config.roi_channels, 1)
        self.roi_coarse = nn.Conv2d(width, config.roi_channels, 1)
        self.roi = _mlp(2 * config.roi_channels * self.roi_size**2, channels, channels)
        self.pooled = nn.Linear(mask_width, channels)
        self.box_features = _mlp(22, channels, channels)
        self.region = nn.Linear(channels, channels)
        self.region_norm = nn.LayerNorm(channels)
        self.attributes = nn.ModuleDict({name: nn.Linear(channels, n) for name, n in config.attribute_classes.items()})

    def forward(self, pixels: PixelFeatures) -> Regions:
        """Find the regions of B images."""
        levels = pixels.levels[: len(self.inputs)]
        grid = self._cells()
        position = self.position(box_code(grid))
        tokens = torch.cat([self._tokens(level, i) for i, level in enumerate(levels)], dim=1)
        nearest = min(range(len(levels)), key=lambda i: abs(levels[i].shape[-1] - self.side))
        pooled = F.adaptive_avg_pool2d(levels[nearest], (self.side, self.side)).flatten(2).transpose(1, 2)
        x = self.inputs[nearest](pooled) + position
        objectness, boxes, embeddings = [], [], []
        for layer in self.layers:
            x = layer(x, position, tokens)
            normed = self.norm(x)
            objectness.append(precise(self.objectness(normed).squeeze(-1)))
            boxes.append(self._boxes(precise(self.box(normed)), grid))
            embeddings.append(self.mask_embedding(normed))
        mask_map = self.mask_map(pixels.mask_features)
        mask_map = F.pixel_shuffle(mask_map, self.upsample) if self.upsample > 1 else mask_map
        kept = objectness[-1].topk(min(self.kept, x.shape[1]), dim=1).indices
        kept_boxes = _gather(boxes[-1], kept).detach()
        kept_embeddings = _gather(embeddings[-1], kept)
        features = self._features(_gather(normed, kept), kept_boxes, kept_embeddings, mask_map, pixels)
        attributes = {name: precise(head(features)) for name, head in self.attributes.items()}
        return Regions(
            objectness, boxes, embeddings, mask_map, kept, features, kept_boxes, kept_embeddings, pair_geometry(kept_boxes), attributes
        )

    def _cells(self) -> Tensor:
        return _grid_boxes(self.side, self.side, self.level_embedding)

    def _tokens(self, level: Tensor, index: int) -> Tensor:
        position = self.position(box_code(_grid_boxes(level.shape[-2], level.shape[-1], self.level_embedding)))
        return self.inputs[index](level.flatten(2).transpose(1, 2)) + position + self.level_embedding[index]

    def _boxes(self, raw: Tensor, grid: Tensor) -> Tensor:
        centre = grid[:, :2] + raw[..., :2].tanh() * (1.5 / self.side)
        size = torch.sigmoid(raw[..., 2:] - 1.5)
        return torch.cat([centre.clamp(0.0, 1.0), size], dim=-1)

    def _features(self, kept: Tensor, boxes: Tensor, embeddings: Tensor, mask_map: Tensor, pixels: PixelFeatures) -> Tensor:
        steps = (torch.arange(self.roi_size, device=boxes.device, dtype=boxes.dtype) + 0.5) / self.roi_size - 0.5
        y, x = torch.meshgrid(steps, steps, indexing="ij")
        points = boxes[:, :, None, :2] + torch.stack([x, y], dim=-1).flatten(0, 1) * boxes[:, :, None, 2:]
        where = points * 2.0 - 1.0
        parts = []
        for conv, source in ((self.roi_fine, pixels.mask_features), (self.roi_coarse, pixels.levels[-1])):
            sampled = F.grid_sample(conv(source).to(where.dtype), where, align_corners=False, padding_mode="border")
            parts.append(sampled.permute(0, 2, 3, 1).flatten(2))
        scale = mask_map.shape[-1] // pixels.mask_features.shape[-1]
        logits = region_masks(embeddings.detach(), boxes, mask_map.detach())
        prob = F.avg_pool2d(logits.sigmoid(), scale) if scale > 1 else logits.sigmoid()
        prob = prob.flatten(2) / prob.flatten(2).sum(dim=-1, keepdim=True).clamp(min=1e-3)
        pooled = prob.to(pixels.mask_features.dtype) @ pixels.mask_features.flatten(2).transpose(1, 2)
        x = self.region(kept) + self.roi(torch.cat(parts, dim=-1)) + self.pooled(pooled) + self.box_features(box_code(boxes))
        return self.region_norm(x)


def region_masks(embeddings: Tensor, boxes_norm: Tensor, mask_map: Tensor) -> Tensor:
    """Return mask logits float32 [B, K, H, W] of K regions, cut off outside their slightly enlarged boxes.

    embeddings: float [B, K, M].  boxes_norm: float [B, K, 4] cxcywh.  mask_map: float [B, M, H, W].
    """
    height, width = mask_map.shape[-2:]
    logits = precise(torch.einsum("bkm,bmhw->bkhw", embeddings, mask_map))
    return logits.masked_fill(~box_area(boxes_norm, height, width), OUTSIDE_LOGIT)


def box_area(boxes_norm: Tensor, height: int, width: int, margin: float = BOX_MARGIN) -> Tensor:
    """Return bool [..., height, width]: pixels whose centre lies in the box, enlarged by `margin` of its size and one pixel a side."""
    x = (torch.arange(width, device=boxes_norm.device, dtype=boxes_norm.dtype) + 0.5) / width
    y = (torch.arange(height, device=boxes_norm.device, dtype=boxes_norm.dtype) + 0.5) / height
    half_width = boxes_norm[..., 2:3] * (0.5 + margin) + 1.0 / width
    half_height = boxes_norm[..., 3:4] * (0.5 + margin) + 1.0 / height
    inside_x = (x - boxes_norm[..., 0:1]).abs() <= half_width
    inside_y = (y - boxes_norm[..., 1:2]).abs() <= half_height
    return inside_y[..., :, None] & inside_x[..., None, :]


def precise(values: Tensor) -> Tensor:
    """Return values of half precision as float32; float32 and float64 stay."""
    return values if values.dtype == torch.float64 else values.float()


def _grid_boxes(height: int, width: int, like: Tensor) -> Tensor:
    """Return [height * width, 4] cxcywh of the cells of a grid, row by row."""
    y, x = torch.meshgrid(torch.arange(height, device=like.device), torch.arange(width, device=like.device), indexing="ij")
    size = torch.tensor([1.0 / width, 1.0 / height], device=like.device, dtype=like.dtype)
    centre = (torch.stack([x, y], dim=-1).flatten(0, 1).to(like.dtype) + 0.5) * size
    return torch.cat([centre, size.expand_as(centre)], dim=-1)


def _gather(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


class RelaInstances(nn.Module):
    """See the module's docstring. Entry "rela_instances" of DECODERS.

    Source: GRES paper section 4 for the idea; differences are listed above. `minimap_logits` are those of the K kept regions
    (not of P x P cells); `minimap_prob` lays them out on the P x P grid of the queries.
    """

    def __init__(self, config: DecoderConfig, width: int, mask_width: int, text_width: int) -> None:
        super().__init__()
        channels = config.width
        self.config = config
        self.image_regions = ImageRegions(config, width, mask_width)
        self.text_in = nn.Linear(text_width, channels)
        self.sentence = _mlp(2 * text_width, channels, channels)
        self.box_features, self.box_norm = _mlp(22, channels, channels), nn.LayerNorm(channels)
        self.layers = nn.ModuleList([LanguageLayer(channels, config.num_heads, config.feedforward) for _ in range(config.language_layers)])
        self.norm = nn.LayerNorm(channels)
        self.target, self.target_sentence = nn.Linear(channels, 1), nn.Linear(channels, channels)
        pooled = 3 * channels + 4
        self.no_target = _mlp(pooled, channels, 2)
        self.count = _mlp(pooled, channels, NUM_COUNT_CLASSES) if config.count else None

    def encode(self, pixels: PixelFeatures) -> Regions:
        """Do the language-free work of B images once."""
        return self.image_regions(pixels)

    def forward(self, regions: Regions, image_index: Tensor, text: TextFeatures) -> GroundingOutput:
        """Ground E expressions. image_index: int64 [E].

        In training `mask_logits` is empty ([E, 2, 0, 0]): the loss reads the regions' masks.
        """
        mask = text.mask.bool()
        mean = (text.tokens * text.mask[..., None]).sum(dim=1) / text.mask.sum(dim=1, keepdim=True).clamp(min=1)
        sentence = self.sentence(torch.cat([text.tokens[:, 0], mean], dim=-1))
        tokens, token_mask = self.text_in(text.tokens), mask[:, None, None, :]
        x = (regions.features + self.box_norm(self.box_features(box_code(regions.kept_boxes_norm))))[image_index]
        logits = []
        for layer in self.layers:
            x = layer(x, regions.geometry, image_index, tokens, token_mask, sentence)
            normed = self.norm(x)
            bilinear = (normed * self.target_sentence(sentence)[:, None]).sum(dim=-1) / math.sqrt(normed.shape[-1])
            logits.append(precise(self.target(normed).squeeze(-1) + bilinear))
        pooled = self._pool(normed, logits[-1], regions.objectness[-1].gather(1, regions.kept)[image_index], sentence)
        final = logits[-1]
        return GroundingOutput(
            mask_logits=self._answer(regions, image_index, final),
            minimap_logits=torch.stack([torch.zeros_like(final), final], dim=-1),
            no_target_logits=precise(self.no_target(pooled)),
            boxes_norm=regions.kept_boxes_norm[image_index],
            box_logits=final,
            count_logits=precise(self.count(pooled)) if self.count is not None else None,
            minimap_prob=self._minimap(regions.kept[image_index], final),
            auxiliary={"regions": regions, "target_logits": logits},
        )

    def _pool(self, x: Tensor, logits: Tensor, objectness: Tensor, sentence: Tensor) -> Tensor:
        prob = (logits.sigmoid() * objectness.sigmoid()).to(x.dtype)
        total = (x * prob[..., None]).sum(dim=1) * 0.5
        top = prob.topk(min(2, prob.shape[1]), dim=1).values
        top = F.pad(top, (0, 2 - top.shape[1]))
        sums = torch.stack([prob.sum(dim=1), (prob * prob).sum(dim=1)], dim=-1)
        return torch.cat([total, x.amax(dim=1), sentence.to(x.dtype), sums, top], dim=-1)

    def _answer(self, regions: Regions, image_index: Tensor, logits: Tensor) -> Tensor:
        if self.training:
            return logits.new_zeros(logits.shape[0], 2, 0, 0)
        masks = region_masks(regions.kept_mask_embeddings, regions.kept_boxes_norm, regions.mask_map)
        fused = torch.stack(
            [torch.minimum(masks[b], logit[:, None, None]).amax(dim=0) for b, logit in zip(image_index.tolist(), logits, strict=True)]
        )
        return torch.stack([torch.zeros_like(fused), fused], dim=1)

    def _minimap(self, kept: Tensor, logits: Tensor) -> Tensor:
        side = self.config.minimap_side
        flat = logits.new_zeros(logits.shape[0], side * side)
        return flat.scatter(1, kept, logits.sigmoid()).unflatten(1, (side, side))
