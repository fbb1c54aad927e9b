"""A model behind an OpenAI-compatible server, as a backend of zero-shot prediction."""

from __future__ import annotations

from collections.abc import Iterator

from grex_mllm.predictors.protocol import Answer
from grex_mllm.zeroshot.base import Conversation
from grex_mllm.zeroshot.server.settings import ServerSettings


class Server:
    """Answers requests by POST {base_url}/chat/completions; see `Backend`.

    name: the model's.  Its generators run in the caller's thread; requests go out in `settings.concurrency` threads.
    """

    def __init__(self, model: str, base_url: str, settings: ServerSettings) -> None:
        settings.check()
        self.name, self.base_url, self.settings = model, base_url.rstrip("/"), settings

    def fingerprint(self) -> str:
        """Name server, model, revision and every setting that decides what is sent."""
        s = self.settings
        return f"{self.base_url} {self.name} {s.revision} {s.structured} {s.detail} {s.top_logprobs} {sorted(s.body.items())} {s.omit}"

    def view(self, width: int, height: int) -> tuple[int, int] | None:
        """Return None: a server does not tell which size its model sees."""
        return None

    def hold(self, conversations: Iterator[Conversation]) -> Iterator[Answer]:
        """Hold every conversation to its end; see `Backend.hold`."""
        raise AssertionError("under construction")

    def remarks(self) -> list[str]:
        """Return lines about the run so far."""
        return []
