"""ReLA, the region decoder of GRES (Liu et al. 2023), as released and as its papers vary it.

P x P region queries collect image features (RIA) and relate to each other and to the words (RLA); every region makes a mask, and the
answer is the sum of the masks weighted with the minimap. As released: masked attention over three levels in turn in nine layers, language
in the first layer only, scaled by 0.1 * sigmoid(w); two-way minimap logits as weights. The image part computes once per image what the
regions read: keys and values of every layer, and mask features at the size of each level, in place of resizing a hundred masks per layer.
The language part runs the regions; the first layer up to the language is computed once per image there.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.errors import fault
from grex_mllm.models.decoders.rela.adaptive import OwnGrids, check_sides, chosen_sides, grid_rows, own_grids
from grex_mllm.models.decoders.rela.config import RelaConfig
from grex_mllm.models.decoders.rela.grouping import Grouping, group
from grex_mllm.models.decoders.rela.heads import RegionHeads
from grex_mllm.models.pixel_decoder import NUM_LEVELS
from grex_mllm.models.positions import sine_positions
from grex_mllm.ops.attention import split_heads
from grex_mllm.ops.feedforward import feedforward
from grex_mllm.types import DecoderInputs, GroundingOutput, PixelFeatures, TextFeatures

RIA = ("attention", "pooled")
RLA = ("both", "region", "language", "none")
PROJECTION_GAIN = 0.5**0.5  # of Xavier's uniform start: that of one matrix for queries, keys and values together


def projection(width: int) -> nn.Linear:
    """Return a linear layer for queries, keys or values, with the start that torch's MultiheadAttention gives them."""
    linear = nn.Linear(width, width)
    nn.init.xavier_uniform_(linear.weight, gain=PROJECTION_GAIN)
    nn.init.zeros_(linear.bias)
    return linear


class Attention(nn.Module):
    """Multi-head attention. own_memory: keys and values are projected here; else they come projected."""

    def __init__(self, width: int, num_heads: int, own_memory: bool) -> None:
        super().__init__()
        if width % num_heads:
            raise fault(f"decoder width {width} with {num_heads} heads", "heads that divide the width", "fix model.decoder")
        self.num_heads = num_heads
        self.query = projection(width)
        self.key = projection(width) if own_memory else None
        self.value = projection(width) if own_memory else None
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Attend from float [B, Q, C] to float [B, S, C].

        allowed: bool, broadcastable to [B, heads, Q, S].
        """
        if self.key is not None and self.value is not None:
            key, value = self.key(key), self.value(value)
        q, k, v = (split_heads(t, self.num_heads) for t in (self.query(query), key, value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class AttentionLayer(nn.Module):
    """LN(x + Attention(...))."""

    def __init__(self, width: int, num_heads: int, own_memory: bool = True) -> None:
        super().__init__()
        self.attention = Attention(width, num_heads, own_memory)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """x, query: float [B, Q, C]; key, value: float [B, S, C]; allowed: bool [B, 1, Q, S] or None."""
        return self.norm(x + self.attention(query, key, value, allowed))


class PooledLayer(nn.Module):
    """RIA's ablation "hard split, decoder": every region takes the mean of its own cell of the map (GRES paper, table 2, model 2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

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


def rows(table: nn.Embedding) -> Tensor:
    """Return the whole table [N, C]."""
    return table(torch.arange(table.num_embeddings, device=table.weight.device))


class RegionImages(NamedTuple):
    """The language-free part of B images.

    memory: per layer, what the regions read: (keys, values) float [B, S, C], or (pooled features [B, Q, C],).
    mask_levels: mask features resized to each level, float [B, C, S].  mask_features: float [B, C, h, w].
    side: int64 [B], P of each image where it differs; None = minimap_side.
    """

    memory: list[tuple[Tensor, ...]]
    mask_levels: list[Tensor]
    mask_features: Tensor
    side: Tensor | None = None


class RelaExtra(NamedTuple):
    """What only the criterion and the comparison with the released code read.

    mask_embeddings: float [E, Q, C_mask], region masks = embeddings . mask features.  layers: answers of the earlier layers.
    """

    mask_embeddings: Tensor
    layers: list[GroundingOutput]


class ImagePart(nn.Module):
    """What needs no language: keys and values of every layer, or pooled cells."""

    def __init__(self, config: RelaConfig) -> None:
        super().__init__()
        layers, width = range(config.num_layers), config.width
        self.side, self.attends = config.minimap_side, config.ria == "attention"
        self.sides, self.limits = config.region_sides, config.complexity
        self.level_embed = nn.Embedding(NUM_LEVELS, width)
        if self.attends:
            self.keys = nn.ModuleList(projection(width) for _ in layers)
            self.values = nn.ModuleList(projection(width) for _ in layers)
        else:
            self.pooled = nn.ModuleList(nn.Linear(width, width) for _ in layers)

    def forward(self, maps: list[Tensor], pixels: PixelFeatures, image: Tensor | None = None) -> RegionImages:
        """Do the language-free work of B images once; the image encoder's own `maps` are not read.

        image: float [B, 3, H, W] normalised, where `region_sides` choose the number of regions by it.
        """
        embeds = rows(self.level_embed)[:, :, None, None]
        levels = [level + embed for level, embed in zip(pixels.levels, embeds, strict=True)]
        if not self.attends:
            cells = [F.adaptive_avg_pool2d(level, self.side).flatten(2).transpose(1, 2) for level in levels]
            return RegionImages([(project(cells[i % NUM_LEVELS]),) for i, project in enumerate(self.pooled)], [], pixels.mask_features)
        tokens = [level.flatten(2).transpose(1, 2) for level in levels]
        placed = [
            t + sine_positions(level.shape[-2], level.shape[-1], t.shape[-1], t.device, t.dtype)
            for t, level in zip(tokens, levels, strict=True)
        ]
        memory: list[tuple[Tensor, ...]] = [
            (key(placed[i % NUM_LEVELS]), value(tokens[i % NUM_LEVELS])) for i, (key, value) in enumerate(zip(self.keys, self.values))
        ]
        mask_levels = [
            F.interpolate(pixels.mask_features, size=level.shape[-2:], mode="bilinear", align_corners=False).flatten(2) for level in levels
        ]
        side = None if image is None else chosen_sides(image, self.sides, self.limits)
        return RegionImages(memory, mask_levels, pixels.mask_features, side)


class LanguagePart(nn.Module):
    """The regions, their relations, and what they answer."""

    def __init__(self, config: RelaConfig, mask_width: int, text_width: int) -> None:
        super().__init__()
        self.config = config
        width, heads = config.width, config.num_heads
        regions, layers = config.minimap_side**2, range(config.num_layers)
        self.attends = config.ria == "attention"
        self.region_features = nn.Embedding(regions, width)
        self.region_positions = nn.Embedding(regions, width)
        self.region_image = nn.ModuleList(AttentionLayer(width, heads, False) if self.attends else PooledLayer(width) for _ in layers)
        self.region_region = nn.ModuleList(AttentionLayer(width, heads) for _ in layers if config.rla in ("both", "region"))
        attended = config.rla in ("both", "language")
        reading = layers if config.language_every_layer else layers[:1]
        self.region_language = nn.ModuleList(AttentionLayer(width, heads) for _ in reading if attended)
        self.language_projection = nn.Linear(text_width, width, bias=False)
        self.language_weight = nn.Parameter(torch.zeros(1)) if attended else None  # no axis at all is more than DeepSpeed can send
        if attended:  # released: language starts as nothing
            nn.init.zeros_(self.language_projection.weight)
        self.language_norms = nn.ModuleList(nn.LayerNorm(width) for _ in reading if not attended)
        self.feedforward = nn.ModuleList(Feedforward(width, config.feedforward) for _ in layers)
        self.norm = nn.LayerNorm(width)
        self.heads = RegionHeads(width, mask_width, config.minimap_side, config.boxes, config.count)

    def forward(self, images: RegionImages, image_index: Tensor, text: TextFeatures) -> GroundingOutput:
        """Ground E expressions.

        image_index: int64 [E], image of each.  text: tokens [E, L, C_text].
        `extra`: `RelaExtra`, with the earlier layers' answers in training with deep supervision.
        """
        tokens, num_images = self.language_projection(text.tokens), len(images.mask_features)
        start, position, grids = self._regions(images, num_images)
        start = self._read_image(0, start, images.memory[0], images.mask_levels, Grouping(num_images, 1), position)
        groups = group(image_index, num_images)
        mask_levels, mask_features = [groups.of_image(m) for m in images.mask_levels], groups.of_image(images.mask_features)
        kept = groups.of_image if self.attends else partial(torch.index_select, dim=0, index=image_index)
        x = start.index_select(0, image_index)
        seen = None
        if grids is not None:
            grids, position = grids.of(image_index), position.index_select(0, image_index)
            seen = grids.active[:, None, None]
        earlier = []
        for i in range(len(self.region_image)):
            if i > 0:
                x = self._read_image(i, x, tuple(kept(m) for m in images.memory[i]), mask_levels, groups, position)
            x = self._read_text(i, x, tokens, text.mask)
            if len(self.region_region):
                query = x + position
                x = self.region_region[i](x, query, query, x, seen)
            x = self.feedforward[i](x)
            if self.config.loss.deep_supervision and self.training and i + 1 < len(self.region_image):
                earlier.append(self._answer(x, mask_features, groups, grids, []))
        return self._answer(x, mask_features, groups, grids, earlier)

    def _regions(self, images: RegionImages, num_images: int) -> tuple[Tensor, Tensor, OwnGrids | None]:
        """Return features of the regions [B, Q, C], their positions, and the grids of images that have their own; None = one for all."""
        features, positions = rows(self.region_features), rows(self.region_positions)
        if images.side is None:
            return features.expand(num_images, -1, -1), positions, None
        grids = own_grids(images.side, self.config.region_sides)
        return grid_rows(features, grids), grid_rows(positions, grids), grids

    def _read_image(
        self, i: int, x: Tensor, memory: tuple[Tensor, ...], mask_levels: list[Tensor], groups: Grouping, position: Tensor
    ) -> Tensor:
        """Region-image attention of layer i, each region within its own mask."""
        layer: Any = self.region_image[i]
        if not self.attends:
            return layer(x, *memory)
        query = groups.fold(x + position)
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
        allowed = mask.bool()[:, None, None] if self.config.mask_language_padding else None
        read = self.region_language[i](x, x, tokens, tokens, allowed)
        return x + self.config.language_scale * self.language_weight.sigmoid() * read

    def _answer(
        self, x: Tensor, mask_features: Tensor, groups: Grouping, grids: OwnGrids | None, earlier: list[GroundingOutput]
    ) -> GroundingOutput:
        regions = self.norm(x)
        embeddings = self.heads.mask(regions)
        minimap = self.heads.minimap(regions)
        weight, active, start = minimap, None, None
        if grids is not None:
            active, start = grids.active, grids.box_starts().to(regions)
            weight = minimap * active[..., None]
        mask = groups.unfold(groups.fold(weight.transpose(1, 2) @ embeddings) @ mask_features.flatten(2))
        boxes, scores = self.heads.predict_boxes(regions, start)
        prob, side = minimap.softmax(dim=-1)[..., 1], self.config.minimap_side
        answer = GroundingOutput(
            mask_logits=mask.unflatten(2, mask_features.shape[-2:]),
            minimap_logits=minimap,
            no_target_logits=self.heads.predict_no_target(regions, active),
            boxes_norm=boxes,
            box_logits=scores,
            count_logits=self.heads.predict_count(regions, active),
            minimap_prob=prob.unflatten(1, (side, side)) if grids is None else grids.spread(prob),
            extra=RelaExtra(embeddings, earlier),
        )
        return answer if grids is None else grids.filled(answer)


class Rela(nn.Module):
    """See the module's docstring."""

    # what a released GRES checkpoint, or one without these heads, need not hold to start a training from
    new_parts = ("language_part.heads.box.", "language_part.heads.box_score.", "language_part.heads.count.")

    def __init__(self, config: RelaConfig, inputs: DecoderInputs) -> None:
        super().__init__()
        if inputs.width != config.width:
            given = f"model.decoder.width {config.width}, pixel decoder {inputs.width}"
            raise fault(given, "the same width for rela", "fix model.decoder.width")
        if config.ria not in RIA or config.rla not in RLA:
            raise fault(f'model.decoder.ria "{config.ria}", rla "{config.rla}"', f"ria of {RIA}, rla of {RLA}", "fix the names")
        check_sides(config)
        self.answers_boxes, self.reads_image = config.boxes, bool(config.region_sides)
        self.image_part = ImagePart(config)
        self.language_part = LanguagePart(config, inputs.mask_width, inputs.text_width)
