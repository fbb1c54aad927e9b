"""The pixel decoder of Mask2Former (Cheng et al. 2022) with multi-scale deformable attention, as in the released ReLA."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.config import PixelDecoderConfig
from grex_mllm.errors import fault
from grex_mllm.models.feature_pyramid import NUM_LEVELS, upsample_to
from grex_mllm.models.norms import num_groups
from grex_mllm.models.positions import sine_positions
from grex_mllm.ops.attention import softmax_of_few
from grex_mllm.ops.deform_attn import Shapes, deformable_attention
from grex_mllm.ops.feedforward import feedforward
from grex_mllm.ops.winograd import conv3x3
from grex_mllm.types import PixelFeatures

GROUPS = 32


class SamplingOffsets(nn.Linear):
    """A linear layer with numbers x, y, x, y, ... that returns all x, then all y.

    Neighbouring numbers then meet neighbouring numbers in all that follows. The weights are reordered, which are fewer than the numbers.
    """

    def forward(self, query: Tensor) -> Tensor:
        """query: float [..., C] -> [..., 2 * n]."""
        return F.linear(query, *(p.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1) for p in (self.weight, self.bias)))


class DeformableAttention(nn.Module):
    """Each query reads a few points around its own place on every level."""

    def __init__(self, width: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        if width % num_heads:
            raise fault(f"pixel decoder width {width} with {num_heads} heads", "heads that divide the width", "fix model.pixel_decoder")
        self.num_heads, self.num_points = num_heads, num_points
        self.sampling_offsets = SamplingOffsets(width, num_heads * NUM_LEVELS * num_points * 2)
        self.attention_weights = nn.Linear(width, num_heads * NUM_LEVELS * num_points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        self._reset()

    def _reset(self) -> None:
        # each head looks its own way at first, further with every point (Zhu et al. 2021, A.4)
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        way = torch.stack([angle.cos(), angle.sin()], dim=-1)
        way = way / way.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            bias = way[:, None, None] * steps[None, None, :, None]
            self.sampling_offsets.bias.copy_(bias.expand(-1, NUM_LEVELS, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, query: Tensor, source: Tensor, centres: Tensor, shapes: Shapes) -> Tensor:
        """Attend from every query: float [B * S, C].

        query, source: float [B, S, C].  centres: float [S, 2, L], x and y of every query in cells of each level.
        shapes: (h, w) of the levels.
        """
        batch, total, _ = query.shape
        value = self.value_proj(source).view(batch, total, self.num_heads, -1)
        grid = (batch, total, self.num_heads, NUM_LEVELS, self.num_points)
        places = centres[:, :, None, :, None].expand(-1, -1, self.num_heads, -1, self.num_points).flatten(1)
        points = (self.sampling_offsets(query) + places).view(batch, total, 2, *grid[2:])
        weights = softmax_of_few(self.attention_weights(query).view(batch, total, self.num_heads, -1)).view(grid)
        # flat rows are a tensor of their own, to which the caller may add in place
        return self.output_proj(deformable_attention(value, shapes, points, weights).flatten(0, 1))


class DeformableLayer(nn.Module):
    """Deformable attention and a feed-forward network, normalised after."""

    def __init__(self, width: int, num_heads: int, num_points: int, feedforward: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(width, num_heads, num_points)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, feedforward)
        self.linear2 = nn.Linear(feedforward, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, position: Tensor, centres: Tensor, shapes: Shapes) -> Tensor:
        read, rows = self.attention(x + position, x, centres, shapes), x.flatten(0, 1)
        # autocast has made `read` smaller than x: then not in place
        x = self.norm1((read.add_(rows) if read.dtype == rows.dtype else read + rows).view_as(x))
        return self.norm2(x + feedforward(x, self.linear1, self.linear2, "relu"))


class SmoothingConv(nn.Conv2d):
    """A 3x3 convolution without bias, the quickest way that there is on the device."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return conv3x3(x, self.weight)


class DeformablePixelDecoder(nn.Module):
    """Refine the three coarse maps together, then merge the finest map into the mask features.

    Runs in float32 under autocast, as released, unless `mixed_precision` is set.
    """

    def __init__(self, config: PixelDecoderConfig, channels: Sequence[int]) -> None:
        super().__init__()
        width = config.width
        self.width, self.mask_width = width, config.mask_width
        self.mixed_precision = config.mixed_precision
        groups = num_groups(width, GROUPS)
        self.inputs = nn.ModuleList(nn.Sequential(nn.Conv2d(c, width, 1), nn.GroupNorm(groups, width)) for c in reversed(channels[1:]))
        self.level_embed = nn.Parameter(torch.empty(NUM_LEVELS, width))
        nn.init.normal_(self.level_embed)
        self.layers = nn.ModuleList(
            DeformableLayer(width, config.num_heads, config.num_points, config.feedforward) for _ in range(config.num_layers)
        )
        self.lateral = nn.Sequential(nn.Conv2d(channels[0], width, 1, bias=False), nn.GroupNorm(groups, width))
        self.smooth = nn.Sequential(SmoothingConv(width), nn.GroupNorm(groups, width), nn.ReLU(inplace=True))
        self.mask_features = nn.Conv2d(width, config.mask_width, 1)
        for module in self.inputs.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: list[Tensor]) -> PixelFeatures:
        """Return mask features at the finest map's stride and the refined levels, coarse to fine.

        maps: four float [B, C_i, h_i, w_i], fine to coarse.
        """
        if self.mixed_precision or not torch.is_autocast_enabled(maps[0].device.type):
            return self._decode(maps)
        with torch.autocast(maps[0].device.type, enabled=False):
            return self._decode([m.to(self.level_embed.dtype) for m in maps])

    def _decode(self, maps: list[Tensor]) -> PixelFeatures:
        # Swin's maps have channels last in memory; convolutions keep that layout, their backward pass then takes twice as long, and
        # group norm turns it round
        maps = [m.contiguous() for m in maps]
        sources = [project(m) for project, m in zip(self.inputs, reversed(maps[1:]), strict=True)]
        shapes = [(int(s.shape[-2]), int(s.shape[-1])) for s in sources]
        x = torch.cat([s.flatten(2).transpose(1, 2) for s in sources], dim=1)
        device, dtype = x.device, self.level_embed.dtype
        position = torch.cat(
            [sine_positions(h, w, self.width, device, dtype) + e for (h, w), e in zip(shapes, self.level_embed, strict=True)]
        )
        centres = cell_centres(shapes, device, dtype)
        for layer in self.layers:
            x = layer(x, position, centres, shapes)
        levels = [
            part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(x.split([h * w for h, w in shapes], dim=1), shapes, strict=True)
        ]
        fine = self.lateral(maps[0])
        fine = self.smooth(upsample_to(levels[-1].contiguous(), fine).add_(fine))
        return PixelFeatures(self.mask_features(fine), levels)


def cell_centres(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return where the centre of every cell of every level lies on each level, in cells: float [S, 2 (x, y), L].

    Relative places are computed in float32 whatever the dtype, as released.
    """
    relative = []
    for height, width in shapes:
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        relative.append(torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1))
    size = torch.tensor([[w for _, w in shapes], [h for h, _ in shapes]], device=device, dtype=dtype)
    return torch.cat(relative).to(dtype)[:, :, None] * size - 0.5
