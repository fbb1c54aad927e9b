"""Data that is no folder but drawn on demand: SOURCES is the table, name -> module path, imported when asked for.

A module of the table gives `export_for_prediction(config, split, length, folder)`: it writes samples as a dataset folder, or
finds them there.
"""

from __future__ import annotations

import importlib
from types import ModuleType

SOURCES: dict[str, str] = {"synthetic": "grex_mllm.data.synthetic.source"}


def find_source(name: str) -> ModuleType | None:
    """Return the module of an entry of SOURCES, or None where `name` is none and so must be a folder."""
    return importlib.import_module(SOURCES[name]) if name in SOURCES else None
