"""Signals that ask a training to stop: it finishes its step, saves a checkpoint and ends with status 0."""

from __future__ import annotations

import signal
import threading
from typing import Any, Self

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))  # Windows has no SIGUSR1


class Interrupts:
    """Within a `with` block, remember the first of SIGTERM and SIGUSR1 (what SLURM's --signal=USR1 sends) instead of ending.

    number: of the signal that came, 0 = none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread do it
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, _: object) -> None:
        self.number = self.number or number


def ignore_signals(_: int = 0) -> None:
    """Leave the signals to the training process; for its loader workers, which the scheduler's signal reaches, too."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def name_of(number: int) -> str:
    """Return the name of a signal."""
    return signal.Signals(number).name
