"""Regions that are instances: the language-free half of `instance_selection`, once per image.

Proposals are read off the mask features of the pixel decoder, cell by cell (a heat map of object centres and a box for each cell, as in
CenterNet, Zhou et al. 2019). The best ones become region queries: each looks at its own box (sampled features), at the image, and at the
other regions (the region-image attention of ReLA, GRES paper section 4.2), and refines its box, score and mask, layer by layer.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grex_mllm.models.decoders.instance_selection.config import InstanceSelectionConfig
from grex_mllm.models.word_bags import WordList
from grex_mllm.ops.attention import attend, split_heads
from grex_mllm.types import PixelFeatures

OUTSIDE_LOGIT = -30.0
BOX_MARGIN = 0.125  # a region's mask is cut off outside its box enlarged by this share of the box on each side
ROI_MARGIN = 0.15  # the features of a region are sampled a little beyond its box
BOX_CODE_WIDTH = 22
PAIR_WIDTH = 10
CENTRE_PRIOR = -3.0  # logit of a cell holding a centre, at first
SURE = 10.0  # logit of a known object's being one


class Regions(NamedTuple):
    """What the language-free part knows of B images. S cells of the heat map, K regions; lists run over the image layers, last = final.

    heat_logits: float [B, S].  cell_boxes_norm: float [B, S, 4] cxcywh.  heat_size: (h, w), S = h * w.
    kept: int64 [B, K], cells of the regions.
    objectness: float [B, K].  boxes_norm: float [B, K, 4].  mask_embeddings: float [B, K, M].  mask_map: float [B, M, H, W].
    features: float [B, K, C].  geometry: float [B, K, K, G] of the final boxes.  attribute_logits: name -> float [B, K, classes].
    word_logits: float [B, K, V], how much likelier each word is of a region than of any; the features hold them; None without words.
    word_ids: int64 [B, V], the tokens that these words are, the same for every image.
    """

    heat_logits: Tensor
    cell_boxes_norm: Tensor
    heat_size: tuple[int, int]
    kept: Tensor
    objectness: list[Tensor]
    boxes_norm: list[Tensor]
    mask_embeddings: list[Tensor]
    mask_map: Tensor
    features: Tensor
    geometry: Tensor
    attribute_logits: dict[str, Tensor]
    word_logits: Tensor | None = None
    word_ids: Tensor | None = None

    def masks(self) -> Tensor:
        """Return the final mask logits float32 [B, K, H, W]."""
        return region_masks(self.mask_embeddings[-1], self.boxes_norm[-1], self.mask_map)


def box_code(boxes_norm: Tensor) -> Tensor:
    """Return float [..., BOX_CODE_WIDTH] features of cxcywh boxes: values, sines and cosines of the centre, log size."""
    centre, size = boxes_norm[..., :2], boxes_norm[..., 2:]
    waves = [f(centre * (math.pi * 2**k)) for k in range(4) for f in (torch.sin, torch.cos)]
    return torch.cat([boxes_norm, *waves, torch.log(size.clamp(min=1e-3))], dim=-1)


def pair_geometry(boxes_norm: Tensor) -> Tensor:
    """Return float [B, K, K, PAIR_WIDTH] of region j seen from region i: offsets, their signs, distance, size ratio, sameness."""
    centre, size = boxes_norm[..., :2], boxes_norm[..., 2:].clamp(min=1e-3)
    offset = centre[:, None, :, :] - centre[:, :, None, :]
    ratio = torch.log(size[:, None, :, :] / size[:, :, None, :])
    sharp = torch.tanh(offset * 20.0)
    distance = offset.norm(dim=-1, keepdim=True)
    area = ratio.sum(dim=-1, keepdim=True)
    same = torch.eye(boxes_norm.shape[1], device=boxes_norm.device, dtype=boxes_norm.dtype)[None, :, :, None].expand_as(distance)
    return torch.cat([offset * 2.0, sharp, offset.abs() * 2.0, distance, area, torch.tanh(area * 3.0), same], dim=-1)


def mlp(width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    """Return two linear layers with a GELU between."""
    return nn.Sequential(nn.Linear(width_in, hidden), nn.GELU(), nn.Linear(hidden, width_out))


def precise(values: Tensor) -> Tensor:
    """Return values of half precision as float32; float32 and float64 stay."""
    return values if values.dtype == torch.float64 else values.float()


class ImageLayer(nn.Module):
    """Regions read their own box, look at the image and at each other, and think (pre-norm)."""

    def __init__(self, width: int, num_heads: int, feedforward: int, sampled_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_cross, self.norm_self, self.norm_ffn = (nn.LayerNorm(width) for _ in range(3))
        self.sampled = mlp(sampled_width, 2 * width, width)
        self.query, self.key_value, self.cross_out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.self_in, self.self_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = mlp(width, feedforward, width)

    def forward(self, regions: Tensor, sampled: Tensor, image_tokens: Tensor) -> Tensor:
        """Update regions [B, K, C]; sampled [B, K, S]: the features inside each box; image_tokens [B, T, C]."""
        x = regions + self.sampled(sampled)
        key, value = self.key_value(image_tokens).chunk(2, dim=-1)
        x = x + self.cross_out(self._attend(self.query(self.norm_cross(x)), key, value))
        query, key, value = self.self_in(self.norm_self(x)).chunk(3, dim=-1)
        x = x + self.self_out(self._attend(query, key, value))
        return x + self.ffn(self.norm_ffn(x))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (split_heads(t, self.num_heads) for t in (query, key, value))
        return attend(query, key, value).transpose(1, 2).flatten(2)


class ImagePart(nn.Module):
    """Find the instances of an image. width, mask_width: channels of the pixel decoder's levels and mask features."""

    def __init__(self, config: InstanceSelectionConfig, width: int, mask_width: int) -> None:
        super().__init__()
        self.num_kept, self.roi_size, self.upsample = config.kept_regions, config.roi_size, config.mask_upsample
        channels = config.width
        heat_width = config.heat_width
        self.heat = nn.Sequential(nn.Conv2d(mask_width, heat_width, 3, padding=1), nn.GELU())
        self.cell = nn.Linear(heat_width, 1 + 4)  # of every cell: heat, box
        self.region = nn.Linear(heat_width, channels)
        nn.init.constant_(self.cell.bias[0], CENTRE_PRIOR)
        self.inputs = nn.ModuleList([nn.Linear(width, channels) for _ in range(config.num_levels)])
        self.level_embedding = nn.Parameter(torch.randn(config.num_levels, channels) * 0.02)
        self.position = mlp(BOX_CODE_WIDTH, channels, channels)
        sampled = 2 * config.roi_channels * self.roi_size**2 + channels
        self.layers = nn.ModuleList(
            [ImageLayer(channels, config.num_heads, config.feedforward, sampled) for _ in range(config.image_layers)]
        )
        self.roi_fine, self.roi_coarse = nn.Conv2d(mask_width, config.roi_channels, 1), nn.Conv2d(width, config.roi_channels, 1)
        self.norm = nn.LayerNorm(channels)
        mask_channels = mask_width if self.upsample == 1 else max(16, mask_width // 2)
        self.objectness, self.box, self.mask_embedding = (
            nn.Linear(channels, 1),
            mlp(channels, channels, 4),
            mlp(channels, channels, mask_channels),
        )
        self.mask_map = nn.Conv2d(mask_width, mask_channels * self.upsample**2, 3, padding=1)
        self.attributes = nn.ModuleDict({name: nn.Linear(channels, n) for name, n in config.attribute_classes.items()})
        self.words = WordList(config.words) if config.words else None
        self.word = nn.Linear(channels, config.words) if config.words else None
        self.called = nn.Linear(config.words, channels, bias=False) if config.words else None

    def forward(self, maps: list[Tensor], pixels: PixelFeatures, known_norm: Tensor | None = None) -> Regions:
        """Find the regions of B images; the image encoder's own `maps` are not read.

        known_norm: float [B, N, 4] cxcywh, boxes of objects that are known: the regions are these, each from the cell at its centre, and
        surely objects.
        """
        finest = pixels.mask_features
        hidden = self.heat(finest).flatten(2)  # [B, C, S]
        cell = precise(torch.matmul(self.cell.weight, hidden) + self.cell.bias[:, None])  # quicker than a convolution to five channels
        heat = cell[:, 0]
        size = (finest.shape[-2], finest.shape[-1])  # as they come: whoever traces the model sees that they vary
        cells = grid_boxes(size[0], size[1], self.level_embedding)
        cell_boxes = self._cell_boxes(cell[:, 1:].transpose(1, 2), cells)
        kept = self._best(heat, size) if known_norm is None else cells_at(known_norm, size)
        boxes = gather(cell_boxes, kept).detach() if known_norm is None else known_norm.to(cell_boxes.dtype)
        x = self.region(hidden.gather(2, kept[:, None].expand(-1, hidden.shape[1], -1)).transpose(1, 2))
        levels = pixels.levels[: len(self.inputs)]
        tokens = torch.cat([self._tokens(level, i) for i, level in enumerate(levels)], dim=1)
        sources = [self.roi_fine(finest), self.roi_coarse(pixels.levels[-1])]
        objectness, all_boxes, embeddings = [], [], []
        for layer in self.layers:
            sampled = torch.cat([self._sample(sources, boxes), self.position(box_code(boxes)).to(x.dtype)], dim=-1)
            x = layer(x, sampled, tokens)
            normed = self.norm(x)
            if known_norm is None:
                boxes = self._refine(boxes, precise(self.box(normed)))
            all_boxes.append(boxes)
            boxes = boxes.detach()
            likely = precise(self.objectness(normed).squeeze(-1))
            objectness.append(likely if known_norm is None else torch.full_like(likely, SURE))
            embeddings.append(self.mask_embedding(normed))
        mask_map = self.mask_map(finest)
        mask_map = F.pixel_shuffle(mask_map, self.upsample) if self.upsample > 1 else mask_map
        attributes = {name: precise(head(normed)) for name, head in self.attributes.items()}
        words, word_ids, features = None, None, normed
        if self.words is not None and self.word is not None and self.called is not None:
            word_ids = self.words.ids.expand(len(normed), -1)
            words = precise(self.word(normed))
            features = normed + self.called(words.softmax(dim=-1).to(normed.dtype))
        geometry, found = pair_geometry(boxes), (objectness, all_boxes, embeddings)
        return Regions(heat, cell_boxes, size, kept, *found, mask_map, features, geometry, attributes, words, word_ids)

    def _best(self, heat: Tensor, size: tuple[int, int]) -> Tensor:
        """Return int64 [B, K]: the best cells, those that top their neighbours first."""
        grid = heat.detach().unflatten(1, tuple(size))
        peak = F.max_pool2d(grid[:, None], 3, 1, 1)[:, 0] == grid
        score = torch.where(peak, grid, grid - 1e4).flatten(1)
        return score.topk(min(self.num_kept, score.shape[1]), dim=1).indices

    def _cell_boxes(self, raw: Tensor, cells: Tensor) -> Tensor:
        centre = cells[:, :2] + raw[..., :2].tanh() * 2.0 * cells[:, 2:]
        return torch.cat([centre.clamp(0.0, 1.0), torch.sigmoid(raw[..., 2:] - 1.5)], dim=-1)

    def _refine(self, boxes: Tensor, change: Tensor) -> Tensor:
        centre = boxes[..., :2] + change[..., :2] * 0.5 * boxes[..., 2:]
        size = boxes[..., 2:] * torch.exp((change[..., 2:] * 0.5).clamp(-1.5, 1.5))
        return torch.cat([centre.clamp(0.0, 1.0), size.clamp(1e-3, 1.0)], dim=-1)

    def _tokens(self, level: Tensor, index: int) -> Tensor:
        position = self.position(box_code(grid_boxes(level.shape[-2], level.shape[-1], self.level_embedding)))
        return self.inputs[index](level.flatten(2).transpose(1, 2)) + position + self.level_embedding[index]

    def _sample(self, sources: list[Tensor], boxes: Tensor) -> Tensor:
        """Sample roi_size x roi_size points of each map inside each box: [B, K, maps * channels * points]."""
        steps = (torch.arange(self.roi_size, device=boxes.device, dtype=boxes.dtype) + 0.5) / self.roi_size - 0.5
        y, x = torch.meshgrid(steps, steps, indexing="ij")
        offsets = torch.stack([x, y], dim=-1).flatten(0, 1) * (1.0 + 2.0 * ROI_MARGIN)
        where = (boxes[:, :, None, :2] + offsets * boxes[:, :, None, 2:]) * 2.0 - 1.0
        parts = [F.grid_sample(s.to(where.dtype), where, align_corners=False, padding_mode="border") for s in sources]
        return torch.cat([part.permute(0, 2, 3, 1).flatten(2) for part in parts], dim=-1).to(sources[0].dtype)


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


def cells_at(boxes_norm: Tensor, size: tuple[int, int]) -> Tensor:
    """Return int64 [B, N]: the cells, row by row, in which the centres of boxes [B, N, 4] cxcywh lie. size: rows and columns."""
    rows, columns = size
    column = (boxes_norm[..., 0] * columns).long().clamp(0, columns - 1)
    return (boxes_norm[..., 1] * rows).long().clamp(0, rows - 1) * columns + column


def grid_boxes(height: int, width: int, like: Tensor) -> Tensor:
    """Return [height * width, 4] cxcywh of the cells of a grid, row by row."""
    y, x = torch.meshgrid(torch.arange(height, device=like.device), torch.arange(width, device=like.device), indexing="ij")
    size = 1.0 / torch.stack([x.max() + 1, y.max() + 1]).to(like.dtype)
    centre = (torch.stack([x, y], dim=-1).flatten(0, 1).to(like.dtype) + 0.5) * size
    return torch.cat([centre, size.expand_as(centre)], dim=-1)


def gather(values: Tensor, index: Tensor) -> Tensor:
    """Pick rows: values [B, S, C], index int64 [B, K] -> [B, K, C]."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
