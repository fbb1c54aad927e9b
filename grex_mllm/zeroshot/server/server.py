"""A model behind an OpenAI-compatible server, as a backend of zero-shot prediction."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator

from grex_mllm.errors import fault
from grex_mllm.predictors.protocol import Answer
from grex_mllm.zeroshot.base import Conversation, RawAnswer, Request
from grex_mllm.zeroshot.server.address import Key, check_address
from grex_mllm.zeroshot.server.batch_files import BatchWriter, Results, read_batch
from grex_mllm.zeroshot.server.calling import Abandoned, Caller
from grex_mllm.zeroshot.server.holding import Holding
from grex_mllm.zeroshot.server.settings import ServerSettings
from grex_mllm.zeroshot.server.store import Store
from grex_mllm.zeroshot.server.tally import Tally


class Server:
    """Answers requests by POST {base_url}/chat/completions; see `Backend`.

    name: the model's, as the server knows it.  base_url: such as http://localhost:8000/v1.

    Raises:
        GrexError: settings, an address or a key that cannot be meant; a cache that cannot be used.
    """

    def __init__(self, model: str, base_url: str, settings: ServerSettings) -> None:
        settings.check()
        self.name, self.settings = model, settings
        self.base_url = check_address(base_url, settings.allow_http)
        self.key = Key(settings.key_env)
        self.tally = Tally(settings)
        self.caller = Caller(model, self.base_url, settings, self.key, self.tally)
        self.store = None if settings.cache is None else Store(settings.cache)
        self._results = None if settings.batch_read is None else Results(settings.batch_read)
        self._writer = None if settings.batch_write is None else self._batch_writer(settings.batch_write)
        self._told = time.monotonic()

    def _batch_writer(self, folder: str) -> BatchWriter:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise fault("batch_write in several processes", "one process: nothing is waited for", "start it without torchrun")
        sizes = {"most_bytes": self.settings.batch_max_bytes, "most_lines": self.settings.batch_max_lines}
        return BatchWriter(folder, self._known, self.request_key, self.caller.body, **sizes)

    def close(self) -> None:
        """End the run; the server is not asked after that.

        Raises:
            GrexError: with `batch_write`, how to go on when everything is written.
        """
        self.caller.close()
        if self.store is not None:
            self.store.close()
        if self._writer is not None:
            self._writer.close()

    def fingerprint(self) -> str:
        """Name server, model, revision and every setting that decides what is sent."""
        batch = {"how": "batch"} if self.settings.batch_read or self.settings.batch_write else {}
        return json.dumps({**self._identity(), **batch}, sort_keys=True)

    def _identity(self) -> dict[str, object]:
        s = self.settings
        sent = {"structured": s.structured, "detail": s.detail, "top_logprobs": s.top_logprobs, "body": s.body, "omit": sorted(s.omit)}
        return {"server": self.base_url, "model": self.name, "revision": s.revision, **sent}

    def _known(self, key: str) -> RawAnswer | None:
        known = None if self.store is None else self.store.get(key)
        if known is not None:
            self.tally.reuse()
        return known

    def view(self, width: int, height: int) -> tuple[int, int] | None:
        """Return None: a server does not tell which size its model sees."""
        return None

    def request_key(self, request: Request) -> str:
        """Return the SHA-256 of server, model and revision, rendered request with pictures by their digest, sampling, schema and sample."""
        text = json.dumps([self._identity(), request.content()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def hold(self, conversations: Iterator[Conversation]) -> Iterator[Answer]:
        """Hold every conversation to its end; see `Backend.hold`.

        No more than `concurrency` requests are under way, over all calls of this method together. Closing the iterator stops at once.

        Raises:
            GrexError: what stops all: a refused key, a spent budget or quota, a server that is not there, a damaged cache. Answers that
                are complete are yielded before. With `batch_write` nothing is answered, and `close` raises.
        """
        if self._writer is not None:
            self._writer.take(conversations)
            return
        if self._results is not None:
            yield from read_batch(conversations, self._batch_answer)
            return
        holding = Holding(self._answer, self.settings.concurrency)
        try:
            for answer in holding.run(conversations):
                self._progress()
                yield answer
        finally:
            if self.store is not None:
                self.store.settle()

    def _answer(self, request: Request, stop: threading.Event) -> RawAnswer:
        """Return the answer of a request, out of the store where it is there."""
        if stop.is_set():
            raise Abandoned
        key = self.request_key(request)
        known = self._known(key)
        if known is not None:
            return known
        answer = self.caller.answer(request, stop)
        self._keep(key, answer)
        return answer

    def _keep(self, key: str, answer: RawAnswer) -> None:
        if self.store is not None and answer.finish != "error":
            self.store.put(key, self.name, answer)

    def _batch_answer(self, request: Request) -> RawAnswer:
        """Return what came back for a request; a batch's tokens are paid when they are first read."""
        assert self._results is not None
        key = self.request_key(request)
        known = self._known(key)
        if known is not None:
            return known
        answer = self.caller.hidden(self._results.answer(key, request))
        self.tally.collect(answer)
        self._keep(key, answer)
        return answer

    def _progress(self) -> None:
        now = time.monotonic()
        if self.settings.progress_s and now - self._told >= self.settings.progress_s:
            self._told = now
            print(*self.tally.lines(), sep="\n", file=sys.stderr, flush=True)

    def remarks(self) -> list[str]:
        """Return lines about the run so far: calls, cached answers, tries, tokens, cost, rate, and what the server refused to take."""
        return [*self.tally.lines(), *self.caller.notes]
