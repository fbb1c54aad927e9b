"""Entry "mllm" of `GENERATORS`: a multimodal language model that sees the image itself, with LoRA adapters in its language part."""

from grex_mllm.models.generators.mllm.config import MllmConfig as Config
from grex_mllm.models.generators.mllm.network import MllmGenerator as Generator
from grex_mllm.models.generators.mllm.parts import collate, load_tokenizer, make_tokenizer
from grex_mllm.models.generators.mllm.standing_in import stand_in_tokenizer

__all__ = ["Config", "Generator", "collate", "load_tokenizer", "make_tokenizer", "stand_in_tokenizer"]
