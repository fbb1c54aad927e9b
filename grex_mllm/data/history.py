"""Earlier expressions of a conversation before a follow-up, as one text for a text encoder that was trained so."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grex_mllm.config import DataConfig
from grex_mllm.data.sources import source_of, weighted

SEPARATOR = " | "


def joined(turns: Sequence[str], too_long: Callable[[str], bool] | None = None) -> str:
    """Return the turns as one text, the oldest left out while `too_long` says so; the last one always stays."""
    first = 0
    while too_long is not None and first < len(turns) - 1 and too_long(SEPARATOR.join(turns[first:])):
        first += 1
    return SEPARATOR.join(turns[first:])


def has_history(data: DataConfig) -> bool:
    """Tell whether a training of these sources shows follow-ups with what was said before (a source says so: `HISTORY = True`)."""
    return any(getattr(source_of(part.train), "HISTORY", False) for part in weighted(data))
