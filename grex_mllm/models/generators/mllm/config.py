"""The knobs of the generator on a multimodal language model."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from grex_mllm.errors import fault
from grex_mllm.models.lm_config import AdaptedConfig

OBJECTS = ("tokens", "marks", "coordinates")
MARKS = ("numbers", "outlines")
MAPS = ("grounding", "own")


@dataclass
class MllmConfig(AdaptedConfig):
    """The model, its adapters, and how the selected objects are shown. lm: a folder or hub id of a multimodal language model."""

    name: str = "mllm"
    lm: str = ""
    # parts with adapters: language, or names of others ("visual"), as the model calls them
    lora_parts: list[str] = field(default_factory=lambda: ["language"])
    # pictures
    min_pixels: int = 0  # of the picture that the model sees (Qwen-VL families); 0: as its folder says
    max_pixels: int = 0
    max_tiles: int = 0  # of families that cut the picture (InternVL); 0: as its folder says
    crops: int = 0  # pictures of single selected objects after the whole one, at most
    # the selected objects
    objects: str = "tokens"  # tokens (embeddings in the sequence) | marks (drawn on the picture) | coordinates (in the text)
    mark_style: str = "numbers"  # of marks: numbers | outlines
    frame: str = "auto"  # of coordinates, see ops/frames.py; auto: the family's own
    maps: str = "grounding"  # of tokens, pooled from: grounding (the image encoder of the grounding model) | own (the model's own tokens)
    projector_width: int = 256
    distractors: bool = True  # tokens for the objects that are not selected
    max_distractors: int = 16  # the largest ones
    distractor_dropout: float = 0.0  # share of training sets that hide them
    shape_side: int = 8  # the mask inside its box as a shape_side x shape_side picture; 0 = none
    context_layers: int = 0  # self-attention among the tokens of an object set
    # text
    system: str = ""  # system turn; empty: none of our own
    # instruction: a name of eval/prompts/generator, a .yaml file, or a text with {objects} once ("{objects} Name exactly these.");
    # empty: the file named like the way to show objects
    prompt: str = ""
    max_expression_tokens: int = 64
    max_new_tokens: int = 40
    max_rows: int = 32  # sequences decoded at once

    def __post_init__(self) -> None:
        for name, known in (("objects", OBJECTS), ("mark_style", MARKS), ("maps", MAPS)):
            if getattr(self, name) not in known:
                raise fault(f'model.generator.{name} "{getattr(self, name)}"', f"one of {', '.join(known)}", "fix the value")
        named = re.fullmatch(r"[\w.-]*", self.prompt) or self.prompt.endswith((".yaml", ".yml"))
        if not named and self.prompt.count("{objects}") != 1:
            raise fault(f"model.generator.prompt {self.prompt!r}", "{objects} once, where the objects are named", "fix the prompt")
