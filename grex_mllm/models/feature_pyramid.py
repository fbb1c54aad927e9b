"""A plain feature pyramid (Lin et al. 2017), and what all pixel decoders share."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.config import PixelDecoderConfig
from grex_mllm.models.norms import map_norm
from grex_mllm.types import PixelFeatures

NUM_LEVELS = 3  # that a pixel decoder gives beside the mask features


def upsample_to(x: Tensor, like: Tensor) -> Tensor:
    """Resize [.., C, h, w] bilinearly (align_corners False) to the height and width of `like`."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


class LevelPyramid(nn.Module):
    """The three coarser levels of a feature pyramid alone, for decoders that read no finer one; the finest is the mask features, too."""

    unread_maps = 1

    def __init__(self, config: PixelDecoderConfig, channels: Sequence[int]) -> None:
        super().__init__()
        self.width = self.mask_width = config.width
        self.laterals = nn.ModuleList([nn.Conv2d(c, config.width, 1) for c in reversed(channels[1:])])
        self.smooths = nn.ModuleList([_smooth(config.width) for _ in channels[1:]])

    def forward(self, maps: list[Tensor]) -> PixelFeatures:
        """Return three levels, coarse to fine, the last of them as mask features.

        maps: four float [B, C_i, h_i, w_i], fine to coarse; the finest is not read.
        """
        levels = pyramid_levels(maps, self.laterals, self.smooths)
        return PixelFeatures(levels[-1], levels)


class FeaturePyramid(nn.Module):
    """Feature pyramid (Lin et al. 2017): 1x1 lateral, upsample and add, 3x3 with normalisation; the finest map becomes the mask features.

    The finest map is only `mask_width` wide, so a fine stride stays cheap.
    """

    def __init__(self, config: PixelDecoderConfig, channels: Sequence[int]) -> None:
        super().__init__()
        width, mask_width = config.width, config.mask_width
        self.width, self.mask_width = width, mask_width
        self.laterals = nn.ModuleList([nn.Conv2d(c, width, 1) for c in reversed(channels[1:])])
        self.smooths = nn.ModuleList([_smooth(width) for _ in channels[1:]])
        self.fine_lateral = nn.Conv2d(channels[0], mask_width, 1)
        self.fine_down = nn.Conv2d(width, mask_width, 1)
        self.fine_smooth = _smooth(mask_width)
        self.mask_features = nn.Conv2d(mask_width, mask_width, 1)

    def forward(self, maps: list[Tensor]) -> PixelFeatures:
        """Return the mask features at the finest stride and three levels, coarse to fine.

        maps: four float [B, C_i, h_i, w_i], fine to coarse.
        """
        levels = pyramid_levels(maps, self.laterals, self.smooths)
        fine = self.fine_lateral(maps[0])
        fine = self.fine_smooth(fine + upsample_to(self.fine_down(levels[-1]), fine))
        return PixelFeatures(self.mask_features(fine), levels)


def pyramid_levels(maps: list[Tensor], laterals: nn.ModuleList, smooths: nn.ModuleList) -> list[Tensor]:
    """Return three levels, coarse to fine, of all maps but the finest: 1x1 lateral, upsample and add, smooth."""
    levels: list[Tensor] = []
    for lateral, smooth, x in zip(laterals, smooths, reversed(maps[1:]), strict=True):
        y = lateral(x)
        if levels:
            y = y + upsample_to(levels[-1], y)
        levels.append(smooth(y))
    return levels


def _smooth(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), map_norm(width), nn.ReLU())
