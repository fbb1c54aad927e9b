"""From an image encoder's maps to mask features and levels: multi-scale deformable attention (Mask2Former's), a plain feature pyramid, its
coarser levels alone, or LAVT's way up."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from grex_mllm.config import PixelDecoderConfig
from grex_mllm.errors import fault
from grex_mllm.models.deformable import DeformablePixelDecoder
from grex_mllm.models.feature_pyramid import NUM_LEVELS, FeaturePyramid, LevelPyramid
from grex_mllm.models.top_down import TopDown


def build_pixel_decoder(config: PixelDecoderConfig, channels: Sequence[int]) -> nn.Module:
    """Build the pixel decoder for an image encoder with these channels (fine to coarse).

    Raises:
        GrexError: unknown name, or not four maps.
    """
    if len(channels) != NUM_LEVELS + 1:
        raise fault(f"an image encoder with {len(channels)} maps", f"{NUM_LEVELS + 1}", "choose another image encoder")
    if config.name == "fpn":
        return FeaturePyramid(config, channels)
    if config.name == "fpn_levels":
        return LevelPyramid(config, channels)
    if config.name == "top_down":
        return TopDown(config, channels)
    if config.name == "deformable":
        return DeformablePixelDecoder(config, channels)
    raise fault(f'model.pixel_decoder.name "{config.name}"', "deformable, fpn, fpn_levels or top_down", "fix the name")
