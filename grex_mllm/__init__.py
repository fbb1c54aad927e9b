"""Generalized referring expressions: masks, boxes and counts from an expression, and one expression for a set of objects.

The public names are imported when they are first used, so that `import grex_mllm` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Dialogue", "GrexModel", "__version__", "load_config", "metrics"]

if TYPE_CHECKING:
    from grex_mllm import metrics
    from grex_mllm.config import load_config
    from grex_mllm.dialogue.session import Dialogue
    from grex_mllm.models.grex import GrexModel

_HOMES = {"Dialogue": "grex_mllm.dialogue.session", "GrexModel": "grex_mllm.models.grex", "load_config": "grex_mllm.config"}


def __getattr__(name: str) -> Any:
    if name == "metrics":
        return import_module("grex_mllm.metrics")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'grex_mllm' has no attribute {name!r}")
