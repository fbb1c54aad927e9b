"""Read a multimodal language model from a folder or hub id: safetensors only, without code from the net."""

from __future__ import annotations

from typing import Any

from grex_mllm.errors import fault
from grex_mllm.models.lm_config import ModelChoice
from grex_mllm.models.lm_loading import read_model


def load_multimodal(choice: ModelChoice) -> Any:
    """Return the model in evaluation mode, on the device and in the precision of the current placement.

    Raises:
        GrexError: a model that cannot be had or takes no pictures; an unknown dtype or quantisation; bitsandbytes missing.
    """
    from transformers import AutoModelForImageTextToText

    model = read_model(choice, AutoModelForImageTextToText, _check, safetensors=True)
    model.eval()
    return model


def language_part(model: Any) -> Any:
    """Return the language model inside a multimodal one, without its output layer."""
    inner = model.model
    return getattr(inner, "language_model", None) or inner.text_model


def _check(name: str, config: Any) -> None:
    if getattr(config, "vision_config", None) is None:
        raise fault(
            f"model {name} of type {config.model_type}, which takes no pictures",
            "a multimodal language model",
            "name one, such as Qwen2.5-VL-7B-Instruct",
        )
