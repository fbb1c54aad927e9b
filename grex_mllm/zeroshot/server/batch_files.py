"""Batch APIs: requests written to files, and what came back read as answers (JSON lines as OpenAI's batch API has them).

    folder/round_001/requests_000.jsonl   written: {"custom_id", "method", "url", "body"}; upload these
    folder/**/*.jsonl                     put here what comes back: {"custom_id", "response", "error"}, in any order, in any number of files

A custom_id is the SHA-256 of all that decides the answer, so that an answer is never taken for that of another model or prompt. For
conversations of several rounds, write again when the results of a round are there, until nothing is left to ask. What failed, or expired
and is missing, is asked again by writing again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from grex_mllm.errors import fault
from grex_mllm.predictors.protocol import Answer
from grex_mllm.writing import whole_folder
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


class Writer:
    """Writes requests in files of limited size into a folder of their own, which appears whole or not at all.

    most_bytes, most_lines: of a file.
    """

    def __init__(self, folder: Path, most_bytes: int, most_lines: int) -> None:
        self.folder, self.most_bytes, self.most_lines = folder, most_bytes, most_lines
        self.num = 0
        self.files: list[str] = []
        self._file: BinaryIO | None = None
        self._bytes = self._lines = 0

    def write(self, name: str, body: dict[str, Any]) -> None:
        """Write a request.

        Raises:
            GrexError: one that is larger than a file may be.
        """
        line = json.dumps({"custom_id": name, "method": "POST", "url": URL, "body": body}).encode() + b"\n"
        if len(line) > self.most_bytes:
            given = f"a request of {len(line):,} bytes"
            raise fault(
                given, f"at most batch_max_bytes, {self.most_bytes:,}", "raise it as far as the server allows, or give smaller pictures"
            )
        if self._file is None or self._bytes + len(line) > self.most_bytes or self._lines == self.most_lines:
            self.close()
            self.files.append(f"requests_{len(self.files):03d}.jsonl")
            self._file = (self.folder / self.files[-1]).open("wb")
        self._file.write(line)
        self._bytes += len(line)
        self._lines += 1
        self.num += 1

    def close(self) -> None:
        """End the file that is being written."""
        if self._file is not None:
            self._file.close()
        self._file, self._bytes, self._lines = None, 0, 0


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


def write_batch(
    conversations: Iterator[Conversation],
    folder: str | Path,
    known: Callable[[str], RawAnswer | None],
    name_of: Callable[[Request], str],
    body_of: Callable[[Request], dict[str, Any]],
    *,
    most_bytes: int,
    most_lines: int,
) -> NoReturn:
    """Write the requests of every conversation's first round that is not answered yet, and stop with a message that says how to go on.

    known: the answer of a custom_id that lies elsewhere.

    Raises:
        GrexError: always: everything is written, or nothing is left to write, or what was written before has not come back.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder)
    waiting, asked, complete = results.waiting(), set[str](), 0

    def at_hand(request: Request) -> RawAnswer:
        name = name_of(request)
        return known(name) or results.answer(name, request)

    place = folder / f"{ROUND}{1 + max(_rounds(folder), default=0):03d}"
    with whole_folder(place) as work:
        writer = Writer(work, most_bytes, most_lines)
        for conversation in conversations:
            open_ones = _open_requests(conversation, at_hand)
            complete += not open_ones
            for request in open_ones:
                name = name_of(request)
                if name in waiting:
                    given = f"{folder / results.written[name]}, of which nothing has come back"
                    raise fault(given, "its results in that folder", "fetch them; or remove that folder, to write its requests anew")
                if name not in asked:
                    asked.add(name)
                    writer.write(name, body_of(request))
        writer.close()
        if not writer.num:
            given = f"nothing left to write: all {complete} questions have their answers in {folder}"
            raise fault(given, "batch_read, which takes them from there", f"run again with batch_read {folder}")
    files = f"{len(writer.files)} file{'s' if len(writer.files) > 1 else ''} of {place}"
    given = f"{writer.num} requests are written to {files}; {complete} questions need none"
    remedy = f"put them anywhere into {folder}, then run again: batch_write asks for what is open by then, batch_read takes the answers"
    raise fault(given, "their results (send the files to the batch API)", remedy)


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
