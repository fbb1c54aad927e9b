"""Search a folder of images by expressions: `open_index(model, folder).search("two people on a bench")`.

GRES paper, figure 2b: a query picks the images that contain what it says. The language-free part of each image is computed once and kept
(`store.py`); an expression goes through the language part with all of them (`scoring.py`). Public names are imported when used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Hit", "SearchIndex", "open_index"]

if TYPE_CHECKING:
    from grex_mllm.search.index import Hit, SearchIndex, open_index


def __getattr__(name: str) -> Any:
    if name in __all__:
        from grex_mllm.search import index

        return getattr(index, name)
    raise AttributeError(f"module 'grex_mllm.search' has no attribute {name!r}")
