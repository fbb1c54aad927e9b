"""Build the networks from the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grex_mllm.entries import entry
from grex_mllm.errors import fault

if TYPE_CHECKING:
    from grex_mllm.config import ModelConfig
    from grex_mllm.models.grounding import GroundingModel


def build_grounding(config: ModelConfig) -> GroundingModel:
    """Build the grounding model with random or configured weights.

    Raises:
        GrexError: a name or size that does not fit.
    """
    from torch import nn

    from grex_mllm.models.grounding import GroundingModel
    from grex_mllm.models.norms import BATCH, map_norms
    from grex_mllm.models.pixel_decoder import build_pixel_decoder
    from grex_mllm.models.text import TextEncoder
    from grex_mllm.models.vision import build_vision
    from grex_mllm.models.words import WordEncoder
    from grex_mllm.types import DecoderInputs

    if config.text.name not in ("bert", "bigru"):
        raise fault(f'model.text.name "{config.text.name}"', "bert or bigru", "fix the name")
    text = WordEncoder(config.text) if config.text.name == "bigru" else TextEncoder(config.text)
    vision: Any = build_vision(config.vision, text.width)
    with map_norms(config.map_norm):
        pixel_decoder: Any = build_pixel_decoder(config.pixel_decoder, vision.channels)
        inputs = DecoderInputs(tuple(vision.channels), pixel_decoder.width, pixel_decoder.mask_width, text.width)
        decoder = entry("model.decoder", config.decoder.name).Decoder(config.decoder, inputs)
    parts = (*pixel_decoder.modules(), *decoder.modules())
    if config.map_norm == BATCH and not any(isinstance(part, nn.BatchNorm2d) for part in parts):
        given = f"model.map_norm is batch with {config.pixel_decoder.name} and {config.decoder.name}"
        raise fault(given, "a pixel decoder or decoder with maps that it normalises", "set model.map_norm to group")
    if hasattr(vision, "leave_out"):
        vision.leave_out(getattr(pixel_decoder, "unread_maps", 0))
    return GroundingModel(vision, text, pixel_decoder, decoder)
