"""VLT, the vision-language transformer with query generation (thesis, chapter 4).

Image part, once per image: the maps summed on the grid (F_vr), the vision half of the fusion, and what the queries are generated from.
Language part: fusion, two encoder layers over the cells, generated queries through two decoder layers, balance, and the mask decoder. The
thesis leaves open, and we read: the grid at stride 16, heads of a 256-wide model, full attention among the queries, position codes on the
encoder's input alone, F_m scaled by C^-1/2, nearest upsampling, widths of the mask decoder's convolutions.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from grex_mllm.errors import fault
from grex_mllm.models.decoders.vlt.config import VltConfig
from grex_mllm.models.decoders.vlt.fusion import FusionImages, ImageFusion, LanguageFusion
from grex_mllm.models.decoders.vlt.queries import (
    GENERATED,
    MASKED_WORDS,
    NONE,
    ImageQueries,
    LanguageQueries,
    QueryBalance,
    mask_words,
)
from grex_mllm.models.grex_heads import GrexHeads, dense_answer
from grex_mllm.models.grid import ConvReluNorm, DecoderLayer, Encoder, GridSum, MaskUpsampler
from grex_mllm.types import DecoderInputs, GroundingOutput, PixelFeatures, TextFeatures

TRANSFORMER, CONVOLUTIONS = BODIES = ("transformer", "convolutions")
NUM_CONVOLUTIONS = 7  # of the body without a transformer (table 4.1)


class VltImages(NamedTuple):
    """The language-free part of B images. fusion: see there.  queries: relu(F_vq W_v), float [B, N_q, C]; None where not generated."""

    fusion: FusionImages
    queries: Tensor | None


class VltExtra(NamedTuple):
    """What only the criterion reads.

    mask_features: F_m of Eq. 4.7, float [E, N_q, h * w].  masked_features: the same for each sentence without one word; masked: bool [E],
    where one was taken. Both None but in training with masked words.
    """

    mask_features: Tensor
    masked_features: Tensor | None = None
    masked: Tensor | None = None


class ImagePart(nn.Module):
    """What needs no language."""

    def __init__(self, config: VltConfig, inputs: DecoderInputs) -> None:
        super().__init__()
        width, side = config.width, config.grid_side
        self.sum = GridSum(config.maps, side, width, inputs)
        self.fusion = ImageFusion(config.fusion, width)
        generated = config.body == TRANSFORMER and config.queries == GENERATED
        self.queries = ImageQueries(width, config.num_queries, side, config.coordinates) if generated else None

    def forward(self, maps: list[Tensor], pixels: PixelFeatures, clip: Tensor | None = None) -> VltImages:
        """Do the language-free work of B images once; the image encoder's own `maps` are not read.

        clip: int64 [B], the clip of each image where they are frames of videos: the frames of a clip then have the same queries.
        """
        visual = self.sum(pixels)
        return VltImages(self.fusion(visual), self.queries(visual, clip) if self.queries is not None else None)


class FusedEncoder(nn.Module):
    """Fusion and encoder: F_mem of E expressions, float [E, h * w, C]. The front of VLT that other decoders can stand behind."""

    def __init__(self, config: VltConfig) -> None:
        super().__init__()
        self.fusion = LanguageFusion(config.fusion, config.width)
        self.encoder = Encoder(config.width, config.num_heads, config.feedforward, config.encoder_layers)

    def forward(self, images: FusionImages, image_index: Tensor, text: TextFeatures) -> Tensor:
        """image_index: int64 [E].  text: tokens [E, L, C]."""
        return self.encoder(self.fusion(images, image_index, text))


class QueryDecoder(nn.Module):
    """Queries through the decoder and the balance: F_b of E expressions."""

    def __init__(self, config: VltConfig) -> None:
        super().__init__()
        width = config.width
        self.queries = LanguageQueries(config.queries, config.num_queries, width)
        self.layers = nn.ModuleList(DecoderLayer(width, config.num_heads, config.feedforward) for _ in range(config.decoder_layers))
        self.balance = QueryBalance(width) if config.balance else None

    def forward(
        self, visual: Tensor | None, text: TextFeatures, memory: Tensor, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return F_b, float [E, N_q, C], and A_qd, float [E, N_q, L] (None where queries are not generated).

        visual: relu(F_vq W_v) of each expression's image.  memory: F_mem, float [E, h * w, C].  kept: bool [E, L], see `LanguageQueries`.
        """
        queries = self.queries(visual, text, kept)
        responses = queries.rows
        for layer in self.layers:
            responses = layer(responses, memory, queries.allowed)
        if self.balance is not None:
            responses = self.balance(queries.rows, responses)
        if queries.allowed is not None:
            responses = responses * queries.allowed.flatten(1)[..., None]
        return responses, queries.attention


class LanguagePart(nn.Module):
    """Fuse, encode, query, decode."""

    def __init__(self, config: VltConfig, text_width: int) -> None:
        super().__init__()
        self.config = config
        width, transformer = config.width, config.body == TRANSFORMER
        self.text = nn.Linear(text_width, width)
        self.memory = FusedEncoder(config) if transformer else None
        self.decoder = QueryDecoder(config) if transformer else None
        self.fusion = None if transformer else LanguageFusion(config.fusion, width)
        self.body = nn.Sequential(*(ConvReluNorm(width, width) for _ in range(0 if transformer else NUM_CONVOLUTIONS)))
        channels = config.num_queries if transformer else width
        self.mask = MaskUpsampler(channels, config.mask_widths, 1, ConvReluNorm)
        self.heads = GrexHeads(config.heads, config.mask_widths[0], width)

    def forward(self, images: VltImages, image_index: Tensor, text: TextFeatures) -> GroundingOutput:
        """Ground E expressions. image_index: int64 [E].  text: tokens [E, L, C_text], the sentence in row 0."""
        text = TextFeatures(self.text(text.tokens), text.mask)
        side = self.config.grid_side
        if self.memory is None or self.decoder is None:
            assert self.fusion is not None
            features = self.body(self.fusion(images.fusion, image_index, text))
            extra = VltExtra(features.flatten(2))
        else:
            extra = self._queried(images, image_index, text)
            features = extra.mask_features.unflatten(2, (side, side))
        logits, first = self.mask(features)
        return dense_answer(logits, self.heads(first), extra)

    def _queried(self, images: VltImages, image_index: Tensor, text: TextFeatures) -> VltExtra:
        """Return F_m, and in training that of the sentences without one word; the encoder's output serves both."""
        assert self.memory is not None and self.decoder is not None
        config = self.config
        memory = self.memory(images.fusion, image_index, text)
        visual = images.queries[image_index] if images.queries is not None else None
        responses, attention = self.decoder(visual, text, memory)
        features = mask_features(memory, responses)
        if not (self.training and config.loss.contrastive and config.masked_words != NONE and attention is not None):
            return VltExtra(features)
        taken = mask_words(attention, text.mask, config.masked_words, config.least_words, config.word_threshold, config.end_row)
        responses, _ = self.decoder(visual, text, memory, taken.rows)
        return VltExtra(features, mask_features(memory, responses), taken.masked)


class Vlt(nn.Module):
    """See the module's docstring."""

    def __init__(self, config: VltConfig, inputs: DecoderInputs) -> None:
        super().__init__()
        if config.body not in BODIES or config.masked_words not in MASKED_WORDS:
            given = f'model.decoder.body "{config.body}", masked_words "{config.masked_words}"'
            raise fault(given, f"body of {BODIES}, masked_words of {MASKED_WORDS}", "fix the names")
        if config.masked_words != NONE and (config.body != TRANSFORMER or config.queries != GENERATED):
            given = f"model.decoder.masked_words {config.masked_words} without generated queries"
            raise fault(given, "attention to words, from which one is taken", "set masked_words to none, or queries to generated")
        self.answers_boxes = config.heads.boxes
        self.image_part = ImagePart(config, inputs)
        self.language_part = LanguagePart(config, inputs.text_width)


def mask_features(memory: Tensor, responses: Tensor) -> Tensor:
    """Return F_m = F_ve F_b^T (Eq. 4.7) times C^-1/2, float [E, N_q, h * w]. memory: [E, h * w, C].  responses: [E, N_q, C]."""
    return responses @ memory.transpose(1, 2) * memory.shape[-1] ** -0.5
