"""A worked example of a decoder with a loss of its own: the mask is where image features look like the sentence.

Chosen in a configuration by its dotted path, from a folder that Python finds: `model.decoder: {name: examples.decoder_example, width: 32}`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.ops.losses import shared_count
from grex_mllm.types import Batch, DecoderInputs, GroundingOutput, PixelFeatures, TextFeatures


@dataclass
class Config:
    name: str = "decoder_example"
    width: int = 32
    loss: float = 1.0


class ImagePart(nn.Module):
    """Once per image: mask features [B, C, h, w] to the common width."""

    def __init__(self, config: Config, inputs: DecoderInputs) -> None:
        super().__init__()
        self.project = nn.Conv2d(inputs.mask_width, config.width, 1)

    def forward(self, maps: list[Tensor], pixels: PixelFeatures) -> Tensor:
        return self.project(pixels.mask_features)


class LanguagePart(nn.Module):
    """Once per expression: compare every pixel with the sentence, which is row 0 of the text."""

    def __init__(self, config: Config, inputs: DecoderInputs) -> None:
        super().__init__()
        self.sentence = nn.Linear(inputs.text_width, config.width)
        self.background = nn.Parameter(torch.zeros(1))

    def forward(self, features: Tensor, image_index: Tensor, text: TextFeatures) -> GroundingOutput:
        sentence = self.sentence(text.tokens[:, 0])
        target = torch.einsum("ec,echw->ehw", sentence, features[image_index]) / sentence.shape[-1] ** 0.5
        return GroundingOutput(torch.stack([self.background.expand_as(target), target], dim=1))


class Decoder(nn.Module):
    def __init__(self, config: Config, inputs: DecoderInputs) -> None:
        super().__init__()
        self.image_part, self.language_part = ImagePart(config, inputs), LanguagePart(config, inputs)


class Criterion:
    """Binary cross-entropy of the mask, a mean over the pixels of all processes."""

    def __init__(self, config: Config) -> None:
        self.weight = config.loss

    def __call__(self, output: GroundingOutput, batch: Batch) -> dict[str, Tensor]:
        assert batch.gt_masks is not None
        logits = F.interpolate(output.mask_logits.float(), size=batch.gt_masks.shape[-2:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(logits, batch.gt_masks.long(), reduction="sum") / shared_count(batch.gt_masks.numel(), logits)
        return {"mask": loss, "total": self.weight * loss}
