"""The knobs of the region-token generator."""

from __future__ import annotations

from dataclasses import dataclass, field

from grex_mllm.models.generators.region_tokens.crops import CropsConfig
from grex_mllm.models.lm_config import AdaptedConfig


@dataclass
class RegionTokensConfig(AdaptedConfig):
    """The language model, its adapters, and the tokens in front of it. lm: tiny | <folder or hub id>."""

    name: str = "region_tokens"
    lm: str = "tiny"
    # sizes of the tiny Llama (lm: tiny)
    vocab_size: int = 1000  # of the sentencepiece tokenizer trained for it
    hidden_size: int = 128
    num_layers: int = 3
    num_heads: int = 4
    intermediate_size: int = 384
    max_positions: int = 512
    # region tokens
    projector_width: int = 256
    image_grid: int = 2  # image tokens = image_grid squared; 0 = none
    distractors: bool = True  # tokens for the objects that are not selected
    max_distractors: int = 16  # the largest ones
    distractor_dropout: float = 0.0  # share of training sets that hide them: in use, the other objects may be unknown
    found_share: float = 0.0  # share of training images in which the others are those that the decoder finds, as in use
    words: int = 0  # tokens that objects are shown by, those that training says most, learned from expressions alone (`words.py`); 0 = none
    word_loss: float = 3.0  # their weight
    ranks: bool = False  # show which objects come first among their kind, from each side and by size (`ranks.py`); needs words
    crops: CropsConfig = field(default_factory=CropsConfig)  # a closer look at every object, by a frozen image encoder of its own
    shape_side: int = 8  # the mask inside its box as a shape_side x shape_side picture; 0 = none
    context_layers: int = 0  # self-attention among the tokens of an object set before the LM
    attribute_classes: dict[str, int] = field(default_factory=dict)  # heads and embeddings for attributes: name -> classes; {} = none
    attribute_loss: float = 0.3  # weight of each attribute's term
    box_share: float = 0.0  # share of training images whose objects are given as boxes instead of masks
    # text
    prompt_style: str = "auto"  # auto | chat | plain; auto: chat where the tokenizer has a chat template (instruct models)
    prompt: str = ""  # instruction around the region tokens, for example "{regions} Name exactly these objects: "; empty = none, in a
    # chat one of our own (INSTRUCTION in models/lm_framing.py)
    max_expression_tokens: int = 64
    max_new_tokens: int = 40
    max_rows: int = 512  # sequences decoded at once
