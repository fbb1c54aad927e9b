"""One request's way to its answer: tries, pauses, what a server refuses, and when the whole run has to stop."""

from __future__ import annotations

import json
import logging
import random
import ssl
import sys
import threading
import time
from typing import Any

import httpx2

from grex_mllm.errors import GrexError, fault
from grex_mllm.zeroshot.base import RawAnswer, Request
from grex_mllm.zeroshot.server.address import Key, is_loopback
from grex_mllm.zeroshot.server.bodies import Pictures, body_of
from grex_mllm.zeroshot.server.faults import Verdict, judge
from grex_mllm.zeroshot.server.settings import ServerSettings
from grex_mllm.zeroshot.server.tally import Tally

MOST_BYTES = 32 * 2**20


class Unreachable(Exception):
    """The server takes no connection: no fault of the request."""


class Abandoned(Exception):
    """The run is being stopped: the request has no answer, and was not answered with an error either."""


class Caller:
    """Sends requests from many threads.

    address: of the server, checked.  stop: set when the run ends; pauses then end at once.
    """

    def __init__(self, model: str, address: str, settings: ServerSettings, key: Key, tally: Tally) -> None:
        self.model, self.address, self.settings, self.key, self.tally = model, address, settings, key, tally
        self.pictures = Pictures()
        self.adapted: dict[str, str] = {}
        self.notes: list[str] = []
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(settings.concurrency)
        self._not_before = 0.0
        self._down_since: float | None = None
        self._reached = False
        timeout = httpx2.Timeout(settings.read_timeout_s, connect=settings.connect_timeout_s, pool=None)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=settings.concurrency)
        for name in ("httpx2", "httpcore2"):  # at level DEBUG they write down headers, in which a server may echo the key
            logging.getLogger(name).setLevel(logging.WARNING)
        # No proxy stands between this machine and itself; a redirect would carry the key to where nobody meant it to go.
        local = is_loopback(httpx2.URL(address).host)
        self._client = httpx2.Client(timeout=timeout, limits=limits, follow_redirects=False, trust_env=not local)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    @property
    def url(self) -> str:
        """Where the requests go."""
        return f"{self.address}/chat/completions"

    def body(self, request: Request) -> dict[str, Any]:
        """Return the body as it would be sent now."""
        return body_of(request, self.model, self.settings, self.pictures, dict(self.adapted))

    def answer(self, request: Request, stop: threading.Event) -> RawAnswer:
        """Return the answer of a request, finish "error" where it has none for good.

        Raises:
            GrexError: what no other request of the run can do better: a refused key, a spent budget or quota, a server that is not there.
            Abandoned: `stop` was set before there was an answer.
        """
        reason, failed = "", 0
        while failed < self.settings.tries:
            if failed:
                self.tally.retry()
            with self._slots:
                self._wait(self._not_before - time.monotonic(), stop)
                body = self.body(request)
                try:
                    verdict = self._call(body, request)
                except Unreachable as error:
                    self._still_down(str(error), stop)
                    continue
            if verdict.kind == "adapt":
                self._adapt(verdict)
                continue
            reason = self.key.hide(verdict.reason)
            if verdict.kind == "answer" and verdict.answer is not None:
                self._reached = True
                return self.hidden(verdict.answer)
            if verdict.kind == "stop" or (verdict.kind == "refused" and not self._reached):
                raise self._stopped(reason)
            if verdict.kind != "retry":
                break
            failed += 1
            if failed < self.settings.tries:
                self._wait(self._backoff(failed, verdict.wait_s), stop)
        return self._given_up(reason)

    def _call(self, body: dict[str, Any], request: Request) -> Verdict:
        """Send a body once and return what came of it; the tally learns of its beginning and its end."""
        self.tally.begin_call()
        answer: RawAnswer | None = None
        reached = False
        try:
            start = time.monotonic()
            verdict = self._send(body, request, start + self.settings.total_timeout_s)
            reached, answer = True, verdict.answer
            if answer is not None:
                answer.seconds = round(time.monotonic() - start, 3)
        finally:
            self.tally.end_call(answer, reached)
        if verdict.pause_s:
            self._pause(verdict.pause_s)
        return verdict

    def _send(self, body: dict[str, Any], request: Request, deadline: float) -> Verdict:
        headers = {"Content-Type": "application/json", "Accept": "application/json", **self.key.headers()}
        content = bytearray()
        try:
            with self._client.stream("POST", self.url, content=json.dumps(body).encode(), headers=headers) as response:
                self._down_since = None
                for piece in response.iter_bytes():
                    content += piece
                    if len(content) > MOST_BYTES:
                        return Verdict("fail", f"an answer of more than {MOST_BYTES:,} bytes")
                    if time.monotonic() > deadline:
                        return Verdict("retry", f"an answer that was not complete after {self.settings.total_timeout_s:g} s")
                told = {name.lower(): value for name, value in response.headers.items()}
                return judge(response.status_code, told, bytes(content), request, body)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            if _is_certificate(error):
                return Verdict("stop", f"no secure connection ({error})")
            raise Unreachable(str(error) or type(error).__name__) from None
        except httpx2.TimeoutException:
            return Verdict("retry", f"no answer within {self.settings.read_timeout_s:g} s")
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            return Verdict("retry", f"a connection that broke off ({error or type(error).__name__})")

    def _adapt(self, verdict: Verdict) -> None:
        """Leave out, or rename, what the server refuses: once for all requests, and never silently. The next body is without it."""
        with self._lock:
            for name in verdict.fields:
                if name not in self.adapted:  # another thread may have met the same
                    self.adapted[name] = own = "max_completion_tokens" if name == "max_tokens" else ""
                    how = f"sent as {own}" if own else "left out"
                    self._tell(f"the server refuses the field {name}: it is {how} from now on ({self.key.hide(verdict.reason)})")

    def _tell(self, note: str) -> None:
        self.notes.append(note)
        print(note, file=sys.stderr, flush=True)

    def _backoff(self, failed: int, wait_s: float) -> float:
        """Return the pause after `failed` tries: doubled each time, with jitter, and never shorter than what the server asks for."""
        usual = min(self.settings.backoff_s * 2.0 ** (failed - 1), self.settings.backoff_cap_s) * random.uniform(0.5, 1.0)
        if wait_s > self.settings.max_wait_s:
            raise self._stopped(f"it asks for a pause of {wait_s:,.0f} s, which is more than max_wait_s ({self.settings.max_wait_s:g})")
        return max(usual, wait_s)

    def _pause(self, seconds: float) -> None:
        """Let every thread wait: the limit is of all of them together."""
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + min(seconds, self.settings.max_wait_s))

    def _still_down(self, why: str, stop: threading.Event) -> None:
        """Wait for a server that takes no connection."""
        now = time.monotonic()
        with self._lock:
            first = self._down_since is None
            since = self._down_since = now if self._down_since is None else self._down_since
            if first:
                patience = f"waiting for up to {self.settings.unreachable_s:g} s"
                print(f"{self.address} takes no connection ({self.key.hide(why)}); {patience}", file=sys.stderr, flush=True)
        if now - since >= self.settings.unreachable_s:
            given = f"{self.address} took no connection for {now - since:.0f} s ({self.key.hide(why)})"
            raise fault(given, "a running server", "start it or fix --base-url, then run again: what is answered is kept")
        self._wait(min(self.settings.backoff_s * random.uniform(0.5, 1.0), 1.0), stop)

    def _wait(self, seconds: float, stop: threading.Event) -> None:
        """Wait; raise Abandoned where the run ends meanwhile."""
        if stop.wait(seconds) if seconds > 0 else stop.is_set():
            raise Abandoned

    def _given_up(self, reason: str) -> RawAnswer:
        in_a_row, most = self.tally.fail(), self.settings.stop_after_errors
        if most and in_a_row >= most:
            raise self._stopped(f"the last {in_a_row} requests ended with errors, the last one with {reason}")
        return RawAnswer(None, "error", error=reason)

    def _stopped(self, reason: str) -> GrexError:
        key = "" if self.key.is_set else f" ({self.key.name} is not set: no key was sent)"
        return fault(
            f"{self.address} refuses or fails: {reason}{key}", "a server that answers", "fix that, then run again: what is answered is kept"
        )

    def hidden(self, answer: RawAnswer) -> RawAnswer:
        """Take the key out of everything that came back: some servers echo what they were sent."""
        if answer.text is not None:
            answer.text = self.key.hide_in_answer(answer.text)
        answer.refusal = None if answer.refusal is None else self.key.hide(answer.refusal)
        answer.error = None if answer.error is None else self.key.hide(answer.error)
        return answer


def _is_certificate(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
