"""Multimodal language models of transformers: reading them, asking them with pictures, and letting them answer."""

from grex_mllm.models.lm_config import ModelChoice
from grex_mllm.models.multimodal.chat import Chat
from grex_mllm.models.multimodal.loading import load_multimodal

__all__ = ["Chat", "ModelChoice", "load_multimodal"]
