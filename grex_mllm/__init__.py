"""Generalized referring expressions: masks, boxes and counts from an expression, and one expression for a set of objects.

The public names are imported when they are first used, so that `import grex_mllm` needs no torch.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Dialogue", "GrexModel", "__version__", "load_config", "metrics"]

if TYPE_CHECKING:
    from grex_mllm import metrics
    from grex_mllm.config import load_config
    from grex_mllm.dialogue.session import Dialogue
    from grex_mllm.models.grex import GrexModel

# Linux: torch asks for huge pages for its larger tensors. On a CPU, memory that is asked for anew is otherwise mapped and cleared 4 KiB at
# a time, a seventh of the time of grounding at 480 px. Read by torch when it first makes a tensor; "0" turns it off.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_HOMES = {"Dialogue": "grex_mllm.dialogue.session", "GrexModel": "grex_mllm.models.grex", "load_config": "grex_mllm.config"}


def __getattr__(name: str) -> Any:
    if name == "metrics":
        return import_module("grex_mllm.metrics")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'grex_mllm' has no attribute {name!r}")
