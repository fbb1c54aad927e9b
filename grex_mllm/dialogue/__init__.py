"""A conversation about one image: follow-ups refer to the objects that were selected before.

`follow_ups.py` reads what a follow-up asks for, `phrases.py` words what is left of it for a model, `objects.py` asks the model about the
objects that it found, and `session.py` composes the sets: union, difference, restriction, neighbours, complement. Public names are
imported when used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Dialogue"]

if TYPE_CHECKING:
    from grex_mllm.dialogue.session import Dialogue


def __getattr__(name: str) -> Any:
    if name in __all__:
        from grex_mllm.dialogue import session

        return getattr(session, name)
    raise AttributeError(f"module 'grex_mllm.dialogue' has no attribute {name!r}")
