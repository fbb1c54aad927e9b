"""One thread that owns the model, and the line in front of it.

Requests of one kind that wait for the same picture are answered in one pass of the model, whoever asked. A request that waited longer than
its time is dropped before it costs anything.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from grex_mllm.serve.limits import MAX_WAITING

MAX_TOGETHER = 16  # requests in one pass


class LineFull(Exception):
    """So many requests wait that another one would not be answered in time."""


@dataclass(eq=False)
class Job:
    """run: answers the payloads of all jobs with an equal key in one call.  ticket: under which its place in the line is asked for."""

    key: Hashable
    run: Callable[[list[Any]], list[Any]]
    payload: Any
    ticket: str
    deadline: float
    future: Future[Any] = field(default_factory=Future)


class Worker:
    """Answers jobs in the order in which they came, one pass at a time."""

    def __init__(self, timeout_s: float, limit: int = MAX_WAITING) -> None:
        self.timeout_s, self._limit = timeout_s, limit
        self._line: list[Job] = []
        self._running: list[Job] = []
        self._wake = threading.Condition()
        self._stopped = False
        self.passes = 0
        self._thread = threading.Thread(target=self._work, name="grex-serve-model", daemon=True)
        self._thread.start()

    def submit(self, key: Hashable, run: Callable[[list[Any]], list[Any]], payload: Any, ticket: str = "") -> Future[Any]:
        """Put a job at the end of the line. Jobs with an equal key that is not None are answered together.

        Raises:
            LineFull: too many wait.
        """
        job = Job(key, run, payload, ticket, time.monotonic() + self.timeout_s)
        with self._wake:
            if len(self._line) >= self._limit:
                raise LineFull
            self._line.append(job)
            self._wake.notify()
        return job.future

    def place(self, ticket: str) -> int | None:
        """Return how many jobs are before the one of this ticket: 0 = it runs; None = it does not wait."""
        with self._wake:
            if any(job.ticket == ticket for job in self._running):
                return 0
            for place, job in enumerate(self._line):
                if job.ticket == ticket:
                    return place + bool(self._running)
        return None

    @property
    def waiting(self) -> int:
        with self._wake:
            return len(self._line)

    def stop(self) -> None:
        """End the thread after its pass; what waits is cancelled."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join(timeout=30)

    def _work(self) -> None:
        while True:
            with self._wake:
                self._running = []
                while not self._line and not self._stopped:
                    self._wake.wait()
                if self._stopped:
                    for job in self._line:
                        _expire(job)
                    return
                jobs = self._running = self._take()
                self.passes += bool(jobs)
            if jobs:
                _answer(jobs)

    def _take(self) -> list[Job]:
        first = self._line[0]
        together = [first] if first.key is None else [job for job in self._line if job.key == first.key][:MAX_TOGETHER]
        taken = {id(job) for job in together}
        self._line = [job for job in self._line if id(job) not in taken]
        now = time.monotonic()
        late = [job for job in together if job.deadline < now]
        for job in late:
            _expire(job)
        return [job for job in together if job not in late and job.future.set_running_or_notify_cancel()]


def _expire(job: Job) -> None:
    if job.future.set_running_or_notify_cancel():
        job.future.set_exception(TimeoutError())


def _answer(jobs: list[Job]) -> None:
    try:
        results = jobs[0].run([job.payload for job in jobs])
    except Exception as error:  # the thread must live on; whoever waits for the answer gets the error
        for job in jobs:
            job.future.set_exception(error)
        return
    for job, result in zip(jobs, results, strict=True):
        job.future.set_result(result)
