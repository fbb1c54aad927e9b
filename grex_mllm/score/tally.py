"""One pass over samples -> sums for every group (all, number of targets, tag, source) and every baseline, under both protocols.

Rows are buffered and added as arrays. A tally of one part of the split merges with that of another: sharding cannot move a digit.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, TextIO

import numpy as np

from grex_mllm.errors import fault
from grex_mllm.metrics import Calibration, calibration, entry, needs_of
from grex_mllm.metrics.sums import empty_sums, stacked
from grex_mllm.metrics.truth import Truth
from grex_mllm.score.protocol import Protocol

BUFFER = 4096
CHUNK = 64  # samples that are held whole, with prediction and image
ALL = "all|"
BASELINES = ("always_empty", "oracle")
MANY_TARGETS = 3


def groups_of(num_targets: int, sources: Iterable[str], tags: Iterable[str]) -> list[str]:
    """Return the groups that an expression, or a set of objects, belongs to beside ALL."""
    number = f"num|{num_targets}" if num_targets < MANY_TARGETS else f"num|{MANY_TARGETS}+"
    return [number, *(f"source|{name}" for name in dict.fromkeys(sources)), *(f"tag|{tag}" for tag in dict.fromkeys(tags))]


@dataclass
class Plan:
    """Which (protocol, task) pairs the predictions answer, under which rules. Travels to worker processes."""

    protocol: Protocol
    tasks: list[tuple[str, str]]

    def needs(self, field: str) -> list[str]:
        """Return the tasks that read a field."""
        rules = self.protocol.tasks
        return [task for protocol, task in self.tasks if field in needs_of(entry(task), rules[task])[protocol]]


class Tally:
    """Sums of every group, by (group, protocol, task). file: gets a JSON line for each sample, rows of all metrics filled in."""

    def __init__(self, plan: Plan, file: TextIO | None = None) -> None:
        self.plan, self.file = plan, file
        self.sums: dict[tuple[str, str, str], Any] = {}
        self.calibration = Calibration()
        self.num_masks: Counter[str] = Counter()  # targeted expressions whose ground-truth mask is "found" or "absent"
        self._entries = [(protocol, task, entry(task), plan.protocol.tasks[task]) for protocol, task in plan.tasks]
        self._reads_masks = bool(plan.needs("gt_mask"))
        self._chunk: list[tuple[dict[str, Any] | None, Truth]] = []
        self._clear()

    def add(self, prediction: dict[str, Any] | None, truth: Truth, groups: list[str], line: dict[str, Any]) -> None:
        """Take one sample. prediction: None where there is no usable answer. line: what the per-sample file says of it beside the rows."""
        if self._reads_masks and truth.targets:
            self.num_masks["found" if truth.mask() is not None else "absent"] += 1
        self._chunk.append((prediction, truth))
        self._lines.append(line)
        self._num_targets.append(truth.num_targets)
        for group in (ALL, *groups):
            self._groups[group].append(len(self._lines) - 1)
        if len(self._chunk) >= CHUNK:
            self._score_chunk()
        if len(self._lines) >= BUFFER:
            self.flush()

    def flush(self) -> None:
        """Add the buffered rows to the sums."""
        self._score_chunk()
        members = {name: np.array(found) for name, found in self._groups.items()}
        num = np.array(self._num_targets, np.int64)
        self._add_rows(self._probabilities, {ALL: members.get(ALL)}, num, calibration, lambda _: self.calibration)
        for place, (protocol, task, metric, rules) in enumerate(self._entries):
            rows = self._rows[place]
            columns = self._add_rows(rows, members, num, metric, partial(self.sums_of, protocol=protocol, task=task))
            if protocol == "strict" and hasattr(metric, "baselines"):
                for name in BASELINES:
                    self.sums_of(f"baseline|{name}", protocol, task)
                for name, answers in metric.baselines(columns, rules).items() if columns else ():
                    self.sums_of(f"baseline|{name}", protocol, task).update_rows(answers)
            for line, row in zip(self._lines, rows, strict=True):
                if row is not None:
                    line.setdefault(protocol, {}).update(row)
        if self.file is not None and self._lines:
            self.file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in self._lines)
        self._clear()

    def sums_of(self, group: str, protocol: str, task: str) -> Any:
        """Return the sums of a group, made when first asked for."""
        key = (group, protocol, task)
        if key not in self.sums:
            self.sums[key] = empty_sums(entry(task), self.plan.protocol.tasks[task], protocol)
        return self.sums[key]

    def state(self) -> dict[str, Any]:
        """Return all sums as plain values: what processes exchange."""
        self.flush()
        sums = [(key, sums.state()) for key, sums in self.sums.items()]
        return {"num_masks": self.num_masks, "calibration": self.calibration.state(), "sums": sums}

    def merge_state(self, state: dict[str, Any]) -> None:
        """Add the sums of `state()` of another part."""
        self.num_masks.update(state["num_masks"])
        self.calibration.merge(Calibration().load_state(state["calibration"]))
        for (group, protocol, task), found in state["sums"]:
            other = empty_sums(entry(task), self.plan.protocol.tasks[task], protocol).load_state(found)
            self.sums_of(group, protocol, task).merge(other)

    def drop(self, tasks: list[str]) -> None:
        """Forget the sums of some tasks."""
        self.sums = {key: sums for key, sums in self.sums.items() if key[2] not in tasks}

    def _clear(self) -> None:
        self._lines: list[dict[str, Any]] = []
        self._num_targets: list[int] = []
        self._groups: dict[str, list[int]] = defaultdict(list)
        self._rows: list[list[dict[str, Any] | None]] = [[] for _ in self._entries]
        self._probabilities: list[dict[str, Any] | None] = []

    def _score_chunk(self) -> None:
        for kept, (protocol, _, metric, rules) in zip(self._rows, self._entries, strict=True):
            if hasattr(metric, "rows"):
                kept += metric.rows(self._chunk, rules, protocol)
            else:
                kept += [metric.row(prediction, truth, rules, protocol) for prediction, truth in self._chunk]
        self._probabilities += [calibration.row(prediction, truth, calibration.Rules(), "strict") for prediction, truth in self._chunk]
        self._chunk = []

    def _add_rows(
        self, rows: list[dict[str, Any] | None], members: dict[str, Any], num: np.ndarray, metric: Any, sums_of: Callable[[str], Any]
    ) -> dict[str, np.ndarray]:
        """Add the rows of one metric to the sums of every group that has some; return them as columns."""
        present = [row for row in rows if row is not None]
        if not present:
            return {}
        odd = next((row for row in present if row.keys() != present[0].keys()), None)
        if odd is not None:
            given = f"{metric.__name__}: rows with {', '.join(present[0])} and with {', '.join(odd)}"
            raise fault(given, "the same keys in every row", "return None for what is no part of the metric")
        at = np.flatnonzero([row is not None for row in rows])
        columns = stacked(metric, present) | {"num_targets": num[at]}
        place = np.full(len(rows), -1)
        place[at] = np.arange(len(at))
        for name, found in members.items():
            inside = place[found][place[found] >= 0]
            if len(inside):
                sums_of(name).update_rows({key: values[inside] for key, values in columns.items()})
        return columns
