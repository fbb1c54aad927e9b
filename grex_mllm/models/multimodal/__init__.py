"""Multimodal language models of transformers: reading them, asking them with pictures, and letting them answer."""

from grex_mllm.models.lm_config import ModelChoice
from grex_mllm.models.multimodal.chat import Chat
from grex_mllm.models.multimodal.loading import load_multimodal
from grex_mllm.models.multimodal.task_words import TaskWords, load_chat

__all__ = ["Chat", "ModelChoice", "TaskWords", "load_chat", "load_multimodal"]
