"""Answers of an earlier run, or of any other system, from a predictions.jsonl."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from grex_mllm.data.records import decode_line, read_lines
from grex_mllm.errors import fault
from grex_mllm.predictors.protocol import STATUSES, Abilities, Answer, Item, Options, set_key


class Replay:
    """Reads the lines' places once, and each line when it is asked for. A question without a line gets the status error.

    Raises:
        GrexError: no such file, a line that is no prediction, or two for one question.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.places = path, dict[str, int]()
        tasks = set[str]()
        for number, offset, line in read_lines(path):
            try:
                task = "ground" if "expression_id" in line else "generate"
                key = line["expression_id"] if task == "ground" else set_key(line["image_id"], sorted(line["targets"]))
            except (KeyError, TypeError):
                raise fault(f"{path} line {number}", "a prediction line (eval/README.md)", "fix the line") from None
            if key in self.places:
                raise fault(f"{path} line {number}: {key} a second time", "one line for each question", "remove one of them")
            if line.get("status", "ok") not in STATUSES:
                raise fault(f"{path} line {number}: status {line['status']!r}", f"one of {', '.join(STATUSES)}", "fix the line")
            self.places[key] = offset
            tasks.add(task)
        self.can = Abilities(tuple(sorted(tasks, reverse=True)), how=f"by what {path} says")

    def fingerprint(self) -> str:
        """Return the SHA-256 of the file."""
        with self.path.open("rb") as file:
            return f"replay:{hashlib.file_digest(file, 'sha256').hexdigest()}"

    def ground(self, items: Iterable[Item]) -> Iterator[Answer]:
        """Answer with the file's lines."""
        for item in items:
            yield from self._answers([e.expression_id for e in item.open_expressions])

    def describe(self, items: Iterable[Item]) -> Iterator[Answer]:
        """Answer with the file's lines."""
        for item in items:
            yield from self._answers([set_key(item.record.image_id, targets) for targets in item.open_sets])

    def _answers(self, keys: list[str]) -> Iterator[Answer]:
        with self.path.open("rb") as file:
            for key in keys:
                if key not in self.places:
                    yield Answer(key, status="error", reason=f"{self.path} has no line for it")
                    continue
                file.seek(self.places[key])
                line = decode_line(file.readline())[0]
                for name in ("expression_id",) if "expression_id" in line else ("image_id", "targets"):
                    del line[name]
                yield Answer(key, status=line.get("status", "ok"), fields=line)


def build(argument: str, options: Options) -> Replay:
    """Return the predictor of a file.

    Raises:
        GrexError: no file given, and what `Replay` raises.
    """
    if not argument:
        raise fault("replay without a file", "replay:FILE", "name a predictions.jsonl")
    if not Path(argument).is_file():
        raise fault(f"predictions file {argument} does not exist", "a predictions.jsonl", "fix the path")
    return Replay(Path(argument))
