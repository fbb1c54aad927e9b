"""Grounding lines against the ground truth: which tasks they answer, one row for each expression, in one process or several."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grex_mllm.errors import GrexError, fault
from grex_mllm.metrics.calibration import Calibration
from grex_mllm.metrics.video import contour, region
from grex_mllm.ops.masks import decode_rle
from grex_mllm.ops.rle import check_rle, empty_rle, overlap_counts
from grex_mllm.score.protocol import Protocol
from grex_mllm.score.reading import PredictionFiles, index_predictions, prediction_boxes
from grex_mllm.score.tally import Plan, Row, Tally
from grex_mllm.score.truth import TruthFolder, open_truth
from grex_mllm.types import ExpressionRecord

MANY_TARGETS = 3
ARGMAX = 0.5  # the larger of two probabilities


@dataclass
class Outcome:
    """What a pass over expressions gives."""

    tally: Tally
    calibration: Calibration
    rows_file: Path | None = None


def plan_tasks(protocol: Protocol, index: PredictionFiles, notes: list[str]) -> Plan:
    """Decide which tasks the predictions answer; what stays unanswered is noted.

    Raises:
        GrexError: some lines answer a task and others do not.
    """
    tasks: list[tuple[str, str]] = []
    needs = {"gres": "mask_rle", "res": "mask_rle", "grec": "boxes_xyxy", "rec": "boxes_xyxy", "count": "count", "rvos": "mask_rle"}
    for task in protocol.tasks:
        if task not in needs or not len(index):
            continue
        name = needs[task]
        if index.answered[name] == 0 or (name == "mask_rle" and index.answered["mask"] == 0 and index.answered["boxes_xyxy"]):
            notes.append(f"{task}: no prediction has {name}; not scored")
            continue
        if index.partial(name):
            raise GrexError(
                f"{index.partial(name)} of {index.statuses['ok']} answered predictions have no {name}; expected it in all or in none; "
                "complete the file, or set the status of unanswered lines"
            )
        tasks.append(("strict", task))
        if task == "gres" and _official_masks(protocol, index, notes):
            tasks.append(("official", task))
        if task == "grec":
            tasks.append(("official", task))
    rules = protocol.tasks.get("grec")
    if rules is not None and "count" in (rules.select, rules.official_select) and ("strict", "grec") in tasks and index.partial("count"):
        raise fault(
            f'{index.partial("count")} predictions without "count"', 'one in each line for select "count"', 'use select "threshold"'
        )
    return Plan(protocol, tasks)


def evaluate(
    truth: TruthFolder, index: PredictionFiles, plan: Plan, start: int, stop: int, rows_path: Path | None, progress: Callable[[int], None]
) -> Outcome:
    """Score the expressions start..stop of the split; write one JSON line for each where rows_path is given."""
    calibration = Calibration()
    rows_file = rows_path.open("w", encoding="utf-8") if rows_path else None

    def write(rows: list[Row]) -> None:
        assert rows_file is not None
        rows_file.writelines(json.dumps(row.detail, ensure_ascii=False) + "\n" for row in rows)

    tally = Tally(plan, write if rows_file else None)
    try:
        for record in truth.expressions(start, stop):
            line = index.find(record.expression_id)
            row = _row(truth, record, line, plan, tally)
            if line is not None and not row.wrong and line.get("no_target_prob") is not None:
                calibration.update([_probability(line)], [row.no_target])
            tally.add(row)
            progress(1)
        tally.flush()
    finally:
        index.close()
        if rows_file:
            rows_file.close()
    return Outcome(tally, calibration, rows_path)


def evaluate_in_processes(
    truth: TruthFolder, index: PredictionFiles, plan: Plan, num_processes: int, rows_path: Path | None, progress: Callable[[int], None]
) -> Outcome:
    """Score the split in parts, one process each, and merge: the same sums as in one process."""
    if num_processes <= 1:
        return evaluate(truth, index, plan, 0, len(truth), rows_path, progress)
    bounds = [len(truth) * k // num_processes for k in range(num_processes + 1)]
    parts = [rows_path.with_suffix(f".part{k}") if rows_path else None for k in range(num_processes)]
    jobs = [(truth.folder, truth.split, index.paths, plan, bounds[k], bounds[k + 1], parts[k]) for k in range(num_processes)]
    whole = Outcome(Tally(plan), Calibration(), rows_path)
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for k, (sums, calibration) in enumerate(pool.map(_evaluate_part, jobs)):
            whole.tally.merge_state(sums)
            whole.calibration.merge(Calibration().load_state(calibration))
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


def _evaluate_part(job: tuple[Any, ...]) -> tuple[dict[str, Any], Any]:
    folder, split, paths, plan, start, stop, rows_path = job
    outcome = evaluate(open_truth(folder, split), index_predictions(paths), plan, start, stop, rows_path, lambda _: None)
    return outcome.tally.state(), outcome.calibration.state()


def _official_masks(protocol: Protocol, index: PredictionFiles, notes: list[str]) -> bool:
    if index.partial("mask_rle_input"):
        notes.append(
            f"official gres not computed: {index.partial('mask_rle_input')} of {index.statuses['ok']} predictions have no mask_rle_input "
            "(the mask at the model's input size, before any resize back)"
        )
        return False
    if index.partial("head") and not protocol.tasks["gres"].min_mask_pixels:
        notes.append(f"official gres not computed: {index.partial('head')} predictions have neither no_target nor no_target_prob")
        return False
    return True


def _row(truth: TruthFolder, record: ExpressionRecord, line: dict[str, Any] | None, plan: Plan, tally: Tally) -> Row:
    status = "missing" if line is None else line.get("status", "ok")
    row = Row(group_names(record), not record.targets, len(record.targets), status != "ok")
    answer = line if line is not None and status == "ok" else {}
    row.head = _head(answer)
    if any(plan.has("strict", task) for task in ("gres", "res")):
        _fill_masks(truth, record, answer, row, plan, tally)
    if plan.has("strict", "rvos"):
        row.frame = (record.ref_id, *_frame_scores(truth, record, answer, plan.protocol.tasks["rvos"].tolerance))
    if any(plan.has("strict", task) for task in ("grec", "rec")) and not row.wrong:
        wanted = [instance.box_xyxy for instance in truth.instances(record.image_id, record.targets)]
        row.boxes = (*prediction_boxes(answer), wanted, row.no_target, answer.get("count"))
    if plan.has("strict", "count") and not row.wrong:
        row.count = _count(answer)
    row.detail = {
        "expression_id": record.expression_id,
        "image_id": record.image_id,
        "num_targets": row.num_targets,
        "source": record.source,
        "tags": record.tags,
        "status": status,
        "count": row.count,
        "no_target_prob": answer.get("no_target_prob"),
    }
    return row


def _fill_masks(truth: TruthFolder, record: ExpressionRecord, answer: dict[str, Any], row: Row, plan: Plan, tally: Tally) -> None:
    gt = truth.mask(record.image_id, record.targets)
    if gt is None:
        tally.num_masks_absent += 1
        return
    tally.num_masks_found += bool(record.targets)
    image = truth.image(record.image_id)
    row.masks = _counts(record, answer.get("mask_rle"), gt, image.height, image.width)
    given = answer.get("mask_rle_input")
    if plan.has("official", "gres") and given is not None:
        code = _checked(record, given, None, None)
        size = (code["size"][0], code["size"][1])
        row.masks_input = overlap_counts(code, truth.mask(record.image_id, record.targets, size) or empty_rle(*size))
    elif plan.has("official", "gres"):
        row.masks_input = (0, 0, row.masks[2])  # no answer: what it missed is known at the original size only


def _frame_scores(truth: TruthFolder, record: ExpressionRecord, answer: dict[str, Any], tolerance: float) -> tuple[float, float]:
    gt, image = truth.mask(record.image_id, record.targets), truth.image(record.image_id)
    if gt is None:
        raise fault(f"{record.expression_id}: targets without a segmentation", "masks on every frame", "fix the data")
    if not answer:
        return 0.0, 0.0
    given = answer.get("mask_rle")
    pred = empty_rle(image.height, image.width) if given is None else _checked(record, given, image.height, image.width)
    pixels = decode_rle(pred), decode_rle(gt)
    return region(*pixels), contour(*pixels, tolerance)


def _counts(record: ExpressionRecord, rle: Any, gt: dict[str, Any], height: int, width: int) -> tuple[int, int, int]:
    pred = empty_rle(height, width) if rle is None else _checked(record, rle, height, width)
    return overlap_counts(pred, gt)


def _checked(record: ExpressionRecord, rle: Any, height: int | None, width: int | None) -> dict[str, Any]:
    try:
        return check_rle(rle, height, width)
    except GrexError as error:
        raise GrexError(f"prediction {record.expression_id} (image {record.image_id}): {error}") from None


def _count(answer: dict[str, Any]) -> int:
    value = answer.get("count")
    if type(value) is not int or value < 0:
        raise fault(f"{answer.get('expression_id')}: count {value!r}", "a whole number >= 0", "fix the line")
    return value


def _head(answer: dict[str, Any]) -> bool | None:
    """Return what the no-target head says: its decision, or its probability's argmax (a tie: "has a target"); None without."""
    value = answer.get("no_target")
    if value is None:
        return None if answer.get("no_target_prob") is None else _probability(answer) > ARGMAX
    if not isinstance(value, bool):
        raise fault(f"{answer.get('expression_id')}: no_target {value!r}", "true or false", "fix the line")
    return value


def _probability(line: dict[str, Any]) -> float:
    value = line["no_target_prob"]
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise fault(f"{line.get('expression_id')}: no_target_prob {value!r}", "a number in [0, 1]", "fix the line")
    return float(value)
