"""Grounding lines against the ground truth: which metrics they answer, one row for each expression, in one process or several."""

from __future__ import annotations

import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from grex_mllm.errors import GrexError
from grex_mllm.metrics import entry, needs_of
from grex_mllm.score.generation import set_tasks
from grex_mllm.score.protocol import Protocol
from grex_mllm.score.reading import PredictionFiles, index_predictions
from grex_mllm.score.tally import Plan, Tally, groups_of
from grex_mllm.score.truth import TruthFolder, open_truth

EXPLAINED = {
    "head": "decision of a no-target head (no_target or no_target_prob)",
    "mask_rle_input": "mask_rle_input (the mask at the model's input size, before any resize back)",
}


def plan_tasks(protocol: Protocol, index: PredictionFiles, notes: list[str]) -> Plan:
    """Decide which metrics of expressions the predictions answer; what stays unanswered is noted.

    Raises:
        GrexError: some lines answer a metric and others do not; nothing of the protocol is answered.
    """
    plan = Plan(protocol, [])
    if len(index) and not index.statuses["ok"]:
        notes.append("no expression is answered (status): every task counts as wrong")
    for task, rules in protocol.tasks.items():
        if not len(index) or hasattr(entry(task), "UNIT"):
            continue
        if not index.statuses["ok"]:
            plan.tasks.append(("strict", task))
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
    if not plan.tasks and not (index.num_generation and set_tasks(protocol)):
        raise GrexError(
            f"{', '.join(p.name for p in index.paths)} answers none of {', '.join(protocol.tasks)}; expected fields of a task of protocol "
            f'"{protocol.name}"; {"; ".join(notes) or "the file is empty or holds other lines"}'
        )
    return plan


def evaluate(truth: TruthFolder, index: PredictionFiles, plan: Plan, start: int, stop: int, *, rows_path: Path | None) -> Tally:
    """Score the expressions start..stop of the split; write one JSON line for each where rows_path is given."""
    with closing(index), rows_path.open("w", encoding="utf-8") if rows_path else nullcontext() as file:
        tally = Tally(plan, file)
        for record in truth.expressions(start, stop):
            line = index.find(record.expression_id)
            status = "missing" if line is None else line.get("status", "ok")
            answer = line if status == "ok" else None
            num = len(record.targets)
            groups = groups_of(num, [record.source], record.tags)
            about = {"expression_id": record.expression_id, "image_id": record.image_id, "num_targets": num, "source": record.source}
            about |= {"tags": record.tags, "status": status} | {key: (answer or {}).get(key) for key in ("count", "no_target_prob")}
            tally.add(answer, truth.about(record, plan.protocol.tasks), groups, about)
        tally.flush()
    return tally


def evaluate_in_processes(truth: TruthFolder, index: PredictionFiles, plan: Plan, num_processes: int, rows_path: Path | None) -> Tally:
    """Score the split in parts, one process each, and merge: the same sums as in one process."""
    if num_processes <= 1:
        return evaluate(truth, index, plan, 0, len(truth), rows_path=rows_path)
    bounds = [len(truth) * k // num_processes for k in range(num_processes + 1)]
    parts = [rows_path.with_suffix(f".part{k}") if rows_path else None for k in range(num_processes)]
    jobs = [(truth.folder, truth.split, index.paths, plan, *job) for job in zip(bounds[:-1], bounds[1:], parts, strict=True)]
    whole = Tally(plan)
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for state in pool.map(_evaluate_part, jobs):
            whole.merge_state(state)
    if rows_path:
        with rows_path.open("wb") as file:
            for part in filter(None, parts):
                with part.open("rb") as source:
                    shutil.copyfileobj(source, file)
                part.unlink()
    return whole


def _evaluate_part(job: tuple[Any, ...]) -> dict[str, Any]:
    folder, split, paths, plan, start, stop, rows_path = job
    return evaluate(open_truth(folder, split), index_predictions(paths), plan, start, stop, rows_path=rows_path).state()
