"""Entry "region_tokens" of `GENERATORS`: selected objects as tokens in front of a causal language model with LoRA adapters."""

from grex_mllm.models.generators.region_tokens.config import RegionTokensConfig as Config
from grex_mllm.models.generators.region_tokens.network import RegionTokenGenerator as Generator
from grex_mllm.models.generators.region_tokens.parts import collate, load_tokenizer, make_tokenizer

__all__ = ["Config", "Generator", "collate", "load_tokenizer", "make_tokenizer"]
