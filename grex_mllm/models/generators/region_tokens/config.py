"""The knobs of the region-token generator."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RegionTokensConfig:
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
    # how a folder or hub LLM is loaded
    dtype: str = "auto"  # of the frozen base: auto | float32 | bfloat16 | float16; auto: what is computed in (bfloat16 under bf16)
    quantisation: str = "none"  # none | nf4 | int8 (bitsandbytes)
    attn_implementation: str = "auto"  # auto | sdpa | eager | flash_attention_2; auto: sdpa where the family can (Gemma 2 cannot)
    gradient_checkpointing: bool = False
    # adapters; rank 0 = none
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: str | list[str] = "auto"  # names of linear layers; auto: all of attention and MLP, as the model calls them
    lora_rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    lora_dora: bool = False  # learn the length of each weight column apart from its direction
    # region tokens
    projector_width: int = 256
    image_grid: int = 2  # image tokens = image_grid squared; 0 = none
    distractors: bool = True  # tokens for the objects that are not selected
    max_distractors: int = 16  # the largest ones
    distractor_dropout: float = 0.0  # share of training sets that hide them: in use, the other objects may be unknown
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
