"""What a pre-training consists of: stages that run before the joint training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Progress = Callable[[float, Any], None]  # share done in [0, 1], and a number or text to show beside it


@dataclass(frozen=True)
class Stage:
    """One stage. steps: of an optimizer.  run(model, steps, progress): train the model in place; `progress` is called after each step."""

    name: str
    steps: int
    run: Callable[[Any, int, Progress], object]
