"""What the configurations of all generators on a pre-trained model have in common: the model, and its adapters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ModelChoice:
    """Which model is read, and how. lm: a folder or hub id."""

    lm: str = ""
    dtype: str = "auto"  # of the frozen base: auto | float32 | bfloat16 | float16; auto: what is computed in (bfloat16 under bf16)
    quantisation: str = "none"  # none | nf4 | int8 (bitsandbytes)
    attn_implementation: str = "auto"  # auto | sdpa | eager | flash_attention_2; auto: sdpa where the family can (Gemma 2 cannot)


@dataclass
class AdaptedConfig(ModelChoice):
    """A frozen model with LoRA adapters; rank 0 = none."""

    gradient_checkpointing: bool = False
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: str | list[str] = "auto"  # names of linear layers; auto: all of attention and MLP, as the model calls them
    lora_rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    lora_dora: bool = False  # learn the length of each weight column apart from its direction
