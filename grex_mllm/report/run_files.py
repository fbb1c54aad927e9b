"""Read what a run left behind: configuration, training log, results, predictions. A missing part is said on the page, not an error."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grex_mllm.errors import fault
from grex_mllm.metrics.language import OTHER_WAYS

TASKS = {"ground": "grounding", "grounding": "grounding", "generate": "generation", "generation": "generation", "describe": "generation"}
GenerationKey = tuple[str, tuple[str, ...]]


@dataclass
class LogSeries:
    """One number over the steps of one task. points: (step, value), in the order of the file."""

    task: str
    name: str
    points: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class RunFiles:
    """Everything of a run that the page shows.

    grounding: expression id -> line. generation: (image id, sorted targets) -> way of choosing ("greedy", "listener", ...) -> line.
    notes: what was missing or unreadable, in sentences.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    losses: list[LogSeries] = field(default_factory=list)
    rates: list[LogSeries] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    grounding: dict[str, dict[str, Any]] = field(default_factory=dict)
    generation: dict[GenerationKey, dict[str, dict[str, Any]]] = field(default_factory=dict)
    published: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_run(run_dir: Path, published_dir: Path | None = None) -> RunFiles:
    """Read config.yaml, log.jsonl, results.json, predictions*.jsonl of `run_dir` and the published numbers.

    Raises:
        GrexError: the folder does not exist, or holds none of these files.
    """
    if not run_dir.is_dir():
        raise fault(f"run folder {run_dir}", "an existing folder of a training or prediction run", "give the folder that grex train wrote")
    run = RunFiles(name=run_dir.resolve().name)
    config = _parsed(run_dir / "config.yaml", run, "YAML", "the configuration is unknown.")
    has_log = _read_log(run_dir, run)
    results = _parsed(run_dir / "results.json", run, "JSON", "grex score has not run on the predictions.")
    run.config, run.results = config or {}, results or {}
    if not (_read_predictions(run_dir, run) or has_log) and config is None and results is None:
        given = f"run folder {run_dir} holds no config.yaml, log.jsonl, results.json or predictions.jsonl"
        raise fault(given, "at least one of them", "run grex train, grex predict and grex score first")
    if published_dir is not None:
        for file in sorted(published_dir.glob("*.json")):
            run.published.extend(_read_published(file, run.notes))
    return run


def read_json_lines(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file; lines that are no JSON object (a torn last line) are counted in `notes`."""
    rows, bad = [], 0
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += 1
    if bad:
        notes.append(f"{file.name}: {bad} of {bad + len(rows)} lines are no JSON object and were left out.")
    return rows


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return {"a.b.c": leaf} of nested dictionaries."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parsed(file: Path, run: RunFiles, kind: str, absent: str) -> dict[str, Any] | None:
    """Return the content of a YAML or JSON file; None, with a note, where there is none that can be read."""
    import yaml

    if not file.is_file():
        run.notes.append(f"{file.name} is not there: {absent}")
        return None
    text = file.read_text(encoding="utf-8")
    try:
        content = yaml.safe_load(text) if kind == "YAML" else json.loads(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        run.notes.append(f"{file.name} is not valid {kind}: {error}")
        return None
    return content if isinstance(content, dict) else {}


def _read_log(run_dir: Path, run: RunFiles) -> bool:
    """Sort the numbers of log.jsonl into losses ("loss/ground/mask") and rates. Where a step occurs twice, the last writing counts."""
    file = run_dir / "log.jsonl"
    if not file.is_file():
        run.notes.append("log.jsonl is not there: no training curves.")
        return False
    losses: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
    rates: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
    for row in read_json_lines(file, run.notes):
        step, default = row.get("step"), TASKS.get(str(row.get("task", "")), "training")
        numbers = {path: value for path, value in row.items() if path != "step" and is_number(value) and math.isfinite(value)}
        for path, value in numbers.items() if is_number(step) else ():
            parts = path.split("/")
            first, name = parts[0], parts[-1]
            if first == "validation":
                losses["validation", path.partition("/")[2]][float(row["step"])] = float(value)
            elif first == "loss":
                task = next((TASKS[part] for part in parts if part in TASKS), default)
                losses[task, name][float(row["step"])] = float(value)
            else:
                rates["training", f"learning rate {name}" if first == "lr" else name][float(row["step"])] = float(value)
    run.losses = [LogSeries(task, name, sorted(points.items())) for (task, name), points in losses.items()]
    run.rates = [LogSeries(task, name, sorted(points.items())) for (task, name), points in rates.items()]
    return bool(losses or rates)


def _read_predictions(run_dir: Path, run: RunFiles) -> bool:
    files = sorted(run_dir.glob("predictions*.jsonl"))
    if not files:
        run.notes.append("predictions.jsonl is not there: grex predict has not run, so there are no pictures.")
    for file in files:
        way = file.stem.removeprefix("predictions").strip("_-.")
        for row in read_json_lines(file, run.notes):
            if "expression_id" in row:
                run.grounding[str(row["expression_id"])] = row
            elif "targets" in row and "image_id" in row:
                key = (str(row["image_id"]), tuple(sorted(str(target) for target in row["targets"])))
                ways = run.generation.setdefault(key, {})
                ways[way or "greedy"] = row
                ways |= {name: row[name] for name in OTHER_WAYS if isinstance(row.get(name), dict)}
    return bool(files)


def _read_published(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the tables of one file: each with "task", "rows", and what describes them."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        notes.append(f"{file.name} of the published numbers is not valid JSON: {error}")
        return []
    tables = content.get("tables", [content])
    return [
        {"task": file.stem.split("_")[0], **table} for table in tables if isinstance(table, dict) and isinstance(table.get("rows"), list)
    ]
