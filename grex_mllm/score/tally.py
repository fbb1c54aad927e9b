"""One pass over samples -> sums for every group (all, number of targets, tag, source) and every baseline, under both protocols.

Samples are buffered and added as arrays. A tally of one part of the split merges with that of another: sharding cannot move a digit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grex_mllm.metrics import GREC, GRES, REC, RES, RVOS, Count
from grex_mllm.score.protocol import Protocol

BUFFER = 4096
ALL = "all|"
BASELINES = ("always_empty", "oracle")
Key = tuple[str, str, str]  # group, protocol, task


@dataclass
class Plan:
    """Which (protocol, task) pairs the predictions answer, under which rules. Travels to worker processes."""

    protocol: Protocol
    tasks: list[tuple[str, str]]

    def has(self, protocol: str, task: str) -> bool:
        """Tell whether a pair is scored."""
        return (protocol, task) in self.tasks

    def metric(self, protocol: str, task: str) -> Any:
        """Return an empty metric with the rules of the protocol file."""
        rules = self.protocol.tasks[task]
        if task == "rec":
            return REC(rules.iou_threshold)
        if task == "gres":
            return GRES(protocol, rules.thresholds, rules.min_mask_pixels)
        if task == "res":
            return RES(rules.thresholds)
        if task == "count":
            return Count()
        if task == "rvos":
            return RVOS(rules.tolerance)
        select = rules.select if protocol == "strict" else rules.official_select
        return GREC(protocol, rules.box_threshold, rules.iou_threshold, rules.f1_threshold, select)


@dataclass
class Row:
    """What one sample contributes. masks: (I, P, G) at original size; masks_input: at the input size; boxes: argument of GREC.match.

    frame: (expression over the video, J, F).
    """

    groups: list[str]
    no_target: bool
    num_targets: int
    wrong: bool
    head: bool | None = None
    masks: tuple[int, int, int] | None = None
    masks_input: tuple[int, int, int] | None = None
    boxes: tuple[Any, Any, Any, bool, int | None] | None = None
    count: int | None = None
    frame: tuple[str, float, float] | None = None
    detail: dict[str, Any] = field(default_factory=dict)


class Tally:
    """Sums of every group. `rows_out`: called with the finished rows of each buffer (per-sample details filled in)."""

    def __init__(self, plan: Plan, rows_out: Any = None) -> None:
        self.plan = plan
        self.rows_out = rows_out
        self.metrics: dict[Key, Any] = {}
        self.num_samples = 0
        self.num_wrong = 0
        self.num_masks_absent = 0  # targeted expressions without a ground-truth mask
        self.num_masks_found = 0
        self._rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Buffer one sample."""
        self._rows.append(row)
        if len(self._rows) >= BUFFER:
            self.flush()

    def flush(self) -> None:
        """Add the buffered samples to the sums."""
        rows, self._rows = self._rows, []
        if not rows:
            return
        self.num_samples += len(rows)
        self.num_wrong += sum(r.wrong for r in rows)
        groups: dict[str, list[int]] = {}
        for k, row in enumerate(rows):
            for group in (ALL, *row.groups):
                groups.setdefault(group, []).append(k)
        members = {name: np.array(found) for name, found in groups.items()}
        none = np.array([r.no_target for r in rows])
        wrong = np.array([r.wrong for r in rows])
        num = np.array([r.num_targets for r in rows], np.int64)
        for protocol, task in self.plan.tasks:
            if task in ("gres", "res"):
                self._flush_masks(rows, members, protocol, task, none, wrong)
            elif task == "grec":
                self._flush_boxes(rows, members, protocol, none, wrong, num)
            elif task == "rec":
                self._flush_best_boxes(rows, members, protocol, num)
            elif task == "rvos":
                for name, at in members.items():
                    frames = [f for k in at if (f := rows[k].frame) is not None]
                    self.metric(name, protocol, task).update_frames(*zip(*frames, strict=True) if frames else ((), (), ()))
            elif task == "count":
                pred = np.array([0 if r.count is None else r.count for r in rows], np.int64)
                for name, at in members.items():
                    self.metric(name, protocol, task).update(pred[at], num[at], wrong[at])
                self.metric("baseline|always_empty", protocol, task).update(num * 0, num)
                self.metric("baseline|oracle", protocol, task).update(num, num)
        if self.rows_out is not None:
            self.rows_out(rows)

    def metric(self, group: str, protocol: str, task: str) -> Any:
        """Return the metric of a group, made when first asked for."""
        key = (group, protocol, task)
        if key not in self.metrics:
            self.metrics[key] = self.plan.metric(protocol, task)
        return self.metrics[key]

    def merge_state(self, state: dict[str, Any]) -> None:
        """Add the sums of `state()` of another part."""
        self.num_samples += state["num_samples"]
        self.num_wrong += state["num_wrong"]
        self.num_masks_absent += state["num_masks_absent"]
        self.num_masks_found += state["num_masks_found"]
        for key, sums in state["metrics"]:
            group, protocol, task = key
            self.metric(group, protocol, task).merge(self.plan.metric(protocol, task).load_state(sums))

    def state(self) -> dict[str, Any]:
        """Return all sums as plain integers."""
        self.flush()
        sums = [[list(key), metric.state()] for key, metric in self.metrics.items()]
        return {
            "num_samples": self.num_samples,
            "num_wrong": self.num_wrong,
            "num_masks_absent": self.num_masks_absent,
            "num_masks_found": self.num_masks_found,
            "metrics": sums,
        }

    def _flush_masks(self, rows: list[Row], members: dict[str, np.ndarray], protocol: str, task: str, none: Any, wrong: Any) -> None:
        official = protocol == "official"
        counts = np.array([(r.masks_input if official else r.masks) or (0, 0, 0) for r in rows], np.int64)
        heads = None if all(r.head is None for r in rows if not r.wrong) else np.array([bool(r.head) for r in rows])
        if official and heads is None:
            heads = np.zeros(len(rows), bool)  # a buffer of missing answers only
        i, p, g = counts.T
        keep = np.flatnonzero(~none) if task == "res" else np.arange(len(rows))
        for name, at in members.items():
            at = np.intersect1d(at, keep) if task == "res" else at
            if len(at):
                flags = None if heads is None or task == "res" else heads[at]
                self.metric(name, protocol, task).update_counts(i[at], p[at], g[at], flags, none[at], wrong[at])
        yes = np.ones(len(keep), bool)
        self.metric("baseline|always_empty", protocol, task).update_counts(g[keep] * 0, g[keep] * 0, g[keep], yes, none[keep])
        self.metric("baseline|oracle", protocol, task).update_counts(g[keep], g[keep], g[keep], none[keep], none[keep])
        if self.rows_out is not None:
            for k, row in enumerate(rows):
                row.detail.setdefault(protocol, {}).update(_mask_detail(row, counts[k].tolist(), official, self._smallest(task)))

    def _smallest(self, task: str) -> int:
        return int(getattr(self.plan.protocol.tasks[task], "min_mask_pixels", 0))

    def _flush_boxes(self, rows: list[Row], members: dict[str, np.ndarray], protocol: str, none: Any, wrong: Any, num: Any) -> None:
        matcher = self.plan.metric(protocol, "grec")
        matched = np.array(matcher.match([r.boxes or ([], [], [], r.no_target, 0) for r in rows]), np.int64).reshape(-1, 3)
        tp, kept = matched[:, 0], matched[:, 1]
        for name, at in members.items():
            self.metric(name, protocol, "grec").update_matches(tp[at], kept[at], num[at], none[at], wrong[at])
        self.metric("baseline|always_empty", protocol, "grec").update_matches(tp * 0, tp * 0, num, none)
        self.metric("baseline|oracle", protocol, "grec").update_matches(num, num, num, none)
        if self.rows_out is not None:
            for k, row in enumerate(rows):
                f1 = (float(kept[k] == 0) if row.no_target else float(2 * tp[k] / max(1, kept[k] + num[k]))) * (not row.wrong)
                found = {"tp": int(tp[k]), "kept": int(kept[k]), "f1": f1, "correct": f1 >= matcher.f1_threshold}
                found["box_no_target"] = (not row.no_target) if row.wrong else bool(kept[k] == 0)
                row.detail.setdefault(protocol, {}).update(found)

    def _flush_best_boxes(self, rows: list[Row], members: dict[str, np.ndarray], protocol: str, num: Any) -> None:
        """Classic REC: expressions with one target, the others are left out."""
        judge = self.plan.metric(protocol, "rec")
        right = np.array(
            [num[k] == 1 and r.boxes is not None and judge.right(r.boxes[0], r.boxes[1], r.boxes[2][0]) for k, r in enumerate(rows)]
        )
        for name, at in members.items():
            at = at[num[at] == 1]
            if len(at):
                self.metric(name, protocol, "rec").update_right(right[at])
        single = num[num == 1]
        self.metric("baseline|always_empty", protocol, "rec").update_right(single != 1)
        self.metric("baseline|oracle", protocol, "rec").update_right(single == 1)
        if self.rows_out is not None:
            for k in np.flatnonzero(num == 1):
                rows[k].detail.setdefault(protocol, {})["rec_correct"] = bool(right[k])


def _mask_detail(row: Row, counts: list[int], official: bool, smallest: int) -> dict[str, Any]:
    """Return the per-sample numbers of a row, by the same rules as GRES (a test holds them together)."""
    i, p, g = counts
    small = p < (smallest if official else max(1, smallest))
    says_none = (not row.no_target) if row.wrong else bool(row.head) or small
    if p < smallest or row.wrong:
        i = p = 0
    if row.no_target:
        u, iou = (0 if says_none else p), float(says_none)
        i = 0
    elif says_none:
        u, i, iou = (p + g - i if official else g), 0, 0.0
    else:
        u = p + g - i
        iou = i / u if u else 0.0
    return {"iou": iou, "intersection": i, "union": u, "no_target": says_none}
