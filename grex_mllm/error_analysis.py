"""Where the points are lost: every expression gets one outcome, which share the loss of gIoU and Pr@F1; with picture sheets.

And what a no-target threshold, or answering only where the model is sure, would give: `selection`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from grex_mllm.compare import Run, read_run, share_of
from grex_mllm.errors import fault
from grex_mllm.metrics import METRICS, entry, in_order
from grex_mllm.metrics.selective import no_target_at_thresholds, risk_coverage
from grex_mllm.score.calibration_plot import write_calibration_plot, write_risk_coverage_plot

POOR_MASK = 0.5
GOOD_MASK = 0.9
PER_SHEET = 12
OUTCOMES = {
    "unanswered": "missing, refused or unreadable answers",
    "no_target_missed": "something was given although there is no target",
    "target_rejected": '"no target" was said although there is one',
    "wrong_count": "another number of boxes than targets",
    "wrong_instance": "the right number of boxes, not all on the targets (without boxes: mask IoU below 0.1)",
    "poor_mask": f"the right instances, mask IoU below {POOR_MASK}",
    "rough_mask": f"mask IoU from {POOR_MASK} to {GOOD_MASK}",
    "right": "nothing lost, or next to nothing",
}
WRONG_PLACE = 0.1
LIKELIER = 0.5  # probability above which one of two is the likelier


def errors(
    results: str | Path, out: str | Path = "errors", *, data: str | Path | None = None, predictions: str | Path | None = None
) -> str:
    """Write `errors.json` (counts, shares of the loss, examples) into `out` and return the table as text.

    data, predictions: the dataset folder and our predictions.jsonl; with both, a picture sheet of each outcome's worst cases too.

    Raises:
        GrexError: the results have no per-sample rows (score again with --per-sample).
    """
    run = read_run(Path(results))
    if not run.rows:
        raise fault(f"{results} without per-sample rows", "the .samples.jsonl beside it", "run grex score again with --per-sample")
    found = analyse(run)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    if data is not None:
        found["sheets"] = write_sheets(run, found, folder, Path(data), Path(predictions) if predictions is not None else None)
    if run.results.get("calibration"):
        found.setdefault("sheets", {})["calibration"] = str(write_calibration_plot(run.results["calibration"], folder / "calibration.svg"))
    if (chances := selection(run)) is not None:
        found["selection"] = chances
        found.setdefault("sheets", {})["risk_coverage"] = str(write_risk_coverage_plot(chances, folder / "risk_coverage.svg"))
    (folder / "errors.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return as_text(found)


def outcome(row: dict[str, Any]) -> str:
    """Return the name of what happened to one expression (strict protocol), the gravest first."""
    block = row.get("strict", {})
    if row["status"] != "ok":
        return "unanswered"
    says_none = block.get("no_target", block.get("box_no_target"))
    if row["num_targets"] == 0:
        clean = says_none and block.get("box_no_target", True)
        return "right" if clean else "no_target_missed"
    if says_none or block.get("box_no_target"):
        return "target_rejected"
    if "kept" in block and block["kept"] != row["num_targets"]:
        return "wrong_count"
    found = block.get("tp", row["num_targets"]) >= row["num_targets"] and block.get("rec_correct", True)
    iou = block.get("iou", block.get("res_iou", 1.0))
    if not found or iou < WRONG_PLACE:
        return "wrong_instance"
    if iou < POOR_MASK:
        return "poor_mask"
    return "rough_mask" if iou < GOOD_MASK else "right"


def analyse(run: Run) -> dict[str, Any]:
    """Return, for every outcome: count, share, points of each headline lost, shares by number of targets and tag, and the worst ids."""
    rows = [row for row in run.rows.values() if "strict" in row]  # others are no part of any metric
    num = len(rows)
    ours = in_order(METRICS.keys() & run.results["results"]["strict"])  # a file from elsewhere imports nothing
    heads = [column for task in ours if (column := entry(task).COLUMNS[0]).share and column.higher_is_better]
    whole = {column.key: sum(share_of(column, row, "strict")[1] for row in rows) for column in heads}
    groups: dict[str, list[dict[str, Any]]] = {name: [] for name in OUTCOMES}
    for row in rows:
        groups[outcome(row)].append(row)
    tags = Counter(tag for row in rows for tag in row["tags"])
    table = {}
    for name, members in groups.items():
        members.sort(key=lambda row: (row.get("strict", {}).get("iou", 0.0), row.get("strict", {}).get("f1", 0.0), row["expression_id"]))
        about: dict[str, Any] = {"meaning": OUTCOMES[name], "count": len(members), "share": len(members) / num}
        for column in heads:
            shares = [share_of(column, row, "strict") for row in members]
            about[f"{column.key}_lost"] = sum(below - above for above, below in shares) / (whole[column.key] or 1)
        about["by_num_targets"] = dict(sorted(Counter(str(min(row["num_targets"], 3)) for row in members).items()))
        about["by_tag_share"] = {tag: c / tags[tag] for tag, c in sorted(Counter(t for row in members for t in row["tags"]).items())}
        about["examples"] = [row["expression_id"] for row in members[:PER_SHEET]]
        table[name] = about
    return {"num_samples": num, "outcomes": table}


def selection(run: Run) -> dict[str, Any] | None:
    """Return risk-coverage curves and the accuracies at no-target thresholds; None where no answer has a no-target probability.

    The confidence is the probability of the likelier of "target" and "no target". `decision`: the loss is 1 where this decision is wrong;
    `mask`: the loss is 1 - IoU under the strict protocol, no-target expressions included (as in gIoU). num_without: expressions left out
    because they have no probability (missing and unreadable answers, systems without one).
    """
    rows = [row for row in run.rows.values() if row.get("no_target_prob") is not None]
    if not rows:
        return None
    prob, none = [float(row["no_target_prob"]) for row in rows], [row["num_targets"] == 0 for row in rows]
    sure = [max(p, 1 - p) for p in prob]
    found: dict[str, Any] = {
        "num_samples": len(rows),
        "num_without": len(run.rows) - len(rows),
        "decision": risk_coverage(sure, [float((p > LIKELIER) != n) for p, n in zip(prob, none, strict=True)]),
    }
    if all("iou" in row.get("strict", {}) for row in rows):
        found["mask"] = risk_coverage(sure, [1 - row["strict"]["iou"] for row in rows])
    return found | {"thresholds": no_target_at_thresholds(prob, none)}


def as_text(found: dict[str, Any]) -> str:
    """Return the outcomes as a Markdown table, most points lost first."""
    names = [key for key in next(iter(found["outcomes"].values())) if key.endswith("_lost")]
    lines = [f"Where the points of {found['num_samples']} expressions are lost (strict protocol, percent)", ""]
    header = ["outcome", "count", "share", *(name.replace("_", " ") for name in names), "meaning"]
    lines += ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 2) + " --- |"]
    ranked = sorted(found["outcomes"].items(), key=lambda item: (item[0] == "right", -max([item[1][n] for n in names] or [0.0])))
    for name, about in ranked:
        numbers = [str(about["count"]), f"{100 * about['share']:.2f}", *(f"{100 * about[n]:.2f}" for n in names)]
        lines.append("| " + " | ".join([name, *numbers, about["meaning"]]) + " |")
    if "selection" in found:
        lines += _selection_text(found["selection"])
    sheets = [f"{name}: {path}" for name, path in found.get("sheets", {}).items()]
    return "\n".join([*lines, "", *sheets] if sheets else lines)


def _selection_text(chances: dict[str, Any]) -> list[str]:
    lines = ["", f'"No target" said above a probability (predict.no_target_threshold), {chances["num_samples"]} expressions, percent', ""]
    names = ("N_acc", "T_acc", "answered", "risk")
    lines += ["| threshold | " + " | ".join(name.replace("_", "-") for name in names) + " |", "| ---: |" + " ---: |" * len(names)]
    for about in chances["thresholds"]:
        numbers = ["-" if about[name] is None else f"{100 * about[name]:.2f}" for name in names]
        lines.append(f"| {about['threshold']:.2f} | " + " | ".join(numbers) + " |")
    for name, words in (("decision", "wrong target/no-target decisions"), ("mask", "1 - IoU")):
        if name in chances:
            lines += ["", f"risk-coverage, {words}: area {100 * chances[name]['AURC']:.2f}, risk of all {100 * chances[name]['risk']:.2f}"]
    return lines


def write_sheets(run: Run, found: dict[str, Any], folder: Path, data: Path, predictions: Path | None) -> dict[str, str]:
    """Write one picture sheet for each outcome with examples: ground truth left, answer right, the expression above; return their paths."""
    from grex_mllm.data.records import load_dataset
    from grex_mllm.draw import contact_sheet, save_png
    from grex_mllm.score.reading import index_predictions

    dataset = load_dataset(data)
    wanted = {key for about in found["outcomes"].values() for key in about["examples"]}
    records = {record.expression_id: record for record in dataset.expressions if record.expression_id in wanted}
    index = index_predictions([predictions]) if predictions is not None else None
    sheets = {}
    for name, about in found["outcomes"].items():
        pictures = []
        for key in about["examples"]:
            if key in records:
                line = index.find(key) if index is not None else None
                pictures += _pair(dataset, records[key], line, run.rows[key])
        if pictures:
            sheets[name] = str(save_png(contact_sheet(pictures, columns=4), folder / f"{name}.png"))
    return sheets


def _pair(dataset: Any, record: Any, line: dict[str, Any] | None, row: dict[str, Any]) -> list[Any]:
    import numpy as np

    from grex_mllm.data.images import load_image, resolve_image
    from grex_mllm.draw import TRUTH, overlay
    from grex_mllm.ops.masks import decode_rle, segmentation_to_mask

    image_record = dataset.images[record.image_id]
    image = load_image(resolve_image(dataset.image_root, image_record.file))
    targets = [i for i in image_record.instances if i.annotation_id in record.targets]
    height, width = image_record.height, image_record.width
    gt = np.zeros((height, width), bool)
    for instance in targets:
        if instance.segmentation is not None:
            gt |= segmentation_to_mask(instance.segmentation, height, width)
    boxes = [i.box_xyxy for i in targets]
    pictures = [overlay(image, gt, boxes, len(targets), f"truth: {record.expression}", colour=TRUTH)]
    if line is not None:
        mask = decode_rle(line["mask_rle"], height, width) if line.get("mask_rle") else None
        block = row.get("strict", {})
        text = f"answer ({row['status']}), IoU {block.get('iou', float('nan')):.2f}, F1 {block.get('f1', float('nan')):.2f}"
        pictures.append(overlay(image, mask, line.get("boxes_xyxy") or [], line.get("count"), text, no_target=bool(line.get("no_target"))))
    return pictures
