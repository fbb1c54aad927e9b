"""Read what a run left behind: configuration, training log, results, predictions. A missing part is said on the page, not an error."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grex_mllm.errors import fault

TASKS = {"ground": "grounding", "grounding": "grounding", "generate": "generation", "generation": "generation", "describe": "generation"}
# What a log line holds besides loss terms. Names of rates, times and sizes are known by their ends.
NOT_A_LOSS = {
    "step",
    "task",
    "epoch",
    "lr",
    "grad_norm",
    "progress",
    "loss_scale",
    "scale",
    "num_expressions",
    "num_images",
    "time",
    "learning_rate",
}
NOT_A_LOSS_ENDS = ("_per_s", "_s", "_bytes", "_mb", "_gb", "_norm", "_lr")
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
    found = [_read_config(run_dir, run), _read_log(run_dir, run), _read_results(run_dir, run), _read_predictions(run_dir, run)]
    if not any(found):
        raise fault(
            f"run folder {run_dir} holds no config.yaml, log.jsonl, results.json or predictions.jsonl",
            "at least one of them",
            "run grex train, grex predict and grex score first",
        )
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


def _read_config(run_dir: Path, run: RunFiles) -> bool:
    import yaml

    file = run_dir / "config.yaml"
    if not file.is_file():
        run.notes.append("config.yaml is not there: the configuration is unknown.")
        return False
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        run.notes.append(f"config.yaml is not valid YAML: {error}")
        return False
    run.config = config if isinstance(config, dict) else {}
    return True


def _read_results(run_dir: Path, run: RunFiles) -> bool:
    file = run_dir / "results.json"
    if not file.is_file():
        run.notes.append("results.json is not there: grex score has not run on the predictions.")
        return False
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        run.notes.append(f"results.json is not valid JSON: {error}")
        return False
    run.results = results if isinstance(results, dict) else {}
    return True


def _read_log(run_dir: Path, run: RunFiles) -> bool:
    """Sort the numbers of log.jsonl into losses and rates. After a resume a step can occur twice: the last writing of it counts."""
    file = run_dir / "log.jsonl"
    if not file.is_file():
        run.notes.append("log.jsonl is not there: no training curves.")
        return False
    losses: dict[tuple[str, str], dict[float, float]] = {}
    rates: dict[tuple[str, str], dict[float, float]] = {}
    for row in read_json_lines(file, run.notes):
        step = row.get("step")
        if step is None or not is_number(step):
            continue
        for task, name, value, is_loss in _numbers_of(row):
            series = (losses if is_loss else rates).setdefault((task, name), {})
            series[float(step)] = value
    run.losses = [LogSeries(task, name, sorted(points.items())) for (task, name), points in losses.items()]
    run.rates = [LogSeries(task, name, sorted(points.items())) for (task, name), points in rates.items()]
    return bool(losses or rates)


def _numbers_of(row: dict[str, Any]) -> list[tuple[str, str, float, bool]]:
    """Return (task, name, value, is a loss) for each number of a log line: "loss/ground/mask", nested dictionaries, or flat."""
    default = TASKS.get(str(row.get("task", "")), "training")
    numbers: list[tuple[str, str, float, bool]] = []
    for path, value in flatten(row).items():
        parts = path.replace("/", ".").split(".")
        name = parts[-1]
        if not is_number(value) or name == "step" or value != value or abs(value) == float("inf"):
            continue
        if parts[0] == "validation":
            numbers.append(("validation", path.partition("/")[2], float(value), True))
        elif "lr" in parts[:-1]:
            numbers.append(("training", f"learning rate {name}", float(value), False))
        elif name in NOT_A_LOSS or name.endswith(NOT_A_LOSS_ENDS) or "memory" in parts:
            numbers.append(("training", name, float(value), False))
        else:
            task = next((TASKS[part] for part in parts if part in TASKS), default)
            numbers.append((task, name.removeprefix("loss_"), float(value), True))
    return numbers


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
                if isinstance(row.get("listener"), dict):
                    ways["listener"] = row["listener"]
    return bool(files)


def _read_published(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the tables of one file: each with "task", "rows", and what describes them."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        notes.append(f"{file.name} of the published numbers is not valid JSON: {error}")
        return []
    tables = content if isinstance(content, list) else content.get("tables", [content])
    return [
        {"task": file.stem.split("_")[0], **table} for table in tables if isinstance(table, dict) and isinstance(table.get("rows"), list)
    ]
