"""M3Att: multi-modal mutual attention, iterative interaction, language feature reconstruction (thesis, chapter 5).

Image part, once per image: the maps summed on the grid, two encoder layers on vision alone, keys and values of every decoder layer. So an
expression costs the word side and the mask decoder alone. The thesis leaves open, and we read: the grid at stride 16, one head in mutual
attention, its output as keys and values of the attention that follows, residuals and feed-forward as in a standard decoder.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.errors import fault
from grex_mllm.models.decoders.m3att.attention import ImageKeys, MutualDecoder
from grex_mllm.models.decoders.m3att.config import M3AttConfig
from grex_mllm.models.decoders.m3att.reconstruction import Reconstruction
from grex_mllm.models.grex_heads import GrexHeads, dense_answer
from grex_mllm.models.grid import AttentionLayer, ConvNormRelu, Encoder, GridSum, MaskUpsampler, split_words
from grex_mllm.types import DecoderInputs, GroundingOutput, PixelFeatures, TextFeatures

KERNELS, CONCATENATE, RESPONSES = MASK_DECODERS = ("kernels", "concatenate", "responses")


class M3AttImages(NamedTuple):
    """The language-free part of B images. encoded: F_enc, float [B, h * w, C].  layers: what `ImageKeys` gave, for every layer."""

    encoded: Tensor
    layers: list[list[Tensor]]


class M3AttExtra(NamedTuple):
    """What only the criterion reads: F_rec and F_proj, float [E, C] each; None without reconstruction."""

    reconstructed: Tensor | None = None
    projected: Tensor | None = None


class ImagePart(nn.Module):
    """What needs no language."""

    def __init__(self, config: M3AttConfig, inputs: DecoderInputs) -> None:
        super().__init__()
        width = config.width
        self.sum = GridSum(config.maps, config.grid_side, width, inputs)
        self.encoder = Encoder(width, config.num_heads, config.feedforward, config.encoder_layers)
        self.keys = nn.ModuleList(ImageKeys(width, config.attention) for _ in range(config.num_layers))

    def forward(self, maps: list[Tensor], pixels: PixelFeatures) -> M3AttImages:
        """Do the language-free work of B images once; the image encoder's own `maps` are not read."""
        encoded = self.encoder(self.sum(pixels))
        return M3AttImages(encoded, [keys(encoded) for keys in self.keys])


class MaskDecoder(nn.Module):
    """From the decoded words and the encoded map to a mask (thesis, section 5.1.4, and the rows of table 5.3)."""

    def __init__(self, config: M3AttConfig) -> None:
        super().__init__()
        if config.mask_decoder not in MASK_DECODERS:
            raise fault(
                f'model.decoder.mask_decoder is "{config.mask_decoder}"', f"one of {', '.join(MASK_DECODERS)}", "choose one of them"
            )
        self.kind, self.max_words, self.side, width = config.mask_decoder, config.max_words, config.grid_side, config.width
        self.self_attention = AttentionLayer(width, config.num_heads)
        self.cells = nn.Linear(width, self.side**2) if self.kind == RESPONSES else None
        channels = 2 * width if self.kind == CONCATENATE else self.max_words
        self.upsample = MaskUpsampler(channels, config.mask_widths, 3, ConvNormRelu)

    def forward(self, decoded: Tensor, real: Tensor, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Return mask logits float [E, H, W] and the map after the first convolution.

        decoded: F_dec, float [E, N_t, C].  real: bool [E, N_t].  encoded: F_enc of each expression's image, float [E, h * w, C].
        """
        rows = self.self_attention(decoded, decoded, real[:, None, None]) * real[..., None]
        if self.kind == CONCATENATE:
            tiled = rows.sum(dim=1, keepdim=True).expand(-1, encoded.shape[1], -1)
            maps = torch.cat([tiled, encoded], dim=2).transpose(1, 2)
        else:
            rows = F.pad(rows, (0, 0, 0, max(0, self.max_words - rows.shape[1])))[:, : self.max_words]
            if self.cells is None:
                maps = rows @ encoded.transpose(1, 2) * encoded.shape[-1] ** -0.5
            else:
                there = F.pad(real, (0, max(0, self.max_words - real.shape[1])))[:, : self.max_words]
                maps = F.relu(self.cells(rows)) * there[..., None]
        return self.upsample(maps.unflatten(2, (self.side, self.side)))


class LanguagePart(nn.Module):
    """The words through the mutual decoder, and what comes out as mask and answers."""

    def __init__(self, config: M3AttConfig, text_width: int) -> None:
        super().__init__()
        width = config.width
        self.text = nn.Linear(text_width, width)
        self.decoder = MutualDecoder(
            width,
            config.num_heads,
            config.feedforward,
            config.grid_side**2,
            config.attention,
            config.iterate,
            config.interaction,
            config.num_layers,
        )
        self.mask = MaskDecoder(config)
        self.reconstruction = Reconstruction(width, config.detach) if config.loss.reconstruction else None
        self.heads = GrexHeads(config.heads, config.mask_widths[0], width)

    def forward(self, images: M3AttImages, image_index: Tensor, text: TextFeatures) -> GroundingOutput:
        """Ground E expressions. image_index: int64 [E].  text: tokens [E, L, C_text], the sentence in row 0, the words after it."""
        sentence, words, real = split_words(TextFeatures(self.text(text.tokens), text.mask))
        decoded = self.decoder(words, real, [[x[image_index] for x in layer] for layer in images.layers])
        logits, first = self.mask(decoded, real, images.encoded[image_index])
        extra = M3AttExtra()
        if self.reconstruction is not None:
            extra = M3AttExtra(*self.reconstruction(decoded, words, sentence, real))
        return dense_answer(logits, self.heads(first), extra)


class M3Att(nn.Module):
    """See the module's docstring."""

    def __init__(self, config: M3AttConfig, inputs: DecoderInputs) -> None:
        super().__init__()
        self.answers_boxes = config.heads.boxes
        self.image_part = ImagePart(config, inputs)
        self.language_part = LanguagePart(config, inputs.text_width)
