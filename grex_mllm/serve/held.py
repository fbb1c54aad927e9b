"""The pictures that a server holds: at most N, each for a while, under names that nobody guesses."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grex_mllm.dialogue.session import Dialogue
from grex_mllm.errors import fault
from grex_mllm.models.answer import EncodedImage
from grex_mllm.serve.limits import IDLE_S


@dataclass
class Held:
    """One picture, encoded.  objects: bool [N, H, W], proposed by the model, with boxes_xyxy.  given: (width, height) of the upload.

    talk: a session in which nothing was said, to be forked.  dialogues: sessions by all that was selected and said in them, so equal
    histories of several people share one and different ones never meet.
    """

    name: str
    encoded: EncodedImage
    talk: Dialogue
    pixels: np.ndarray
    objects: np.ndarray
    boxes_xyxy: list[list[float]]
    given: tuple[int, int]
    proposes: bool
    dialogues: OrderedDict[Any, Dialogue] = field(default_factory=OrderedDict)
    used: float = field(default_factory=time.monotonic)


class Pictures:
    """Pictures by name, the least recently used forgotten first. Safe to use from several threads."""

    def __init__(self, limit: int, idle_s: float = IDLE_S) -> None:
        self._limit, self._idle_s = limit, idle_s
        self._held: OrderedDict[str, Held] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._held)

    def add(self, picture: Held) -> None:
        """Hold a picture, and forget the one that was not used for longest where there are too many."""
        with self._lock:
            self._held[picture.name] = picture
            self._held.move_to_end(picture.name)
            while len(self._held) > self._limit:
                self._held.popitem(last=False)

    def find(self, name: str) -> Held | None:
        """Return a picture, or None where it is not held."""
        now = time.monotonic()
        with self._lock:
            for old in [key for key, held in self._held.items() if now - held.used > self._idle_s]:
                del self._held[old]
            held = self._held.get(name)
            if held is not None:
                held.used = now
                self._held.move_to_end(name)
            return held

    def get(self, name: str) -> Held:
        """Return a picture.

        Raises:
            GrexError: it was forgotten, or never there.
        """
        held = self.find(name)
        if held is None:
            raise fault(
                "a picture that this server does not hold (any more)",
                f"one of its last {self._limit}, used within the hour",
                "open it again",
            )
        return held


def new_name() -> str:
    """Return a name that nobody guesses: who knows it may see the picture."""
    return secrets.token_urlsafe(18)
