"""LAVT's light decoder (Yang et al. 2022): from the coarsest map up, concatenate the next finer one, twice a 3x3 convolution.

Facts of its public code: as wide as half of the last stage, resized with corners aligned, no bias, batch norm. Here group norm, so that an
answer does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.config import PixelDecoderConfig
from grex_mllm.models.norms import map_norm
from grex_mllm.types import PixelFeatures


def _conv(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1, bias=False), map_norm(after), nn.ReLU()]


class TopDown(nn.Module):
    """Mask features at the finest stride. For decoders that read levels: the maps on the way there, and the coarsest of them halved."""

    def __init__(self, config: PixelDecoderConfig, channels: Sequence[int]) -> None:
        super().__init__()
        width = self.width = self.mask_width = config.width
        coarser = [channels[-1], *[width] * (len(channels) - 2)]
        finer = list(reversed(channels[:-1]))
        self.joins = nn.ModuleList(nn.Sequential(*_conv(a + b, width), *_conv(width, width)) for a, b in zip(coarser, finer, strict=True))

    def forward(self, maps: list[Tensor]) -> PixelFeatures:
        """Return the mask features at the finest stride and three levels, coarse to fine.

        maps: four float [B, C_i, h_i, w_i], fine to coarse.
        """
        x, made = maps[-1], list[Tensor]()
        for join, finer in zip(self.joins, reversed(maps[:-1]), strict=True):
            x = F.interpolate(x, size=finer.shape[-2:], mode="bilinear", align_corners=True)
            x = join(torch.cat([x, finer], dim=1))
            made.append(x)
        half = F.interpolate(made[0], size=maps[-1].shape[-2:], mode="area")
        return PixelFeatures(made[-1], [half, *made[:-1]])
