"""Strict, streaming reading of `predictions.jsonl`: one pass indexes and checks every line, a second reads each when it is scored.

A grounding line has `expression_id`; a generation line has `image_id` and `targets`. Both kinds may stand in one file or in several.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grex_mllm.data.records import decode_line
from grex_mllm.errors import GrexError, fault
from grex_mllm.metrics.language import OTHER_WAYS
from grex_mllm.predictors.protocol import costs_file
from grex_mllm.score.asked import KEYS as ASKED
from grex_mllm.score.asked import Asked
from grex_mllm.score.identity import duplicates, id_number, sha256_of
from grex_mllm.score.truth import TruthFolder

EXAMPLES = 5
STATUSES = ("ok", "unparsable", "refused", "error")
ANSWERS = ("mask_rle", "mask_rle_input", "boxes_xyxy", "count", "no_target", "no_target_prob")
GROUNDING_KEYS = {"expression_id", "image_id", "expression", "box_scores", "minimap", "status", "reason", "reads_truth", *ANSWERS, *ASKED}
GENERATION_KEYS = {"image_id", "targets", "ref_id", "expression", "candidates", "round_trip", "judgement", "status", "reason", *OTHER_WAYS}
GENERATION_KEYS |= {"reads_truth", "scores", "listener_costs", *ASKED}


@dataclass
class PredictionFiles:
    """Index of one or more files. numbers, files, offsets [N]: id number, file and byte offset of each grounding line.

    answered: how many "ok" grounding lines carry each field (not null; mask_rle may be), and "head", no_target or no_target_prob.
    statuses, unknown_keys: counts.
    """

    paths: list[Path]
    numbers: np.ndarray
    files: np.ndarray
    offsets: np.ndarray
    num_generation: int
    answered: Counter[str]
    statuses: Counter[str]
    unknown_keys: Counter[str]
    sha256: list[str]
    reads_truth: str  # what the predictor read of the ground truth, as its lines say: "", "objects" or "targets"
    asked: Asked  # of a model that was asked in words

    def __post_init__(self) -> None:
        self._order = np.argsort(self.numbers, kind="stable")
        self._sorted = self.numbers[self._order]
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    def find(self, expression_id: str) -> dict[str, Any] | None:
        """Return the line of an expression, or None."""
        number = np.uint64(id_number(expression_id))
        place = int(np.searchsorted(self._sorted, number))
        if place == len(self._sorted) or self._sorted[place] != number:
            return None
        return self._line(self._order[place])

    def id_at(self, position: int) -> str:
        """Return the expression id of the line at a position of the index."""
        return str(self._line(position)["expression_id"])

    def _line(self, position: int) -> dict[str, Any]:
        number, offset = int(self.files[position]), int(self.offsets[position])
        if number not in self._open:
            self._open[number] = self.paths[number].open("rb")
        file = self._open[number]
        if file.tell() != offset:
            file.seek(offset)
        return dict(decode_line(file.readline())[0])

    def close(self) -> None:
        """Close the files."""
        for file in self._open.values():
            file.close()
        self._open = {}

    def generations(self) -> Iterator[dict[str, Any]]:
        """Yield the generation lines, in file order."""
        if self.num_generation:
            yield from (value for _, _, _, value in _lines(self.paths) if "expression_id" not in value)

    def partial(self, name: str) -> int:
        """Return how many "ok" lines lack a field."""
        return self.statuses["ok"] - self.answered[name]


def index_predictions(paths: list[Path]) -> PredictionFiles:
    """Read every line once and check its form.

    Raises:
        GrexError: no file, a cut-off or malformed line, a line that is no prediction, or a repeated expression id (with counts and the
        first five).
    """
    numbers, files, offsets = array("Q"), array("H"), array("q")
    answered, statuses, unknown = Counter[str](), Counter[str](), Counter[str]()
    num_generation, reads_truth, asked = 0, set[str](), Asked()
    for file_number, line, offset, value in _lines(paths):
        where = f"{paths[file_number]} line {line}"
        status = value.get("status", "ok")
        if status not in STATUSES:
            raise fault(f"{where}: status {status!r}", f"one of {', '.join(STATUSES)}", "fix the line")
        if value.get("reads_truth"):
            reads_truth.add(str(value["reads_truth"]))
        asked.add(value)
        if "expression_id" in value:
            if not isinstance(value["expression_id"], str):
                raise fault(f"{where}: expression_id {value['expression_id']!r}", "a string", "write the id of expressions.jsonl")
            numbers.append(id_number(value["expression_id"]))
            files.append(file_number)
            offsets.append(offset)
            statuses[status] += 1
            if status == "ok":
                answered.update(key for key in value if value[key] is not None or key == "mask_rle")
                answered["mask"] += value.get("mask_rle") is not None
                answered["head"] += value.get("no_target") is not None or value.get("no_target_prob") is not None
            unknown.update(value.keys() - GROUNDING_KEYS)
        elif "image_id" in value and "targets" in value:
            num_generation += 1
            unknown.update(value.keys() - GENERATION_KEYS)
        else:
            given = f"{where} with fields {', '.join(sorted(value)) or '(none)'}"
            raise fault(given, "expression_id, or image_id and targets", "fix the line")
    for path in paths:
        asked.add_costs(costs_file(path))
    if not answered["mask"] and answered["boxes_xyxy"]:
        del answered["mask_rle"]  # nothing but nulls, beside boxes: masks were not asked for
    places = np.array(numbers, np.uint64), np.array(files, np.uint16), np.array(offsets, np.int64)
    sha256 = [sha256_of(path) for path in paths]
    index = PredictionFiles(paths, *places, num_generation, answered, statuses, unknown, sha256, ", ".join(sorted(reads_truth)), asked)
    again = duplicates(index.numbers)
    if len(again):
        given = f"{len(again)} repeated expression ids{_some(map(index.id_at, again[:EXAMPLES]))}"
        raise fault(given, "one line for each expression", "remove the repeated lines")
    return index


def match_ids(index: PredictionFiles, truth: TruthFolder, allow_missing: bool) -> int:
    """Compare the ids of predictions and split; return how many expressions have no prediction.

    Raises:
        GrexError: ids of another split, unknown ids, or (unless allowed) missing ones, with counts and the first five of each.
    """
    stray = np.flatnonzero(~np.isin(index.numbers, truth.numbers))
    absent = np.flatnonzero(~np.isin(truth.numbers, index.numbers))
    faults = []
    if len(stray):
        elsewhere = np.isin(index.numbers[stray], truth.other_numbers)
        for chosen, words in ((stray[elsewhere], "of another split"), (stray[~elsewhere], "not in the dataset")):
            if len(chosen):
                faults.append(f"{len(chosen)} predictions {words}{_some(map(index.id_at, chosen[:EXAMPLES]))}")
    if len(absent) and not allow_missing:
        faults.append(f"{len(absent)} expressions without a prediction{_some(map(truth.id_at, absent[:EXAMPLES]))}")
    if faults:
        raise GrexError(
            f'{"; ".join(faults)}; expected one prediction for each of the {len(truth)} expressions of split "{truth.split}"; '
            "check --split and the file, or count missing ones as wrong with --allow-missing"
        )
    return len(absent)


def _lines(paths: list[Path]) -> Iterator[tuple[int, int, int, dict[str, Any]]]:
    for number, path in enumerate(paths):
        if not path.is_file():
            raise fault(f"predictions file {path} does not exist", "a predictions.jsonl", "run grex predict, or give its path")
        offset = 0
        with path.open("rb") as file:
            for line, text in enumerate(file, start=1):
                if text.strip():
                    value, reason = decode_line(text)
                    if not isinstance(value, dict):
                        cut = "" if text.endswith(b"\n") else "; the file ends in the middle of this line: it was cut off"
                        raise GrexError(
                            f"{path} line {line}: {reason or 'no JSON object'}{cut}; expected one JSON object on each line; "
                            "write the file again, or remove the line and use --allow-missing"
                        )
                    yield number, line, offset, value
                offset += len(text)


def _some(ids: Iterable[str]) -> str:
    return f" (first: {', '.join(map(str, ids))})"
