"""Entry "lavt" of `DECODERS`: what LAVT (Yang et al. 2022) has behind its encoder: two logits for each place of the finest map.

Language comes in through the image encoder alone (`model.vision.fusion: pwam`), the way up is the pixel decoder `top_down`. The heads of
GREx read the finest map, too; all off is the published system.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from grex_mllm.errors import fault
from grex_mllm.models.grex_heads import GrexHeads, GrexHeadsConfig
from grex_mllm.models.grex_losses import GrexLossConfig, GrexLosses
from grex_mllm.types import Batch, DecoderInputs, GroundingOutput, PixelFeatures, TextFeatures


@dataclass
class LavtLossConfig(GrexLossConfig):
    """The loss of GREx, with LAVT's weights of the classes."""

    class_weights: list[float] = field(default_factory=lambda: [0.9, 1.1])  # of background and target in the cross-entropies


@dataclass
class Config:
    """The heads of GREx and their width."""

    name: str = "lavt"
    width: int = 256  # of the regions that the heads read
    heads: GrexHeadsConfig = field(default_factory=GrexHeadsConfig)
    loss: LavtLossConfig = field(default_factory=LavtLossConfig)


class ImagePart(nn.Module):
    """The finest map of the way up; language is in it already."""

    def forward(self, maps: list[Tensor], pixels: PixelFeatures) -> Tensor:
        """Return float [E, C, h, w]."""
        return pixels.mask_features


class LanguagePart(nn.Module):
    """Two logits for each place, and the heads."""

    def __init__(self, config: Config, inputs: DecoderInputs) -> None:
        super().__init__()
        self.classes = nn.Conv2d(inputs.mask_width, 2, 1)
        self.heads = GrexHeads(config.heads, inputs.mask_width, config.width)

    def forward(self, features: Tensor, image_index: Tensor, text: TextFeatures) -> GroundingOutput:
        """Ground E expressions. features: float [E, C, h, w], taken by image_index int64 [E]; the text was read before."""
        features = features.index_select(0, image_index)
        return GroundingOutput(self.classes(features), *self.heads(features))


class Decoder(nn.Module):
    """See the module's docstring."""

    def __init__(self, config: Config, inputs: DecoderInputs) -> None:
        super().__init__()
        self.answers_boxes = config.heads.boxes
        self.image_part, self.language_part = ImagePart(), LanguagePart(config, inputs)

    @staticmethod
    def check(model: Any) -> None:
        """Refuse an image encoder that reads no language, and a pixel decoder with levels that nothing reads.

        Raises:
            GrexError: names both settings.
        """
        for name, value, needed in (
            ("model.vision.fusion", model.vision.fusion, "pwam"), ("model.pixel_decoder.name", model.pixel_decoder.name, "top_down"),
        ):  # fmt: skip
            if value != needed:
                raise fault(
                    f"{name} is {value} with model.decoder.name lavt", f"{needed}: it reads nothing else", f"set {name} to {needed}"
                )


class Criterion:
    """The terms of GREx and their weighted `total`."""

    reads_targets_only = True

    def __init__(self, config: Config) -> None:
        self.losses = GrexLosses(config.loss, config.loss.class_weights)
        self.weights = self.losses.weights

    def __call__(self, output: GroundingOutput, batch: Batch) -> dict[str, Tensor]:
        """Return name -> scalar of the terms with a weight, and `total`."""
        terms = self.losses.terms(output, batch)
        return {**terms, "total": self.losses.total(terms)}
