"""The grounding model: image encoder, text encoder, pixel decoder, decoder. Composition only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.types import GroundingOutput, PixelFeatures, Proposals, TextFeatures

# ImageNet, RGB, 0 .. 255
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
# Expressions that go together through an image encoder with language fusion, on CPU without gradients. Nothing is shared after the first
# fusion, and the tensors of more expressions outgrow the caches and the memory that the allocator keeps.
FUSED_AT_ONCE = 2


@dataclass
class ImageFeatures:
    """What is computed once per image, before any expression.

    image: float [B, 3, H', W'] normalised and padded.  input_size: (H, W) as given.
    maps: four float [B, C_i, h_i, w_i] fine to coarse without language.  pixels: of the pixel decoder.  decoded: of the decoder's image
    part. These three are None when the image encoder fuses language; `prefix` is then its work before the first fusion. `pixels` are
    filled in without language where a generator asks for them (`GroundingModel.language_free`).
    """

    image: Tensor
    input_size: tuple[int, int]
    maps: list[Tensor] | None = None
    pixels: PixelFeatures | None = None
    decoded: Any = None
    prefix: Any = None

    @property
    def padded_size(self) -> tuple[int, int]:
        """Height and width after padding to the encoder's coarsest stride."""
        return int(self.image.shape[-2]), int(self.image.shape[-1])


class GroundingModel(nn.Module):
    """Ground expressions in images; the work on an image is shared by its expressions as far as the image encoder allows."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, vision: nn.Module, text: nn.Module, pixel_decoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.vision: Any = vision
        self.text: Any = text
        self.pixel_decoder: Any = pixel_decoder
        self.decoder: Any = decoder
        self.shows_image = False  # see `language_free`
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)

    @property
    def fuses_language(self) -> bool:
        """Tell whether the image encoder reads the expression."""
        return bool(self.vision.fuses_language)

    def normalise(self, image: Tensor, valid_sizes: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """Normalise uint8 (or 0..255 float) [B, 3, H, W], zero what lies outside the valid sizes, pad to the coarsest stride with zeros.

        valid_sizes: (height, width) of each image within its canvas; None = all of it.
        """
        x = (image.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std
        for i, (height, width) in enumerate(valid_sizes or ()):
            x[i, :, height:] = 0
            x[i, :, :, width:] = 0
        stride = max(self.vision.strides)
        return F.pad(x, (0, -x.shape[-1] % stride, 0, -x.shape[-2] % stride))

    def normalised(self, image: Tensor, valid_sizes: Sequence[tuple[int, int]] | None = None) -> ImageFeatures:
        """Return B images uint8 [B, 3, H, W] normalised and padded, nothing computed yet."""
        return ImageFeatures(self.normalise(image, valid_sizes), (int(image.shape[-2]), int(image.shape[-1])))

    def encode_image(self, image: Tensor, valid_sizes: Sequence[tuple[int, int]] | None = None) -> ImageFeatures:
        """Do the language-free work of B images once.

        image: uint8 [B, 3, H, W] RGB.
        """
        return self.encode_normalised(self.normalised(image, valid_sizes))

    def encode_normalised(self, features: ImageFeatures) -> ImageFeatures:
        """Do the language-free work that is left: all of it, or what comes after the image encoder where `maps` are there already."""
        if self.fuses_language:
            features.prefix = self.vision.encode_prefix(features.image)
        else:
            features.maps = self.vision(features.image, None) if features.maps is None else features.maps
            features.pixels = self.pixel_decoder(features.maps)
            features.decoded = self._decode(features.maps, features.pixels, features.image)
        return features

    def _decode(self, maps: list[Tensor], pixels: PixelFeatures, image: Tensor) -> Any:
        """Run the decoder's image part; one that says so gets the images [B, 3, H', W'], too."""
        given = (image,) if getattr(self.decoder, "reads_image", False) else ()
        return self.decoder.image_part(maps, pixels, *given)

    def language_free(self, features: ImageFeatures) -> list[Tensor]:
        """Return the pixel decoder's maps of encoded images without any language, fine to coarse: what a generator reads.

        Behind them stands the normalised image itself, where the generator looks at that as well (`shows_image`). An image encoder that
        fuses language makes them by a pass without language; they are kept in `features.pixels`.
        """
        if features.pixels is None:
            features.pixels = self.pixel_decoder(self.vision(features.image, None) if features.maps is None else features.maps)
        image = [features.image] if self.shows_image else []
        return [features.pixels.mask_features, *reversed(features.pixels.levels), *image]

    def proposals(self, features: ImageFeatures) -> Proposals | None:
        """Return the objects that the decoder finds without any expression; None where it finds none."""
        find = getattr(self.decoder, "proposals", None)
        return find(features.decoded) if find is not None and features.decoded is not None else None

    def encode_text(self, text_ids: Tensor, text_mask: Tensor) -> TextFeatures:
        """Encode E expressions: int64 [E, L] ids and mask."""
        return self.text(text_ids, text_mask)

    def ground(self, features: ImageFeatures, image_index: Tensor, text_ids: Tensor, text_mask: Tensor) -> GroundingOutput:
        """Ground E expressions in the encoded images.

        image_index: int64 [E], image of each expression.  text_ids, text_mask: int64 [E, L].
        """
        return self.ground_text(features, image_index, self.encode_text(text_ids, text_mask))

    def ground_text(self, features: ImageFeatures, image_index: Tensor, text: TextFeatures) -> GroundingOutput:
        """Ground E encoded expressions in the encoded images."""
        if not self.fuses_language:
            return self.decoder.language_part(features.decoded, image_index, text)
        whole = torch.is_grad_enabled() or torch.compiler.is_compiling() or image_index.device.type != "cpu"
        if whole or len(image_index) <= FUSED_AT_ONCE:
            return self._ground_fused(features, image_index, text)
        parts = []
        for start in range(0, len(image_index), FUSED_AT_ONCE):
            some = slice(start, start + FUSED_AT_ONCE)
            parts.append(self._ground_fused(features, image_index[some], TextFeatures(text.tokens[some], text.mask[some])))
        return join_outputs(parts)

    def _ground_fused(self, features: ImageFeatures, image_index: Tensor, text: TextFeatures) -> GroundingOutput:
        maps = self.vision.finish(features.prefix, image_index, text)
        image = features.image.index_select(0, image_index) if getattr(self.decoder, "reads_image", False) else features.image
        decoded = self._decode(maps, self.pixel_decoder(maps), image)
        return self.decoder.language_part(decoded, torch.arange(len(image_index), device=image_index.device), text)

    def forward(
        self,
        image: Tensor,
        image_index: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
        valid_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> GroundingOutput:
        """Encode the images and ground the expressions: `ground(encode_image(image), ...)`."""
        return self.ground(self.encode_image(image, valid_sizes), image_index, text_ids, text_mask)


def join_outputs(parts: Sequence[Any]) -> Any:
    """Join the answers for several runs of expressions into one, in their order; every tensor has the expressions first."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(join_outputs(values) for values in zip(*parts, strict=True)))
    if isinstance(first, list):
        return [join_outputs(values) for values in zip(*parts, strict=True)]
    return first


def upsample_logits(logits: Tensor, size: tuple[int, int], crop: tuple[int, int] | None = None) -> Tensor:
    """Bring mask logits [E, K, h, w] to the padded input size (bilinear, align_corners False), then cut the padding off.

    size: padded height and width (`ImageFeatures.padded_size`).
    crop: (H, W) to keep; None keeps the padding, as the released inference does.
    """
    out = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    return out if crop is None else out[..., : crop[0], : crop[1]]
