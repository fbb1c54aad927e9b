"""The raw answers of an earlier run, parsed again: `reparse:FILE` with the way of asking that the run had (`--ask....`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grex_mllm.data.records import decode_line, read_lines
from grex_mllm.errors import fault
from grex_mllm.predictors.protocol import Answer, Options, set_key
from grex_mllm.zeroshot.base import Conversation, RawAnswer, Request
from grex_mllm.zeroshot.families import find_family
from grex_mllm.zeroshot.predictor import ZeroShot
from grex_mllm.zeroshot.settings import read_settings

KEPT = {"step", "prompt"}  # of a raw answer in a line, beside the fields of `RawAnswer`


class Recorded:
    """A backend that answers with what a predictions file keeps; no model is asked.

    Raises:
        GrexError: no such file, or one without raw answers.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise fault(f"predictions file {path} does not exist", "a predictions.jsonl of a model that was asked", "fix the path")
        self.path, self.places = path, dict[str, int]()
        names = set[str]()
        for _, offset, line in read_lines(path):
            if isinstance(line.get("raw"), list):
                key = line["expression_id"] if "expression_id" in line else set_key(line["image_id"], sorted(line["targets"]))
                self.places[key] = offset
                names.add(str(line.get("by", "")).partition(",")[0])
        if not self.places:
            raise fault(f"{path} without raw answers", "lines with raw, as a model that is asked in words writes them", "use replay:FILE")
        self.name = " and ".join(sorted(names))

    def fingerprint(self) -> str:
        """Return the SHA-256 of the file."""
        with self.path.open("rb") as file:
            return f"reparse:{hashlib.file_digest(file, 'sha256').hexdigest()}"

    def view(self, width: int, height: int) -> tuple[int, int] | None:
        """Return None: each raw answer says what the model saw."""
        return None

    def hold(self, conversations: Iterator[Conversation]) -> Iterator[Answer]:
        """Give every request what was answered then; one that was not asked then gets an error."""
        with self.path.open("rb") as file:
            for conversation in conversations:
                left: list[dict[str, Any]] | None = None
                reply: list[RawAnswer] | None = None
                while True:
                    try:
                        requests = next(conversation) if reply is None else conversation.send(reply)
                    except StopIteration as stop:
                        yield stop.value
                        break
                    if left is None:
                        left = self._raw(file, requests[0].key.rpartition("#")[0])
                    reply = [_answer(request, left) for request in requests]

    def remarks(self) -> list[str]:
        """Return nothing: nobody was asked."""
        return []

    def _raw(self, file: Any, key: str) -> list[dict[str, Any]]:
        if key not in self.places:
            return []
        file.seek(self.places[key])
        return list(decode_line(file.readline())[0]["raw"])


def _answer(request: Request, left: list[dict[str, Any]]) -> RawAnswer:
    """Take the first answer that is left, where it belongs to the same step."""
    step = request.key.rpartition("#")[2].partition(".")[0]
    if not left or left[0].get("step") != step:
        return RawAnswer(None, "error", error=f"the file has no answer to {request.key}")
    found = {name: value for name, value in left.pop(0).items() if name not in KEPT}
    sent = found.get("sent")
    return RawAnswer(**{"text": None} | found | ({"sent": (int(sent[0]), int(sent[1]))} if sent else {}))


def build(argument: str, options: Options) -> ZeroShot:
    """Return the predictor of a predictions file; the flags say how it was asked, `--ask.family` at least where the name does not.

    Raises:
        GrexError: what `Recorded`, `find_family` and `ZeroShot` raise.
    """
    settings, backend = read_settings(options.overrides), Recorded(Path(argument))
    return ZeroShot(backend, find_family(settings.ask.family or backend.name), settings, options)
