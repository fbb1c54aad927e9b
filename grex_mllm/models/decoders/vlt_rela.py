"""Entry "vlt_rela" of `DECODERS`: ReLA behind VLT's fusion and encoder (GRES paper, table 5; thesis, table 6.5).

The paper says that ReLA takes the place of "the decoder part" and no more. Our reading: spatial-dynamic fusion and the encoder stay;
query generation, decoder, balance and mask decoder go. ReLA reads F_mem convolved to half, equal and twice its size as its three levels,
and F_mem enlarged to stride 4 as mask features. So what reads language comes before ReLA's image part, and only the fusion's visual side
is shared by the expressions of an image.

LAVT+ReLA of the same table needs no entry: it is a configuration (`fusion: pwam`, `pixel_decoder: top_down`, `decoder: rela`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.errors import fault
from grex_mllm.models.decoders.rela.config import RelaConfig
from grex_mllm.models.decoders.rela.criterion import RelaCriterion as Criterion
from grex_mllm.models.decoders.rela.network import Rela
from grex_mllm.models.decoders.vlt.config import VltConfig
from grex_mllm.models.decoders.vlt.fusion import FusionImages, ImageFusion
from grex_mllm.models.decoders.vlt.network import FusedEncoder
from grex_mllm.models.feature_pyramid import GROUPS, num_groups
from grex_mllm.models.grid import ConvReluNorm, GridSum
from grex_mllm.types import DecoderInputs, GroundingOutput, PixelFeatures, TextFeatures

__all__ = ["Config", "Criterion", "Decoder"]


@dataclass
class Config(RelaConfig):
    """ReLA's knobs, and those of VLT's front."""

    name: str = "vlt_rela"
    grid_side: int = 30  # cells of a side: 480 / 16
    maps: str = "four"  # as of `vlt`
    fusion: str = "spatial"  # as of `vlt`
    encoder_layers: int = 2
    encoder_feedforward: int = 1024


class ImagePart(nn.Module):
    """What needs no language: the maps summed on the grid, and the fusion's visual side."""

    def __init__(self, config: Config, inputs: DecoderInputs) -> None:
        super().__init__()
        self.sum = GridSum(config.maps, config.grid_side, config.width, inputs)
        self.fusion = ImageFusion(config.fusion, config.width)

    def forward(self, maps: list[Tensor], pixels: PixelFeatures) -> FusionImages:
        """Do the language-free work of B images once."""
        return self.fusion(self.sum(pixels))


class Levels(nn.Module):
    """What ReLA reads, made of F_mem: three levels, and mask features at four times its size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.coarser = nn.Conv2d(width, width, 3, 2, 1)
        self.coarser_norm = nn.GroupNorm(num_groups(width, GROUPS), width)
        self.same, self.finer, self.finest = (ConvReluNorm(width, width) for _ in range(3))
        self.mask = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> PixelFeatures:
        """x: float [E, C, side, side]."""
        double = self.finer(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))
        fine = self.finest(F.interpolate(double, scale_factor=2, mode="bilinear", align_corners=False))
        return PixelFeatures(self.mask(fine), [self.coarser_norm(F.relu(self.coarser(x))), self.same(x), double])


class LanguagePart(nn.Module):
    """Fuse and encode, then ReLA on what comes out, which is of one expression each."""

    def __init__(self, config: Config, inputs: DecoderInputs) -> None:
        super().__init__()
        self.side = config.grid_side
        self.text = nn.Linear(inputs.text_width, config.width)
        front = VltConfig(
            width=config.width, num_heads=config.num_heads, feedforward=config.encoder_feedforward,
            encoder_layers=config.encoder_layers, fusion=config.fusion,
        )  # fmt: skip
        self.memory = FusedEncoder(front)
        self.levels = Levels(config.width)
        self.rela = Rela(config, DecoderInputs(inputs.channels, config.width, config.width, inputs.text_width))

    def forward(self, images: FusionImages, image_index: Tensor, text: TextFeatures) -> GroundingOutput:
        """Ground E expressions. image_index: int64 [E].  text: tokens [E, L, C_text]."""
        memory = self.memory(images, image_index, TextFeatures(self.text(text.tokens), text.mask))
        pixels = self.levels(memory.transpose(1, 2).unflatten(2, (self.side, self.side)))
        own = torch.arange(len(image_index), device=image_index.device)
        return self.rela.language_part(self.rela.image_part([], pixels), own, text)


class Decoder(nn.Module):
    """See the module's docstring."""

    new_parts = tuple(f"language_part.rela.{part}" for part in Rela.new_parts)

    def __init__(self, config: Config, inputs: DecoderInputs) -> None:
        super().__init__()
        if config.region_sides:
            given = f"model.decoder.region_sides is {config.region_sides} with vlt_rela"
            raise fault(given, "one grid: its regions read what was fused, not the image", "leave region_sides empty")
        self.answers_boxes = config.boxes
        self.image_part, self.language_part = ImagePart(config, inputs), LanguagePart(config, inputs)
