"""ReLA, the region decoder of GRES (Liu et al. 2023), as released and as its papers vary it.

P x P region queries collect image features (RIA) and relate to each other and to the words (RLA); every region makes a mask, and the
answer is the sum of the masks weighted with the minimap. As released: masked attention over three levels in turn in nine layers, language
in the first layer only, scaled by 0.1 * sigmoid(w); two-way minimap logits as weights. What needs no language is done once per image: keys
and values of every layer, and the first layer up to the language. Heads of inner layers compute only the attention mask, from mask features
that are resized once in place of resizing a hundred masks per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.config import DecoderConfig
from grex_mllm.errors import fault
from grex_mllm.models.decoders.grouping import Grouping, group
from grex_mllm.models.heads import RegionHeads
from grex_mllm.models.pixel_decoder import NUM_LEVELS
from grex_mllm.models.positions import sine_positions
from grex_mllm.ops.feedforward import feedforward
from grex_mllm.types import GroundingOutput, PixelFeatures, TextFeatures

RIA = ("attention", "pooled", "hard_split")
RLA = ("both", "region", "language", "none")


class Attention(nn.Module):
    """Multi-head attention with one projection matrix for query, key and value (laid out as torch's MultiheadAttention)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise fault(f"decoder width {width} with {num_heads} heads", "heads that divide the width", "fix model.decoder")
        self.width, self.num_heads = width, num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, x: Tensor, part: int) -> Tensor:
        """Project to queries (part 0), keys (1) or values (2): [B, S, C] -> [B, heads, S, C / heads]."""
        rows = slice(part * self.width, (part + 1) * self.width)
        y = F.linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])
        return y.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Attend with projected key and value [B, heads, S, C / heads].

        query: float [B, Q, C], not yet projected.  allowed: bool, broadcastable to [B, heads, Q, S].
        """
        y = F.scaled_dot_product_attention(self.project(query, 0), key, value, attn_mask=allowed)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class AttentionLayer(nn.Module):
    """LN(x + Attention(...)): region-image with `read`, region-region and region-language with `forward`."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, num_heads)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """x, query: float [B, Q, C]; key and value projected; allowed: bool [B, 1, Q, S] or None."""
        return self.norm(x + self.attention(query, key, value, allowed))


class PooledLayer(nn.Module):
    """RIA's ablation "hard split, decoder": every region takes the mean of its own cell of the map (GRES paper, table 2, model 2)."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.projection = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def pool(self, level: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, Q, C]."""
        return self.projection(F.adaptive_avg_pool2d(level, self.side).flatten(2).transpose(1, 2))

    def forward(self, x: Tensor, pooled: Tensor) -> Tensor:
        return self.norm(x + pooled)


class Feedforward(nn.Module):
    """LN(x + W2 relu(W1 x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + feedforward(x, self.linear1, self.linear2, "relu"))


@dataclass
class RegionImages:
    """The language-free part of B images.

    memory: per layer, what the regions read: (keys, values) float [B, heads, S, C / heads], or (pooled features [B, Q, C],).
    mask_levels: mask features resized to each level, float [B, C, S].  mask_features: float [B, C, h, w].
    start: float [B, Q, C] regions after the first layer's region-image attention.
    """

    memory: list[tuple[Tensor, ...]]
    mask_levels: list[Tensor]
    mask_features: Tensor
    start: Tensor


class Rela(nn.Module):
    """Entry "rela" of DECODERS. Built for the channels of the pixel decoder (`width`, `mask_width`) and of the text tokens."""

    def __init__(self, config: DecoderConfig, width: int, mask_width: int, text_width: int) -> None:
        super().__init__()
        if width != config.width:
            raise fault(f"model.decoder.width {config.width}, pixel decoder {width}", "the same width for rela", "fix model.decoder.width")
        if config.ria not in RIA or config.rla not in RLA:
            raise fault(f'model.decoder.ria "{config.ria}", rla "{config.rla}"', f"ria of {RIA}, rla of {RLA}", "fix the names")
        self.config = config
        regions, layers = config.minimap_side**2, range(config.num_layers)
        self.attends = config.ria == "attention"
        self.region_features = nn.Embedding(regions, width)
        self.region_positions = nn.Embedding(regions, width)
        self.level_embed = nn.Embedding(NUM_LEVELS, width)
        if self.attends:
            self.region_image = nn.ModuleList(AttentionLayer(width, config.num_heads) for _ in layers)
        else:
            self.region_image = nn.ModuleList(PooledLayer(width, config.minimap_side) for _ in layers)
        self.region_region = nn.ModuleList(AttentionLayer(width, config.num_heads) for _ in layers if config.rla in ("both", "region"))
        attended = config.rla in ("both", "language")
        reading = layers if config.language_every_layer else layers[:1]
        self.region_language = nn.ModuleList(AttentionLayer(width, config.num_heads) for _ in reading if attended)
        self.language_projection = nn.Linear(text_width, width, bias=False)
        self.language_weight = nn.Parameter(torch.zeros(1)) if attended else None  # no axis at all is more than DeepSpeed can send
        if attended:  # released: language starts as nothing
            nn.init.zeros_(self.language_projection.weight)
        self.language_norms = nn.ModuleList(nn.LayerNorm(width) for _ in reading if not attended)
        self.feedforward = nn.ModuleList(Feedforward(width, config.feedforward) for _ in layers)
        self.norm = nn.LayerNorm(width)
        self.heads = RegionHeads(width, mask_width, config.minimap_side, config.boxes, config.count)

    def encode(self, pixels: PixelFeatures) -> RegionImages:
        """Do the language-free work of B images once."""
        memory = [self._memory(i, pixels.levels[i % NUM_LEVELS]) for i in range(len(self.region_image))]
        mask_levels = []
        if self.attends:
            for level in pixels.levels:
                small = F.interpolate(pixels.mask_features, size=level.shape[-2:], mode="bilinear", align_corners=False)
                mask_levels.append(small.flatten(2))
        x = self.region_features.weight.expand(len(pixels.mask_features), -1, -1)
        start = self._read_image(0, x, memory[0], mask_levels, Grouping(len(x), 1))
        return RegionImages(memory, mask_levels, pixels.mask_features, start)

    def forward(self, regions: RegionImages, image_index: Tensor, text: TextFeatures) -> GroundingOutput:
        """Ground E expressions.

        image_index: int64 [E], image of each.  text: tokens [E, L, C_text].
        `auxiliary`: `mask_embeddings` [E, Q, C_mask] (region masks = embeddings . mask features), and `layers` with `deep_supervision`.
        """
        tokens = self.language_projection(text.tokens)
        groups = group(image_index, len(regions.start))
        mask_levels = [groups.of_image(m) for m in regions.mask_levels]
        mask_features = groups.of_image(regions.mask_features)
        x = regions.start.index_select(0, image_index)
        position = self.region_positions.weight
        earlier = []
        for i in range(len(self.region_image)):
            if i > 0:
                kept = groups.of_image if self.attends else partial(torch.index_select, dim=0, index=image_index)
                x = self._read_image(i, x, tuple(kept(m) for m in regions.memory[i]), mask_levels, groups)
            x = self._read_text(i, x, tokens, text.mask)
            if len(self.region_region):
                layer: Any = self.region_region[i]
                query = x + position
                x = layer(x, query, layer.attention.project(query, 1), layer.attention.project(x, 2))
            x = self.feedforward[i](x)
            if self.config.deep_supervision and self.training and i + 1 < len(self.region_image):
                earlier.append(self._answer(x, mask_features, groups))
        output = self._answer(x, mask_features, groups)
        if earlier:
            output.auxiliary["layers"] = earlier
        return output

    def _memory(self, i: int, level: Tensor) -> tuple[Tensor, ...]:
        layer: Any = self.region_image[i]
        source = level + self.level_embed.weight[i % NUM_LEVELS][:, None, None]
        if not self.attends:
            return (layer.pool(source),)
        height, width = level.shape[-2:]
        tokens = source.flatten(2).transpose(1, 2)
        position = sine_positions(height, width, tokens.shape[-1], tokens.device, tokens.dtype)
        return layer.attention.project(tokens + position, 1), layer.attention.project(tokens, 2)

    def _read_image(self, i: int, x: Tensor, memory: tuple[Tensor, ...], mask_levels: list[Tensor], groups: Grouping) -> Tensor:
        """Region-image attention of layer i, each region within its own mask."""
        layer: Any = self.region_image[i]
        if not self.attends:
            return layer(x, *memory)
        query = groups.fold(x + self.region_positions.weight)
        x = groups.fold(x)
        allowed = self._allowed(x, mask_levels[i % NUM_LEVELS])
        return groups.unfold(layer(x, query, *memory, allowed[:, None]))

    @torch.no_grad()
    def _allowed(self, x: Tensor, mask_level: Tensor) -> Tensor:
        """Return where each region [B, R, C] may look: bool [B, R, S]; everywhere, where its mask is empty."""
        masks = self.heads.mask(self.norm(x)) @ mask_level
        allowed = masks.sigmoid() >= 0.5
        return allowed | ~allowed.any(dim=-1, keepdim=True)

    def _read_text(self, i: int, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Let the regions read the words: attention, or the product with the mean word (RLA's baseline)."""
        if self.language_weight is None:
            if i >= len(self.language_norms):
                return x
            share = mask.to(tokens.dtype)[..., None]
            mean = (tokens * share).sum(dim=1, keepdim=True) / share.sum(dim=1, keepdim=True).clamp(min=1)
            return self.language_norms[i](x * mean)
        if i >= len(self.region_language):
            return x
        layer: Any = self.region_language[i]
        key, value = layer.attention.project(tokens, 1), layer.attention.project(tokens, 2)
        allowed = mask.bool()[:, None, None] if self.config.mask_language_padding else None
        return x + self.config.language_scale * self.language_weight.sigmoid() * layer(x, x, key, value, allowed)

    def _answer(self, x: Tensor, mask_features: Tensor, groups: Grouping) -> GroundingOutput:
        regions = self.norm(x)
        embeddings = self.heads.mask(regions)
        minimap = self.heads.minimap(regions)
        mask = groups.unfold(groups.fold(minimap.transpose(1, 2) @ embeddings) @ mask_features.flatten(2))
        boxes, scores = self.heads.predict_boxes(regions)
        side = self.config.minimap_side
        return GroundingOutput(
            mask_logits=mask.unflatten(2, mask_features.shape[-2:]),
            minimap_logits=minimap,
            no_target_logits=self.heads.predict_no_target(regions),
            boxes_norm=boxes,
            box_logits=scores,
            count_logits=self.heads.predict_count(regions),
            minimap_prob=minimap.softmax(dim=-1)[..., 1].unflatten(1, (side, side)),
            auxiliary={"mask_embeddings": embeddings},
        )
