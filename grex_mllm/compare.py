"""Results side by side: per split and number of targets, with paired bootstrap intervals, in the papers' table layout, with published rows.

Intervals resample expressions (percentile method, 95 %), the same draws for all results, so that a difference's interval is a paired one.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from grex_mllm.errors import GrexError, fault
from grex_mllm.shipped import PUBLISHED_FOLDER

COLUMNS = {
    "gres": ("gIoU", "cIoU", "N_acc", "T_acc", "Pr@0.7", "Pr@0.8", "Pr@0.9"),
    "res": ("cIoU", "mIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9"),
    "grec": ("Pr@F1", "mean_F1", "N_acc", "T_acc"),
    "rec": ("Pr@0.5",),
    "count": ("accuracy", "mae"),
    "rvos": ("J&F", "J", "F"),
    "greg": ("METEOR", "CIDEr", "BLEU-4", "ROUGE-L", "SPICE", "round_trip_gIoU", "round_trip_Pr@F1", "correct"),
}
SAMPLED = {
    "gres": ("gIoU", "cIoU", "N_acc", "T_acc"),
    "grec": ("Pr@F1", "mean_F1", "N_acc", "T_acc"),
    "rec": ("Pr@0.5",),
    "count": ("accuracy",),
}
PERCENT_EXCEPT = ("mae",)
FORMATS = ("markdown", "latex", "csv")
NUM_DRAWS = 2000
CHUNK_CELLS = 4_000_000


@dataclass
class Table:
    """A table before it is written: header, rows of text, and what stands under it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


@dataclass
class Run:
    """One results.json. rows: per-sample rows by expression id, where they were written."""

    name: str
    results: dict[str, Any]
    rows: dict[str, dict[str, Any]]


def compare(
    results: Sequence[str | Path],
    *,
    format: str = "markdown",
    published: bool = True,
    any_protocol: bool = False,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> str:
    """Return the comparison of results.json files as Markdown, LaTeX or CSV text.

    published: add the rows of `eval/published/` (other data unless the dataset is the papers'). any_protocol: compare in spite of
    different protocol versions. Intervals appear where all results of a dataset and split have per-sample rows (`grex score --per-sample`).

    Raises:
        GrexError: a file is missing or no results.json, the format is unknown, or protocols differ.
    """
    if format not in FORMATS:
        raise fault(f'format "{format}"', ", ".join(FORMATS), "choose one of them")
    runs = _named([read_run(Path(path)) for path in results])
    if not any_protocol:
        _same_protocol(runs)
    tables = []
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        dataset = run.results["provenance"]["dataset"]
        groups.setdefault((str(dataset["name"]), str(dataset["split"])), []).append(run)
    for (dataset_name, split), members in groups.items():
        draws = Bootstrap(members, num_draws, seed) if all(m.rows for m in members) else None
        for task in COLUMNS:
            for protocol in ("strict", "official"):
                table = _task_table(members, task, protocol, f"{dataset_name} {split}", draws)
                if table is not None:
                    tables.append(table)
        tables += _bucket_tables(members, f"{dataset_name} {split}")
        tables += _difference_tables(members, draws, f"{dataset_name} {split}")
    if published:
        shown = {task for run in runs for block in run.results["results"].values() for task in block}
        tables += published_tables(shown)
    return {"markdown": _markdown, "latex": _latex, "csv": _csv}[format](tables)


def read_run(path: Path) -> Run:
    """Read a results.json and, where they were written, its per-sample rows.

    Raises:
        GrexError: missing, not JSON, or no results.
    """
    if not path.is_file():
        raise fault(f"results {path} do not exist", "a results.json of grex score", "give its path")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        results["provenance"]["dataset"], results["provenance"]["protocol"], results["results"]["strict"]
    except (ValueError, KeyError, TypeError) as error:
        raise fault(f"{path} is no results.json ({error!r})", "a file that grex score wrote", "score the predictions again") from None
    rows: dict[str, dict[str, Any]] = {}
    named = results["provenance"].get("samples")
    if named and (path.parent / named).is_file():
        with (path.parent / named).open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                rows[row["expression_id"]] = row
    return Run(path.parent.name if path.stem == "results" and path.parent.name else path.stem, results, rows)


class Bootstrap:
    """Paired resampling over the expressions that all runs have: for each run, task and metric, NUM_DRAWS values from the same draws."""

    def __init__(self, runs: list[Run], num_draws: int, seed: int) -> None:
        ids = sorted(set.intersection(*(set(run.rows) for run in runs)))
        self.num_samples = len(ids)
        self.values: dict[tuple[str, str, str, str], np.ndarray] = {}
        if not ids:
            return
        sums = {run.name: _columns([run.rows[k] for k in ids]) for run in runs}
        rng = np.random.default_rng(seed)
        chunk = max(1, min(num_draws, CHUNK_CELLS // len(ids)))
        parts: dict[tuple[str, str, str, str], list[np.ndarray]] = {}
        for start in range(0, num_draws, chunk):
            picks = rng.integers(0, len(ids), (min(chunk, num_draws - start), len(ids)))
            weights = np.stack([np.bincount(p, minlength=len(ids)) for p in picks]).astype(np.float64)
            for name, columns in sums.items():
                for key, (above, below) in columns.items():
                    with np.errstate(divide="ignore", invalid="ignore"):
                        parts.setdefault((name, *key), []).append((weights @ above) / (weights @ below))
        self.values = {key: np.concatenate(found) for key, found in parts.items()}

    def interval(self, run: str, task: str, protocol: str, metric: str, other: str | None = None) -> tuple[float, float] | None:
        """Return the 95 % interval of a metric, or of its difference to another run; None where it is not defined."""
        values = self.values.get((run, task, protocol, metric))
        if values is None:
            return None
        if other is not None:
            base = self.values.get((other, task, protocol, metric))
            if base is None:
                return None
            values = values - base
        finite = values[np.isfinite(values)]
        if not len(finite):
            return None
        low, high = np.percentile(finite, [2.5, 97.5])
        return float(low), float(high)


def published_tables(tasks: Iterable[str], folder: Path = PUBLISHED_FOLDER) -> list[Table]:
    """Return the published rows of some tasks, one table each, with paper and table."""
    tables = []
    for file in sorted(folder.glob("*.json")):
        for entry in json.loads(file.read_text(encoding="utf-8"))["tables"]:
            if entry["task"] not in tasks:
                continue
            names = [c for c in COLUMNS[entry["task"]] if any(c in row["values"] for row in entry["rows"])]
            splits = list(dict.fromkeys(row["split"] for row in entry["rows"]))
            header = ["published", *(f"{split} {_shown(name)}" for split in splits for name in names)]
            cells: dict[str, dict[str, str]] = {}
            for row in entry["rows"]:
                for name in names:
                    if name in row["values"]:
                        cells.setdefault(row["method"], {})[f"{row['split']} {_shown(name)}"] = f"{row['values'][name]:g}"
            used = [h for h in header[1:] if any(h in c for c in cells.values())]
            rows = [[method, *(found.get(h, "") for h in used)] for method, found in cells.items()]
            title = f"published, {entry['dataset']} (other data unless scored on it)"
            tables.append(Table(title, ["method", *used], rows, [f"source: {entry['source']}"]))
    return tables


def _columns(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], tuple[np.ndarray, np.ndarray]]:
    """Return, by (task, protocol, metric), the per-sample numerators and denominators whose sums' ratio is the metric."""
    none = np.array([row["num_targets"] == 0 for row in rows])
    ones = np.ones(len(rows))
    found: dict[tuple[str, str, str], tuple[np.ndarray, np.ndarray]] = {}
    for protocol in ("strict", "official"):
        blocks = [row.get(protocol, {}) for row in rows]
        if all("iou" in b for b in blocks):
            rejected = np.array([b["no_target"] for b in blocks])
            found["gres", protocol, "gIoU"] = (np.array([b["iou"] for b in blocks]), ones)
            found["gres", protocol, "cIoU"] = tuple(np.array([b[k] for b in blocks], np.float64) for k in ("intersection", "union"))  # type: ignore[assignment]
            found["gres", protocol, "N_acc"] = ((none & rejected).astype(float), none.astype(float))
            found["gres", protocol, "T_acc"] = ((~none & ~rejected).astype(float), (~none).astype(float))
        if all("f1" in b for b in blocks):
            rejected = np.array([b["box_no_target"] for b in blocks])
            found["grec", protocol, "Pr@F1"] = (np.array([float(b["correct"]) for b in blocks]), ones)
            found["grec", protocol, "mean_F1"] = (np.array([b["f1"] for b in blocks]), ones)
            found["grec", protocol, "N_acc"] = ((none & rejected).astype(float), none.astype(float))
            found["grec", protocol, "T_acc"] = ((~none & ~rejected).astype(float), (~none).astype(float))
        if any("rec_correct" in b for b in blocks):
            single = np.array([row["num_targets"] == 1 for row in rows], float)
            found["rec", protocol, "Pr@0.5"] = (np.array([float(b.get("rec_correct", False)) for b in blocks]), single)
    if any(row["count"] is not None for row in rows):
        right = [row["count"] is not None and min(row["count"], 6) == min(row["num_targets"], 6) for row in rows]
        found["count", "strict", "accuracy"] = (np.array(right, float), ones)
    return found


def _task_table(runs: list[Run], task: str, protocol: str, where: str, draws: Bootstrap | None) -> Table | None:
    blocks = [(run.name, run.results["results"].get(protocol, {}).get(task)) for run in runs]
    if task == "greg":
        blocks = [(f"{name}, {part}", block.get(part)) for name, block in blocks if block for part in ("single", "multi", "all")]
    if protocol == "strict":
        for name, baseline in runs[0].results["baselines"].items():
            blocks.append((f"dummy: {name}", baseline.get(task)))
    present = [(name, block) for name, block in blocks if block]
    if not any(not name.startswith("dummy") for name, _ in present):
        return None
    names = [c for c in COLUMNS[task] if any(c in block for _, block in present)]
    rows = []
    for name, block in present:
        cells = [_number(block.get(c), c) for c in names]
        if draws is not None:
            cells = [cell + _interval(draws.interval(name, task, protocol, c), c) for cell, c in zip(cells, names, strict=True)]
        rows.append([name, str(block.get("num_samples", "")), _number(block.get("no_target_share"), "f0"), *cells])
    notes = [] if draws is None or task not in SAMPLED else [f"[95 % intervals, {draws.num_samples} expressions resampled]"]
    return Table(f"{where}: {task}, {protocol}", ["system", "N", "f0", *map(_shown, names)], rows, notes)


def _bucket_tables(runs: list[Run], where: str) -> list[Table]:
    tables = []
    for task, metric in (("gres", "gIoU"), ("grec", "Pr@F1"), ("count", "accuracy")):
        buckets = [b for b in ("0", "1", "2", "3+") if any(task in r.results["by_num_targets"].get(b, {}) for r in runs)]
        rows = [
            [run.name, *(_number(run.results["by_num_targets"].get(b, {}).get(task, {}).get(metric), metric) for b in buckets)]
            for run in runs
        ]
        if buckets:
            tables.append(Table(f"{where}: {task} {_shown(metric)} by number of targets, strict", ["system", *buckets], rows))
    return tables


def _difference_tables(runs: list[Run], draws: Bootstrap | None, where: str) -> list[Table]:
    if draws is None or len(runs) < 2:
        return []
    rows = []
    base = runs[0].name
    for run in runs[1:]:
        for task, names in SAMPLED.items():
            for metric in names:
                interval = draws.interval(run.name, task, "strict", metric, base)
                mine = run.results["results"]["strict"].get(task, {}).get(metric)
                other = runs[0].results["results"]["strict"].get(task, {}).get(metric)
                if interval is not None and mine is not None and other is not None:
                    verdict = "yes" if interval[0] > 0 or interval[1] < 0 else "no"
                    rows.append([f"{run.name} - {base}", f"{task} {_shown(metric)}", f"{100 * (mine - other):+.2f}"])
                    rows[-1] += [f"[{100 * interval[0]:+.2f}, {100 * interval[1]:+.2f}]", verdict]
    header = ["difference", "metric (strict)", "points", "95 % interval, paired", "beyond chance"]
    return [Table(f"{where}: differences", header, rows, [f"{draws.num_samples} expressions, the same draws for both"])] if rows else []


def _same_protocol(runs: list[Run]) -> None:
    kinds = {(p["name"], p["version"], json.dumps(p["tasks"], sort_keys=True)) for p in (r.results["provenance"]["protocol"] for r in runs)}
    if len(kinds) > 1:
        named = ", ".join(
            f"{run.name}: {run.results['provenance']['protocol']['name']} v{run.results['provenance']['protocol']['version']}"
            for run in runs
        )
        raise GrexError(
            f"results under different protocols ({named}); expected one protocol, version and rules; "
            "score again under one, or compare in spite of it with --any-protocol"
        )


def _named(runs: list[Run]) -> list[Run]:
    seen: dict[str, int] = {}
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        if seen[run.name] > 1:
            run.name = f"{run.name} ({seen[run.name]})"
    return runs


def _shown(name: str) -> str:
    return {"N_acc": "N-acc", "T_acc": "T-acc", "mean_F1": "mean F1", "accuracy": "acc", "mae": "MAE"}.get(name, name.replace("_", " "))


def _number(value: Any, name: str) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if name in PERCENT_EXCEPT else f"{100 * value:.2f}"


def _interval(interval: tuple[float, float] | None, name: str) -> str:
    if interval is None or name in PERCENT_EXCEPT:
        return ""
    return f" [{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]"


def _markdown(tables: list[Table]) -> str:
    blocks = []
    for table in tables:
        lines = [f"**{table.title}**", "", _bar(table.header), _bar(["---", *["---:"] * (len(table.header) - 1)])]
        lines += [_bar(row) for row in table.rows]
        blocks.append("\n".join(lines + [""] + table.notes if table.notes else lines))
    return "\n\n".join(blocks) + "\n"


def _bar(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _latex(tables: list[Table]) -> str:
    blocks = []
    for table in tables:
        lines = ["\\begin{table}[t]", "\\centering", f"\\caption{{{_tex(' '.join([table.title, *table.notes]))}}}"]
        lines += [
            f"\\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
            "\\toprule",
            " & ".join(map(_tex, table.header)) + " \\\\",
            "\\midrule",
        ]
        lines += [" & ".join(map(_tex, row)) + " \\\\" for row in table.rows]
        blocks.append("\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}"]))
    return "\n\n".join(blocks) + "\n"


def _tex(text: str) -> str:
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"} | {c: f"\\{c}" for c in "&%$#_{}"}
    return "".join(special.get(c, c) for c in text)


def _csv(tables: list[Table]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for table in tables:
        writer.writerow([f"# {table.title}", *table.notes])
        writer.writerow(table.header)
        writer.writerows(table.rows)
        writer.writerow([])
    return out.getvalue()
