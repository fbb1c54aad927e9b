"""Batch APIs: requests written to files, and what came back read as answers (JSON lines as OpenAI's batch API has them).

    folder/round_001/requests_000.jsonl   written: {"custom_id", "method", "url", "body"}; upload these
    folder/**/*.jsonl                     put here what comes back: {"custom_id", "response", "error"}, in any order, in any number of files

A custom_id is the SHA-256 of all that decides the answer, so that an answer is never taken for that of another model or prompt. For
conversations of several rounds, write again when the results of a round are there, until nothing is left to ask. What failed, or expired
and is missing, is asked again by writing again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from grex_mllm.errors import fault
from grex_mllm.predictors.protocol import Answer
from grex_mllm.writing import flush, take_place
from grex_mllm.zeroshot.base import Conversation, RawAnswer, Request
from grex_mllm.zeroshot.server.faults import judge

URL = "/v1/chat/completions"
ROUND = "round_"
UNREADABLE = "a line of JSON with custom_id"


class Results:
    """What has come back into a folder, by custom_id; texts stay in their files until they are asked for.

    Raises:
        GrexError: no such folder; a line that is no JSON with a custom_id (a download that was cut), with its file and number.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise fault(f"{self.folder} is no folder", "one with the files of a batch", "write the requests first (batch_write)")
        self._places: dict[str, list[tuple[Path, int]]] = {}
        self.written: dict[str, str] = {}  # custom_id -> the last round in which it was written
        for file in sorted(self.folder.rglob("*.jsonl")):
            if not any(part.startswith(".") for part in file.relative_to(self.folder).parts):  # of a run that was killed while it wrote
                self._index(file)

    def _index(self, file: Path) -> None:
        with file.open("rb") as lines:
            offset = 0
            for number, line in enumerate(lines, 1):
                try:
                    entry = json.loads(line) if line.strip() else {"custom_id": ""}
                    name = entry["custom_id"]
                except (ValueError, KeyError, TypeError):
                    raise fault(f"{file} line {number} cannot be read", UNREADABLE, "fetch the file again, or take it out") from None
                if "body" in entry:
                    self.written[name] = max(self.written.get(name, ""), file.parent.name)
                elif name:
                    self._places.setdefault(name, []).append((file, offset))
                offset += len(line)

    def waiting(self) -> set[str]:
        """Return what was written in a round of which nothing at all has come back."""
        heard = {number for name, number in self.written.items() if name in self._places}
        return {name for name, number in self.written.items() if number not in heard}

    def answer(self, name: str, request: Request) -> RawAnswer:
        """Return the answer of a custom_id: of several the first whole one; finish "error" where there is none."""
        reason = "no result: expired, or not fetched" if name in self.written else "no result: it was never written into this folder"
        for file, offset in self._places.get(name, ()):
            with file.open("rb") as lines:
                lines.seek(offset)
                raw = _answer_of(json.loads(lines.readline()), request)
            if raw.finish != "error":
                return raw
            reason = raw.error or reason
        return RawAnswer(None, "error", error=reason)


def _answer_of(entry: dict[str, Any], request: Request) -> RawAnswer:
    response, error = entry.get("response"), entry.get("error")
    if isinstance(response, dict) and isinstance(response.get("body"), dict):
        status = response.get("status_code")
        verdict = judge(status if isinstance(status, int) else 200, {}, json.dumps(response["body"]).encode(), request, {})
        return verdict.answer or RawAnswer(None, "error", error=verdict.reason)
    if isinstance(error, dict):
        return RawAnswer(None, "error", error=f"{error.get('code')}: {error.get('message')}")
    return RawAnswer(None, "error", error="a result without response and error")


class BatchWriter:
    """Writes the open requests of conversations into a new round's folder, which appears whole or not at all.

    known: the answer of a custom_id that lies elsewhere.  name_of: a request's custom_id.  most_bytes, most_lines: of one file.
    """

    def __init__(
        self,
        folder: str | Path,
        known: Callable[[str], RawAnswer | None],
        name_of: Callable[[Request], str],
        body_of: Callable[[Request], dict[str, Any]],
        *,
        most_bytes: int,
        most_lines: int,
    ) -> None:
        self.folder, self.most_bytes, self.most_lines = Path(folder), most_bytes, most_lines
        self._known, self._name_of, self._body_of = known, name_of, body_of
        self.folder.mkdir(parents=True, exist_ok=True)
        self._results = Results(self.folder)
        self._waiting = self._results.waiting()
        self._place = self.folder / f"{ROUND}{1 + max(_rounds(self.folder), default=0):03d}"
        self._work = self._place.with_name(f".{self._place.name}.partial")
        shutil.rmtree(self._work, ignore_errors=True)
        self._asked: set[str] = set()
        self._files = self._complete = self._under_way = 0
        self._file: BinaryIO | None = None
        self._bytes = self._lines = 0

    def take(self, conversations: Iterator[Conversation]) -> None:
        """Write the requests of each conversation's first round that lacks answers.

        Raises:
            GrexError: a request that was written before and of which nothing has come back, or that is larger than a file may be.
        """
        self._under_way += 1  # stays up where this fails
        self._work.mkdir(exist_ok=True)
        for conversation in conversations:
            open_ones = _open_requests(conversation, self._at_hand)
            self._complete += not open_ones
            for request in open_ones:
                name = self._name_of(request)
                if name in self._waiting:
                    given = f"{self.folder / self._results.written[name]}, of which nothing has come back"
                    raise fault(given, "its results in that folder", "fetch them; or remove that folder, to write its requests anew")
                if name not in self._asked:
                    self._asked.add(name)
                    line = {"custom_id": name, "method": "POST", "url": URL, "body": self._body_of(request)}
                    self._write(json.dumps(line).encode() + b"\n")
        self._under_way -= 1

    def _at_hand(self, request: Request) -> RawAnswer:
        name = self._name_of(request)
        return self._known(name) or self._results.answer(name, request)

    def _write(self, line: bytes) -> None:
        if len(line) > self.most_bytes:
            given, most = f"a request of {len(line):,} bytes", f"at most batch_max_bytes, {self.most_bytes:,}"
            raise fault(given, most, "raise it as far as the server allows, or give smaller pictures")
        if self._file is None or self._bytes + len(line) > self.most_bytes or self._lines == self.most_lines:
            self._end_file()
            self._file = (self._work / f"requests_{self._files:03d}.jsonl").open("wb")
            self._files += 1
        self._file.write(line)
        self._bytes += len(line)
        self._lines += 1

    def _end_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._bytes, self._lines = None, 0, 0

    def close(self) -> None:
        """End the run: put the folder in its place and stop with a message that says how to go on. A run that was cut off leaves nothing.

        Raises:
            GrexError: always, where everything was taken.
        """
        self._end_file()
        if self._under_way or not self._work.exists():
            shutil.rmtree(self._work, ignore_errors=True)
            return
        if not self._asked:
            self._work.rmdir()
            given = f"nothing left to write: all {self._complete} questions have their answers in {self.folder}"
            raise fault(given, "batch_read, which takes them from there", f"run again with batch_read {self.folder}")
        flush(self._work)
        take_place(self._work, self._place)
        files = f"{self._files} file{'s' if self._files > 1 else ''} of {self._place}"
        given = f"{len(self._asked)} requests are written to {files}; {self._complete} questions need none"
        remedy = (
            f"put them anywhere into {self.folder}, then run again: batch_write asks for what is open by then, batch_read takes answers"
        )
        raise fault(given, "their results (send the files to the batch API)", remedy)


def read_batch(conversations: Iterator[Conversation], ask: Callable[[Request], RawAnswer]) -> Iterator[Answer]:
    """Hold conversations one after the other with the answers that came back."""
    for conversation in conversations:
        answers: list[RawAnswer] | None = None
        while True:
            try:
                requests = next(conversation) if answers is None else conversation.send(answers)
            except StopIteration as end:
                yield end.value
                break
            answers = [ask(request) for request in requests]


def _rounds(folder: Path) -> list[int]:
    names = [item.name.removeprefix(ROUND) for item in folder.iterdir() if item.name.startswith(ROUND)]
    return [int(name) for name in names if name.isdigit()]


def _open_requests(conversation: Conversation, ask: Callable[[Request], RawAnswer]) -> list[Request]:
    """Go through a conversation as far as answers are at hand and return the requests of its round that lack one; [] = it is complete."""
    try:
        requests = next(conversation)
        while True:
            answers = [ask(request) for request in requests]
            missing = [request for request, answer in zip(requests, answers) if answer.finish == "error"]
            if missing:
                conversation.close()
                return missing
            requests = conversation.send(answers)
    except StopIteration:
        return []
