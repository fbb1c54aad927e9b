"""The best validation of a run: which one it is, when to stop, and the model folder `best` beside the checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grex_mllm.config import ValidationConfig
from grex_mllm.writing import whole_folder

FOLDER, NUMBERS = "best", "validation.json"


@dataclass
class Best:
    """The best validation so far. what: on which subset by which metric; another one begins anew.

    value, step: of the best, None and 0 before the first.  without_gain: validations since then.
    """

    what: dict[str, Any]
    value: float | None = None
    step: int = 0
    without_gain: int = 0

    @classmethod
    def of(cls, config: ValidationConfig) -> Best:
        """Return the state before the first validation."""
        return cls({"split": config.split, "images": config.images, "metric": config.metric})

    def take(self, value: float, step: int, higher_is_better: bool) -> bool:
        """Take in a value; tell whether it is the best. What is no number is never the best."""
        gain = value == value and (self.value is None or (value > self.value if higher_is_better else value < self.value))
        if gain:
            self.value, self.step = value, step
        self.without_gain = 0 if gain else self.without_gain + 1
        return gain

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take over a state of the same subset and metric; any other is left."""
        if state is not None and state["what"] == self.what:
            self.value, self.step, self.without_gain = state["value"], state["step"], state["without_gain"]

    def exhausted(self, patience: int) -> bool:
        """Tell whether `patience` validations in a row brought no gain; 0 = never."""
        return 0 < patience <= self.without_gain


def write_best(save_model: Callable[[Path], object], out: str | Path, step: int, values: dict[str, float]) -> None:
    """Write the model folder `best` with `validation.json` (the step and its numbers), whole or not at all."""
    with whole_folder(Path(out) / FOLDER) as folder:
        save_model(folder)
        (folder / NUMBERS).write_text(json.dumps({"step": step, **values}, indent=1), encoding="utf-8")
