"""Counts of a run, its cost, and its budgets."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass

from grex_mllm.errors import GrexError, fault
from grex_mllm.zeroshot.base import RawAnswer
from grex_mllm.zeroshot.server.settings import ServerSettings

MILLION = 1_000_000


def cost_of(prompt: int, cached: int, completion: int, settings: ServerSettings) -> float:
    """Return what tokens cost. cached: of the prompt's, those that the server had read before."""
    price_cached = settings.price_in if settings.price_cached is None else settings.price_cached
    return ((prompt - cached) * settings.price_in + cached * price_cached + completion * settings.price_out) / MILLION


@dataclass
class Counts:
    """What happened so far.

    calls: requests sent, tries included.  answers: whole ones, of the server.  cached: out of the store.  failed: ended with an error.
    """

    calls: int = 0
    answers: int = 0
    cached: int = 0
    retries: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    without_usage: int = 0
    seconds: float = 0.0
    cost: float = 0.0


class Tally:
    """Counts what many threads do, and refuses calls beyond the budgets.

    share: of the budgets that belong to this process; None = an equal one of all processes of the run.
    """

    def __init__(self, settings: ServerSettings, share: float | None = None) -> None:
        self.settings, self.counts = settings, Counts()
        self._share = 1.0 / int(os.environ.get("WORLD_SIZE", 1)) if share is None else share
        self._lock = threading.Lock()
        self._under_way = 0
        self._start = time.monotonic()
        self._in_a_row = 0

    def begin_call(self) -> None:
        """Count a call that is about to be sent.

        Raises:
            GrexError: a budget is spent. Calls under way are reckoned at the mean so far: it is passed by about one of them.
        """
        with self._lock:
            c, s = self.counts, self.settings
            ahead = 1.0 + self._under_way / max(c.answers, 1)
            for name, spent, budget in self._budgets():
                if spent * (1.0 if name == "budget_calls" else ahead) >= budget:
                    raise self._spent(name, budget)
            if (s.budget_tokens is not None or s.budget_cost is not None) and c.without_usage:
                given = "a budget of tokens or money at a server that counts no tokens (no usage in its answers)"
                raise fault(given, "a budget of calls (budget_calls)", "give that one instead, then run again: what is answered is kept")
            c.calls += 1
            self._under_way += 1

    def _spent(self, name: str, budget: float) -> GrexError:
        part = "" if self._share == 1.0 else " (this process's part)"
        return fault(
            f"{name} {budget:g}{part} is spent ({self._spending()})",
            "more of it for the questions that are left",
            "run again with another budget: what is answered is kept, and each run counts anew",
        )

    def end_call(self, answer: RawAnswer | None, reached: bool = True) -> None:
        """Count the end of a call. answer: None where it brought none.  reached: false where there was no connection, thus no call."""
        with self._lock:
            self._under_way -= 1
            self.counts.calls -= not reached
            if answer is not None:
                self._add(answer)

    def collect(self, answer: RawAnswer) -> None:
        """Count an answer, or an error, that came back in a file: its call was paid before, and no budget holds it up."""
        with self._lock:
            self.counts.calls += 1
            if answer.finish == "error":
                self.counts.failed += 1
            else:
                self._add(answer)

    def _add(self, answer: RawAnswer) -> None:
        c, usage = self.counts, answer.usage
        c.answers += 1
        c.seconds += answer.seconds
        prompt, completion = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
        cached = min(usage.get("cached_tokens", 0), prompt)
        c.prompt_tokens += prompt
        c.cached_tokens += cached
        c.completion_tokens += completion
        c.without_usage += "prompt_tokens" not in usage
        answer.cost = cost_of(prompt, cached, completion, self.settings)
        c.cost += answer.cost
        self._in_a_row = 0

    def retry(self) -> None:
        """Count a further try of a request."""
        with self._lock:
            self.counts.retries += 1

    def reuse(self) -> None:
        """Count an answer out of the store."""
        with self._lock:
            self.counts.cached += 1

    def fail(self) -> int:
        """Count a request that ends with an error; return how many have in a row."""
        with self._lock:
            self.counts.failed += 1
            self._in_a_row += 1
            return self._in_a_row

    def _spending(self) -> str:
        c, s = self.counts, self.settings
        money = f", cost {c.cost:.4f}" if s.price_in or s.price_out else ""
        known = f" ({c.cached_tokens:,} cached)" if c.cached_tokens else ""
        return f"{c.calls:,} calls, {c.prompt_tokens:,} tokens in{known}, {c.completion_tokens:,} out{money}"

    def lines(self) -> list[str]:
        """Return lines about the run so far: calls, tokens, cost, answers out of the store, tries again, errors, rate, and each budget."""
        with self._lock:
            c, passed = self.counts, max(time.monotonic() - self._start, 1e-9)
            mean = f", {c.seconds / c.answers:.2f} s a call" if c.answers else ""
            first = f"{self._spending()}; {c.cached:,} from the cache, {c.retries:,} tries again, {c.failed:,} failed; "
            lines = [f"{first}{c.answers / passed:.2f} answers a second{mean}"]
            if c.without_usage:
                lines.append(f"{c.without_usage:,} answers came without a count of tokens: tokens and cost are too low")
            for name, spent, budget in self._budgets():
                left = f", the rest lasts about {passed / spent * (budget - spent):.0f} s" if 0 < spent < budget else ""
                lines.append(f"{name}: {spent / budget if budget else 1.0:.0%} of {budget:g} spent{left}")
            return lines

    def _budgets(self) -> list[tuple[str, float, float]]:
        """Return name, what is spent and this process's part of each budget that is set."""
        c, s = self.counts, self.settings
        known = (
            ("budget_calls", c.calls, s.budget_calls),
            ("budget_tokens", c.prompt_tokens + c.completion_tokens, s.budget_tokens),
            ("budget_cost", c.cost, s.budget_cost),
        )
        return [(name, float(spent), budget * self._share) for name, spent, budget in known if budget is not None]
