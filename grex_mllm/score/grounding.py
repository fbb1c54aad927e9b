"""Grounding lines against the ground truth: which metrics they answer, one row for each expression, in one process or several."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from grex_mllm.errors import GrexError
from grex_mllm.metrics import entry, needs_of
from grex_mllm.score.protocol import Protocol
from grex_mllm.score.reading import PredictionFiles, index_predictions
from grex_mllm.score.tally import Plan, Tally
from grex_mllm.score.truth import TruthFolder, open_truth
from grex_mllm.types import ExpressionRecord

MANY_TARGETS = 3
EXPLAINED = {
    "head": "decision of a no-target head (no_target or no_target_prob)",
    "mask_rle_input": "mask_rle_input (the mask at the model's input size, before any resize back)",
}


def plan_tasks(protocol: Protocol, index: PredictionFiles, notes: list[str]) -> Plan:
    """Decide which metrics of expressions the predictions answer; what stays unanswered is noted.

    Raises:
        GrexError: some lines answer a metric and others do not.
    """
    plan = Plan(protocol, [])
    for task, rules in protocol.tasks.items():
        if not len(index) or hasattr(entry(task), "UNIT"):
            continue
        needs = needs_of(entry(task), rules)
        for name, fields in needs.items():
            if name == "strict" and index.answered[fields[0]] == 0:
                notes.append(f"{task}: no prediction has {fields[0]}; not scored")
                break
            lacking = [field for field in fields if not field.startswith("gt_") and index.partial(field)]
            given = f"{index.partial(lacking[0])} of {index.statuses['ok']}" if lacking else ""
            if lacking and lacking[0] not in needs["strict"]:
                notes.append(f"{name} {task} not computed: {given} predictions have no {EXPLAINED.get(lacking[0], lacking[0])}")
                continue
            if lacking:
                raise GrexError(
                    f"{given} answered predictions have no {lacking[0]}, which {task} needs; expected it in all or in none; complete the "
                    "file, or set the status of unanswered lines"
                )
            plan.tasks.append((name, task))
    return plan


def evaluate(
    truth: TruthFolder, index: PredictionFiles, plan: Plan, start: int, stop: int, rows_path: Path | None, progress: Callable[[int], None]
) -> Tally:
    """Score the expressions start..stop of the split; write one JSON line for each where rows_path is given."""
    rows_file = rows_path.open("w", encoding="utf-8") if rows_path else None

    def write(lines: list[dict[str, Any]]) -> None:
        assert rows_file is not None
        rows_file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    tally = Tally(plan, write if rows_file else None)
    try:
        for record in truth.expressions(start, stop):
            line = index.find(record.expression_id)
            status = "missing" if line is None else line.get("status", "ok")
            answer = line if status == "ok" else None
            tally.add(answer, truth.about(record, plan.protocol.tasks), group_names(record), _described(record, status, answer or {}))
            progress(1)
        tally.flush()
    finally:
        index.close()
        if rows_file:
            rows_file.close()
    return tally


def evaluate_in_processes(
    truth: TruthFolder, index: PredictionFiles, plan: Plan, num_processes: int, rows_path: Path | None, progress: Callable[[int], None]
) -> Tally:
    """Score the split in parts, one process each, and merge: the same sums as in one process."""
    if num_processes <= 1:
        return evaluate(truth, index, plan, 0, len(truth), rows_path, progress)
    bounds = [len(truth) * k // num_processes for k in range(num_processes + 1)]
    parts = [rows_path.with_suffix(f".part{k}") if rows_path else None for k in range(num_processes)]
    jobs = [(truth.folder, truth.split, index.paths, plan, bounds[k], bounds[k + 1], parts[k]) for k in range(num_processes)]
    whole = Tally(plan)
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for k, state in enumerate(pool.map(_evaluate_part, jobs)):
            whole.merge_state(state)
            progress(bounds[k + 1] - bounds[k])
    if rows_path:
        with rows_path.open("wb") as file:
            for part in parts:
                if part is not None:
                    with part.open("rb") as source:
                        while chunk := source.read(1 << 20):
                            file.write(chunk)
                    part.unlink()
    return whole


def group_names(record: ExpressionRecord) -> list[str]:
    """Return the groups that an expression counts in."""
    bucket = str(len(record.targets)) if len(record.targets) < MANY_TARGETS else f"{MANY_TARGETS}+"
    return [f"num|{bucket}", f"source|{record.source}", *(f"tag|{tag}" for tag in dict.fromkeys(record.tags))]


def _evaluate_part(job: tuple[Any, ...]) -> dict[str, Any]:
    folder, split, paths, plan, start, stop, rows_path = job
    return evaluate(open_truth(folder, split), index_predictions(paths), plan, start, stop, rows_path, lambda _: None).state()


def _described(record: ExpressionRecord, status: str, answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "expression_id": record.expression_id,
        "image_id": record.image_id,
        "num_targets": len(record.targets),
        "source": record.source,
        "tags": record.tags,
        "status": status,
        "count": answer.get("count"),
        "no_target_prob": answer.get("no_target_prob"),
    }
