"""Build the networks from the configuration. DECODERS is the plug-in table: name -> "module:class", imported when asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from grex_mllm.errors import fault

if TYPE_CHECKING:
    from grex_mllm.config import DecoderConfig, ModelConfig
    from grex_mllm.models.grounding import GroundingModel

DECODERS: dict[str, str] = {
    "rela": "grex_mllm.models.decoders.rela:Rela",
    "instance_selection": "grex_mllm.models.decoders.instance_selection:InstanceSelection",
}


def build_decoder(config: DecoderConfig, width: int, mask_width: int, text_width: int) -> Any:
    """Build an entry of DECODERS.

    width, mask_width: channels of the pixel decoder's levels and mask features.  text_width: channels of a text token.

    Raises:
        GrexError: no such entry.
    """
    if config.name not in DECODERS:
        raise fault(f'model.decoder.name "{config.name}"', f"one of {sorted(DECODERS)}", "fix the name")
    module, _, name = DECODERS[config.name].partition(":")
    kind = getattr(importlib.import_module(module), name)
    return kind(config, width, mask_width, text_width)


def build_grounding(config: ModelConfig) -> GroundingModel:
    """Build the grounding model with random or configured weights.

    Raises:
        GrexError: a name or size that does not fit.
    """
    from grex_mllm.models.grounding import GroundingModel
    from grex_mllm.models.pixel_decoder import build_pixel_decoder
    from grex_mllm.models.text import TextEncoder
    from grex_mllm.models.vision import build_vision

    text = TextEncoder(config.text)
    vision: Any = build_vision(config.vision, text.width)
    if config.decoder.name == "rela" and config.decoder.ria == "hard_split":
        from grex_mllm.models.hard_split import HardSplit

        vision = HardSplit(vision, config.decoder.minimap_side)
    pixel_decoder: Any = build_pixel_decoder(config.pixel_decoder, vision.channels)
    decoder = build_decoder(config.decoder, pixel_decoder.width, pixel_decoder.mask_width, text.width)
    return GroundingModel(vision, text, pixel_decoder, decoder)
