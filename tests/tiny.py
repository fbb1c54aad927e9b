"""Tiny random models for tests, built from configuration alone."""

from __future__ import annotations

from pathlib import Path

import torch

from grex_mllm.config import Config, load_config
from grex_mllm.entries import entry
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.lm_tokenizer import train_sentencepiece
from grex_mllm.models.text import train_text_tokenizer

WORDS = ["the red circle on the left", "two blue squares and a star", "all shapes except the largest one", "people in white", "green"]


def tiny_config(**changes: object) -> Config:
    """A model of a few thousand parameters with the decoder `instance_selection`; changes: dotted fields with __ for the dots."""
    fields = {
        "model.vision.name": "resnet", "model.vision.block": "basic", "model.vision.stem": "conv3", "model.vision.norm": "group",
        "model.vision.stem_width": 8, "model.vision.widths": [8, 16, 16, 16], "model.vision.depths": [1, 1, 1, 1],
        "model.vision.coordinates": "true",
        "model.text.vocab_size": 300, "model.text.hidden_size": 16, "model.text.num_layers": 1, "model.text.num_heads": 2,
        "model.text.intermediate_size": 32, "model.text.max_positions": 64, "model.text.dropout": 0.0, "model.text.tokenizer": "train",
        "model.pixel_decoder.name": "fpn", "model.pixel_decoder.width": 16, "model.pixel_decoder.mask_width": 16,
        "model.decoder.name": "instance_selection", "model.decoder.width": 16, "model.decoder.num_heads": 2,
        "model.decoder.feedforward": 32,
        "model.decoder.minimap_side": 6, "model.decoder.kept_regions": 8, "model.decoder.roi_channels": 8, "model.decoder.roi_size": 3,
        "data.image_size": 64,
    }  # fmt: skip
    decoder = str(changes.get("model__decoder__name", "instance_selection"))
    known = vars(entry("model.decoder", decoder).Config())
    fields = {name: value for name, value in fields.items() if not name.startswith("model.decoder.") or name.split(".")[2] in known}
    fields |= {name.replace("__", "."): value for name, value in changes.items()}
    return load_config(None, [f"--{name}={value}" for name, value in fields.items()])


def tiny_model(seed: int = 0, **changes: object) -> GrexModel:
    """A random grounding model in evaluation mode that finds something (its biases are shifted so that answers are not all empty)."""
    torch.manual_seed(seed)
    config = tiny_config(**changes)
    tokenizer = train_text_tokenizer(WORDS, config.model.text.vocab_size)
    config.model.text.vocab_size = tokenizer.vocab_size
    model = GrexModel(config, tokenizer).eval()
    with torch.no_grad():
        head = model.grounding.decoder.language_part.no_target[2]
        head.bias.copy_(torch.tensor([2.0, -2.0]))
        model.grounding.decoder.language_part.target.bias.fill_(0.5)
    return model


def tiny_speaker(work: Path) -> GrexModel:
    """`tiny_model` with a random generator that says six tokens; its tokenizer is written into the folder `work`."""
    config = tiny_config(model__generator__lm="tiny", model__generator__hidden_size=16, model__generator__num_heads=2,
                         model__generator__num_layers=1, model__generator__intermediate_size=32, model__generator__projector_width=16,
                         model__generator__max_new_tokens=6)  # fmt: skip
    text = train_text_tokenizer(WORDS, 300)
    config.model.text.vocab_size = text.vocab_size
    model = GrexModel(config, text, train_sentencepiece(WORDS * 5, work, 300)).eval()
    model.grounding.load_state_dict(tiny_model().grounding.state_dict())
    return model
