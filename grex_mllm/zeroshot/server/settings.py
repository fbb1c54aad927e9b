"""What a user can set about a server: every number and name that the other files of this folder read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from grex_mllm.errors import fault

STRUCTURED = ("response_format", "structured_outputs", "off")
DETAILS = ("", "auto", "low", "high")
POSITIVE = ("concurrency", "connect_timeout_s", "read_timeout_s", "total_timeout_s", "tries", "batch_max_bytes", "batch_max_lines")


@dataclass(frozen=True)
class ServerSettings:
    """How an OpenAI-compatible server is asked.

    Who: key_env: environment variable that holds the key; the key is given nowhere else. Where it is not set, none is sent.
    revision: of the model, as far as you know it; part of the fingerprint and of the cache's keys.
    allow_http: permit http:// to another machine; the key and the pictures then travel readable.

    What is sent: structured: how a JSON schema goes out: "response_format" (OpenAI, vLLM, llama.cpp), "structured_outputs" (vLLM's own),
    "off" (left out).  detail: of pictures, where the server knows it ("", "auto", "low", "high"; "" = not sent).
    top_logprobs: how many first tokens are asked for where a request wants the probabilities of words.
    body: further fields, such as {"chat_template_kwargs": {"enable_thinking": false}} or, for vLLM, {"repetition_penalty": 1.0}.
    omit: fields left out ("seed", "top_p", ...) because the server refuses them.

    When: concurrency: requests under way at the same time.  connect_timeout_s, read_timeout_s: of one connection, of a silence (a server
    that does not stream is silent until its answer is complete).  total_timeout_s: of one try, however slowly it trickles in.
    tries: of one request before it ends with an error.  backoff_s, backoff_cap_s: first and longest pause between tries, doubled each time,
    with jitter.  max_wait_s: a server that asks for a longer pause than this stops the run.  unreachable_s: how long a server that takes no
    connection is waited for before the run stops.  stop_after_errors: so many requests in a row that end with an error stop the run
    (0 = never).  progress_s: seconds between two lines of progress (0 = none).

    Limits of one run: budget_calls (tries included), budget_tokens (prompt and answer), budget_cost (in the unit of the prices); None =
    none. Each of several processes that share a run gets an equal part.  price_in, price_cached, price_out: per million tokens;
    price_cached None = price_in.

    Files: cache: SQLite file of answers; the same request is never paid twice. None = no cache.
    batch_write: folder to write the requests to instead of sending them.  batch_read: folder whose results are the answers.
    batch_max_bytes, batch_max_lines: of one file of requests.
    """

    key_env: str = "OPENAI_API_KEY"
    revision: str = ""
    allow_http: bool = False
    structured: str = "response_format"
    detail: str = ""
    top_logprobs: int = 20
    body: dict[str, Any] = field(default_factory=dict)
    omit: tuple[str, ...] = ()
    concurrency: int = 8
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 300.0
    total_timeout_s: float = 600.0
    tries: int = 6
    backoff_s: float = 0.5
    backoff_cap_s: float = 30.0
    max_wait_s: float = 600.0
    unreachable_s: float = 300.0
    stop_after_errors: int = 50
    progress_s: float = 30.0
    budget_calls: int | None = None
    budget_tokens: int | None = None
    budget_cost: float | None = None
    price_in: float = 0.0
    price_cached: float | None = None
    price_out: float = 0.0
    cache: str | None = None
    batch_write: str | None = None
    batch_read: str | None = None
    batch_max_bytes: int = 190_000_000
    batch_max_lines: int = 50_000

    def check(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            GrexError: a number out of range, an unknown word, a budget of money without prices, two ways of batch files at once.
        """
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            least = 1 if f.name in POSITIVE and isinstance(value, int) else 0
            if not math.isfinite(value) or value < least or (value == 0 and f.name in POSITIVE):
                raise fault(f"{f.name} {value}", "at least 1" if least else "a finite number from 0 on", "change it")
        for name, value, known in (("structured", self.structured, STRUCTURED), ("detail", self.detail, DETAILS)):
            if value not in known:
                raise fault(f'{name} "{value}"', f"one of {', '.join(repr(word) for word in known)}", "fix it")
        if not 1 <= self.top_logprobs <= 20:
            raise fault(f"top_logprobs {self.top_logprobs}", "1 to 20, which is as many as servers give", "change it")
        if self.budget_cost is not None and not (self.price_in or self.price_out):
            raise fault(f"budget_cost {self.budget_cost} without prices", "price_in and price_out, per million tokens", "give them")
        if self.batch_write and self.batch_read:
            raise fault("batch_write and batch_read", "one of them at a time", "write first, read what came back in a second run")
