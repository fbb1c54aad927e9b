"""What passes between the parts of zero-shot prediction.

A question becomes a conversation: a generator that yields the requests it needs (all of one round at a time), is sent the raw answers in
the same order, and returns the protocol's `Answer`. A backend (a local model, a server, files of a batch API) holds conversations: it
decides how many run side by side and how their requests are batched. So every way of asking (once, twice, k samples) works with every one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from grex_mllm.predictors.protocol import Answer

FINISHES = ("stop", "length", "content_filter", "refusal", "error")


@dataclass(frozen=True)
class View:
    """A picture as the model saw it: size of the original, and of the picture that was finally sent to the model (pixels, no padding)."""

    width: int
    height: int
    sent_width: int
    sent_height: int


@dataclass(frozen=True, eq=False)
class Picture:
    """pixels: uint8 [H, W, 3] RGB at original size, upright; marks may be drawn on it."""

    pixels: np.ndarray

    @cached_property
    def digest(self) -> str:
        """SHA-256 of size and pixels."""
        return hashlib.sha256(f"{self.pixels.shape}".encode() + np.ascontiguousarray(self.pixels).tobytes()).hexdigest()


@dataclass(frozen=True)
class Turn:
    """One message of a chat. role: system, user or assistant.  parts: texts and pictures, pictures first."""

    role: str
    parts: tuple[str | Picture, ...]


@dataclass(frozen=True)
class Request:
    """One call of a model.

    key: of the question, with the step of its conversation ("<key>#locate"); unique in a run.
    turns: the chat, system turn first where there is one.  max_tokens: of the answer.
    temperature, top_p, seed: of the sampling; temperature 0 = greedy.  sample: number of this sample, where one request is asked k times.
    schema: JSON schema of the answer, for servers that offer structured output; None = free text.
    choices: words whose probability as the first token is wanted ("yes", "no"); the answer's `choice_probs` then holds them.
    """

    key: str
    turns: tuple[Turn, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    sample: int = 0
    schema: dict[str, Any] | None = None
    choices: tuple[str, ...] = ()

    def content(self) -> dict[str, Any]:
        """Return all that decides the answer, but for the model: JSON with pictures by their digest, without `key`."""
        turns = [[t.role, [p if isinstance(p, str) else {"picture": p.digest} for p in t.parts]] for t in self.turns]
        sampling = [self.max_tokens, self.temperature, self.top_p, self.seed, self.sample]
        return {"turns": turns, "sampling": sampling, "schema": self.schema, "choices": list(self.choices)}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `content`."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()


@dataclass
class RawAnswer:
    """What came back, untouched.

    text: of the answer; None where there is none.  finish: one of FINISHES.  refusal: what the protocol's refusal field says.
    usage: "prompt_tokens", "completion_tokens", "cached_tokens" as far as known.  sent: width and height of the picture that the model saw,
    None = unknown (then the family's own rule).  choice_probs: word -> probability, where asked.  error: why there is no answer.
    seconds: of the call.  cost: of the call, by prices that the user gave.  cached: it came out of the store, and cost nothing now.
    """

    text: str | None
    finish: str = "stop"
    refusal: str | None = None
    usage: dict[str, int] = field(default_factory=dict)
    sent: tuple[int, int] | None = None
    choice_probs: dict[str, float] | None = None
    error: str | None = None
    seconds: float = 0.0
    cost: float = 0.0
    cached: bool = False

    def fields(self) -> dict[str, Any]:
        """Return what a prediction line keeps of it: every field that is set."""
        return {name: value for name, value in vars(self).items() if value not in (None, {}, False, 0.0)}


Conversation = Generator[list[Request], list[RawAnswer], Answer]


class Backend(Protocol):
    """A model that answers requests.

    name: as it stands in a result's name.  remarks: lines to print after a run (rate, tokens, cost).
    """

    name: str

    def fingerprint(self) -> str:
        """Name all that decides the answers: model and revision, server, precision."""

    def view(self, width: int, height: int) -> tuple[int, int] | None:
        """Return the size of the picture that the model sees of an original of this size; None = unknown: the family's rule holds."""

    def hold(self, conversations: Iterator[Conversation]) -> Iterator[Answer]:
        """Hold every conversation to its end and yield what it returns, in any order. Takes new ones only when it has room.

        A request that fails for good gets a `RawAnswer` with finish "error"; only a stop for all (a spent budget, a refused key) raises.
        """

    def remarks(self) -> list[str]:
        """Return lines about the run so far: calls, tokens, cost, rate."""
