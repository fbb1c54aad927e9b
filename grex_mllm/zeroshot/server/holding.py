"""Many conversations side by side: their generators run in the caller's thread, their requests in a few threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from grex_mllm.errors import GrexError
from grex_mllm.predictors.protocol import Answer
from grex_mllm.zeroshot.base import Conversation, RawAnswer, Request
from grex_mllm.zeroshot.server.calling import Abandoned

WAKE_S = 0.5  # an interrupt from the keyboard is seen at least this often, on every system

Ask = Callable[[Request, threading.Event], RawAnswer]


@dataclass
class _Open:
    """A conversation whose round is under way."""

    conversation: Conversation
    answers: list[RawAnswer | None]
    missing: int


class _Threads:
    """Threads that answer requests. They are daemons: a stalled server does not keep the program from ending."""

    def __init__(self, ask: Ask, num: int) -> None:
        self.stop = threading.Event()
        self._ask, self._num = ask, num
        self._threads: list[threading.Thread] = []
        self._jobs: SimpleQueue[tuple[int, int, Request] | None] = SimpleQueue()
        self._results: SimpleQueue[tuple[int, int, RawAnswer | BaseException]] = SimpleQueue()

    def submit(self, number: int, place: int, request: Request) -> None:
        if len(self._threads) < self._num:
            thread = threading.Thread(target=self._work, name=f"server-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._jobs.put((number, place, request))

    def result(self) -> tuple[int, int, RawAnswer | BaseException]:
        while True:
            try:
                return self._results.get(timeout=WAKE_S)
            except Empty:
                continue

    def close(self) -> None:
        self.stop.set()
        for _ in self._threads:
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            number, place, request = job
            try:
                self._results.put((number, place, self._ask(request, self.stop)))
            except BaseException as error:  # it is raised again in the caller's thread
                self._results.put((number, place, error))


class Holding:
    """The conversations of one `Backend.hold`.

    ask: answers one request; called in `concurrency` threads.
    A `GrexError` of `ask` or of the feed stops the run: no new request goes out, those under way are waited for, conversations that they
    complete are answered, and then it is raised.
    """

    def __init__(self, ask: Ask, concurrency: int) -> None:
        self._threads, self._concurrency = _Threads(ask, concurrency), concurrency
        self._open: dict[int, _Open] = {}
        self._under_way = 0
        self._number = 0
        self._halt: GrexError | None = None
        self._fed = False

    def run(self, conversations: Iterator[Conversation]) -> Iterator[Answer]:
        """Yield what the conversations return, in the order in which they end."""
        try:
            while True:
                yield from self._take(conversations)
                if not self._under_way:
                    break
                yield from self._receive(*self._threads.result())
            if self._halt is not None:
                raise self._halt
        finally:
            self._threads.close()
            for held in self._open.values():
                held.conversation.close()

    def _take(self, conversations: Iterator[Conversation]) -> Iterator[Answer]:
        """Begin new conversations while there is room."""
        while self._under_way < self._concurrency and not self._fed and self._halt is None:
            try:
                conversation = next(conversations, None)
            except GrexError as error:
                self._halt = error
                return
            if conversation is None:
                self._fed = True
                return
            yield from self._go_on(conversation, None)

    def _receive(self, number: int, place: int, result: RawAnswer | BaseException) -> Iterator[Answer]:
        """Take the result of a request; the conversation goes on when its round is complete."""
        self._under_way -= 1
        if isinstance(result, BaseException):
            self._stop_for(result)
            return
        held = self._open[number]
        held.answers[place] = result
        held.missing -= 1
        if not held.missing:
            del self._open[number]
            yield from self._go_on(held.conversation, [answer for answer in held.answers if answer is not None])

    def _stop_for(self, error: BaseException) -> None:
        if isinstance(error, GrexError):
            self._halt = self._halt or error
            self._threads.stop.set()  # no further tries: what is under way comes to its end, the rest is given up
        elif not isinstance(error, Abandoned):
            raise error

    def _go_on(self, conversation: Conversation, answers: list[RawAnswer] | None) -> Iterator[Answer]:
        """Hand a conversation the answers of its round; submit the requests of the next one, or yield what it returns."""
        try:
            requests = next(conversation) if answers is None else conversation.send(answers)
            while not requests:
                requests = conversation.send([])
        except StopIteration as end:
            yield end.value
            return
        except GrexError as error:
            self._stop_for(error)
            return
        if self._halt is not None:
            conversation.close()
            return
        self._number += 1
        self._open[self._number] = _Open(conversation, [None] * len(requests), len(requests))
        for place, request in enumerate(requests):
            self._under_way += 1
            self._threads.submit(self._number, place, request)
