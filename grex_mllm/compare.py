"""Results side by side: per split and number of targets, with paired bootstrap intervals, in the papers' table layout, with published rows.

Intervals resample expressions (percentile method, 95 %), the same draws for all results, so that a difference's interval is a paired one.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from grex_mllm.errors import GrexError, fault
from grex_mllm.metrics import METRICS, entry, in_order
from grex_mllm.metrics.columns import Column, columns, parts, raw_columns
from grex_mllm.shipped import PUBLISHED_FOLDER

PROTOCOLS = ("strict", "official")
FORMATS = ("markdown", "latex", "csv")  # of this module; `report/models.py` writes html
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
    metrics: Sequence[str] = (),
    spread: bool = False,
    num_draws: int = NUM_DRAWS,
    seed: int = 0,
) -> str:
    """Return the comparison of results.json files as Markdown, LaTeX or CSV text.

    published: add the rows of `eval/published/` (other data unless the dataset is the papers'). any_protocol: compare in spite of
    different protocol versions. metrics: dotted paths of metrics that are imported beside METRICS; of others, which a file from elsewhere
    may name, the raw numbers are shown. spread: add mean and spread over runs of one model, see `spread_tables`.
    Intervals appear where all results of a dataset and split have per-sample rows.

    Raises:
        GrexError: a file is missing or no results.json, the format is unknown, or protocols differ.
    """
    if format not in FORMATS:
        raise fault(f'format "{format}"', ", ".join(FORMATS), "choose one of them")
    runs, known = read_runs(results, metrics, any_protocol)
    tables = []
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        dataset = run.results["provenance"]["dataset"]
        groups.setdefault((str(dataset["name"]), str(dataset["split"])), []).append(run)
    for members in groups.values():
        tables += compare_tables(members, known, Bootstrap(members, num_draws, seed, known) if all(m.rows for m in members) else None)
        tables += spread_tables(members, known) if spread else []
    if published:
        shown = {task for run in runs for block in run.results["results"].values() for task in block}
        tables += published_tables(shown)
    return {"markdown": _markdown, "latex": _latex, "csv": _csv}[format](tables)


def read_runs(results: Sequence[str | Path], metrics: Sequence[str], any_protocol: bool) -> tuple[list[Run], set[str]]:
    """Return the runs, each with a name of its own, and the metrics that may be imported; arguments and faults as for `compare`."""
    known = {*METRICS, *(name for name in metrics if entry(name))}
    runs = _named([read_run(Path(path)) for path in results])
    if not any_protocol:
        _same_protocol(runs)
    return runs, known


def compare_tables(runs: list[Run], known: Collection[str], draws: Bootstrap | None) -> list[Table]:
    """Return the tables of runs on one dataset and split. known: metrics that may be imported.  draws: for intervals."""
    dataset = runs[0].results["provenance"]["dataset"]
    where = f"{dataset['name']} {dataset['split']}"
    found = []
    for task in in_order({task for run in runs for block in run.results["results"].values() for task in block}):
        found += [_task_table(runs, task, protocol, where, draws, known) for protocol in PROTOCOLS]
    return [t for t in found if t is not None] + _bucket_tables(runs, where, known) + _difference_tables(runs, draws, where, known)


def spread_tables(runs: list[Run], known: Collection[str]) -> list[Table]:
    """Return mean, standard deviation (of the sample), least and most of every number over the runs of one model: prompts, seeds, repeats.

    Runs that say who answered (`by`) belong together where the model is the same; all others belong together.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        by = run.results["provenance"]["predictions"].get("by") or [""]
        groups.setdefault(by[0].partition(",")[0], []).append(run)
    tables = []
    for name, members in groups.items():
        blocks = [run.results["results"]["strict"] for run in members]
        for task in in_order({task for block in blocks for task in block if task in known}) if len(members) > 1 else ():
            values = {c: [v for b in blocks if (v := c.find(b.get(task))) is not None] for c in columns(entry(task), "report")}
            shown = {column: found for column, found in values.items() if len(found) == len(members)}
            ways = {c: (np.mean(found), np.std(found, ddof=1), min(found), max(found)) for c, found in shown.items()}
            names = ("mean", "standard deviation", "least", "most")
            rows = [[way, *(column.text(float(numbers[n])) for column, numbers in ways.items())] for n, way in enumerate(names)]
            title = f"{name or 'all'}: {task}, strict, over {len(members)} runs"
            notes = [f"runs: {', '.join(run.name for run in members)}"]
            tables += [Table(title, ["", *(column.name for column in shown)], rows, notes)] if shown else []
    return tables


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

    def __init__(self, runs: list[Run], num_draws: int, seed: int, known: Collection[str] = METRICS) -> None:
        ids = sorted(set.intersection(*(set(run.rows) for run in runs)))
        self.num_samples = len(ids)
        self.values: dict[tuple[str, str, str, str], np.ndarray] = {}
        if not ids:
            return
        sums = {run.name: _shares(run, [run.rows[k] for k in ids], known) for run in runs}
        rng = np.random.default_rng(seed)
        chunk = max(1, min(num_draws, CHUNK_CELLS // len(ids)))
        parts: dict[tuple[str, str, str, str], list[np.ndarray]] = {}
        for start in range(0, num_draws, chunk):
            picks = rng.integers(0, len(ids), (min(chunk, num_draws - start), len(ids)))
            weights = np.stack([np.bincount(p, minlength=len(ids)) for p in picks]).astype(np.float64)
            for name, shares in sums.items():
                for key, (above, below) in shares.items():
                    with np.errstate(divide="ignore", invalid="ignore"):
                        parts.setdefault((name, *key), []).append((weights @ above) / (weights @ below))
        self.values = {key: np.concatenate(found) for key, found in parts.items()}

    def interval(self, run: str, task: str, protocol: str, metric: str, other: str | None = None) -> tuple[float, float] | None:
        """Return the 95 % interval of a metric, or of its difference to another run; None where it is not defined."""
        values = [self.values.get((name, task, protocol, metric), np.zeros(0)) for name in (run, other) if name is not None]
        if not all(map(len, values)):
            return None
        drawn = values[0] - values[1] if other is not None else values[0]
        finite = drawn[np.isfinite(drawn)]
        if not len(finite):
            return None
        low, high = np.percentile(finite, [2.5, 97.5])
        return float(low), float(high)


def published_tables(tasks: Iterable[str], folder: Path = PUBLISHED_FOLDER) -> list[Table]:
    """Return the published rows of some tasks, one table each, with paper and table."""
    tables = []
    for file in sorted(folder.glob("*.json")):
        for found in json.loads(file.read_text(encoding="utf-8"))["tables"]:
            if found["task"] not in tasks or found["task"] not in METRICS:
                continue
            names = [c for c in columns(entry(found["task"]), "compare") if any(c.key in row["values"] for row in found["rows"])]
            splits = list(dict.fromkeys(row["split"] for row in found["rows"]))
            header = ["published", *(f"{split} {column.name}" for split in splits for column in names)]
            cells: dict[str, dict[str, str]] = {}
            for row in found["rows"]:
                for column in names:
                    if column.key in row["values"]:
                        cells.setdefault(row["method"], {})[f"{row['split']} {column.name}"] = f"{row['values'][column.key]:g}"
            used = [h for h in header[1:] if any(h in c for c in cells.values())]
            rows = [[method, *(numbers.get(h, "") for h in used)] for method, numbers in cells.items()]
            title = f"published, {found['dataset']} (other data unless scored on it)"
            tables.append(Table(title, ["method", *used], rows, [f"source: {found['source']}"]))
    return tables


def _shares(run: Run, rows: list[dict[str, Any]], known: Collection[str]) -> dict[tuple[str, str, str], tuple[np.ndarray, np.ndarray]]:
    """Return, by (task, protocol, column), what each row adds above and below the line of the ratio that the number is."""
    found: dict[tuple[str, str, str], tuple[np.ndarray, np.ndarray]] = {}
    for protocol, blocks in run.results["results"].items():
        for task in blocks:
            for column in columns(entry(task)) if task in known else ():
                values = np.array([share_of(column, row, protocol) for row in rows], np.float64) if column.share else None
                if values is not None and values.any():
                    found[task, protocol, column.key] = (values[:, 0].copy(), values[:, 1].copy())
    return found


def share_of(column: Column, row: dict[str, Any], protocol: str) -> tuple[float, float]:
    """Return what one row adds to a column: nothing where the expression is no part of the metric."""
    assert column.share is not None
    try:
        return column.share(row.get(protocol, {}), row["num_targets"])
    except KeyError:
        return 0.0, 0.0


def _task_table(runs: list[Run], task: str, protocol: str, where: str, draws: Bootstrap | None, known: Collection[str]) -> Table | None:
    blocks = [(run.name, run.results["results"].get(protocol, {}).get(task) or {}) for run in runs]
    present = [
        (f"{name}, {part}" if part else name, inner) for name, block in blocks for part, inner in parts(block) or [("", block)] if inner
    ]
    if not present:
        return None
    if protocol == "strict":
        present += [(f"dummy: {name}", found[task]) for name, found in runs[0].results["baselines"].items() if found.get(task)]
    if task in known:
        shown = [column for column in columns(entry(task), "compare") if any(column.key in block for _, block in present)]
    else:
        shown = raw_columns(block for _, block in present)
    rows = []
    for name, block in present:
        cells = [column.text(block.get(column.key)) for column in shown]
        if draws is not None:
            found = [draws.interval(name, task, protocol, column.key) for column in shown]
            cells = [cell + _interval(column, ends) for cell, column, ends in zip(cells, shown, found, strict=True)]
        share = block.get("no_target_share")
        rows.append([name, str(block.get("num_samples", "")), "-" if share is None else f"{100 * share:.2f}", *cells])
    sampled = any(column.share for column in shown)
    notes = [f"[95 % intervals, {draws.num_samples} expressions resampled]"] if draws is not None and sampled else []
    if task not in known:
        notes.append(f"raw numbers: {task} is not imported unless it is named (--metric {task})")
    return Table(f"{where}: {task}, {protocol}", ["system", "N", "f0", *(column.name for column in shown)], rows, notes)


def _bucket_tables(runs: list[Run], where: str, known: Collection[str]) -> list[Table]:
    tables = []
    groups = [run.results["by_num_targets"] for run in runs]
    for task in in_order({task for group in groups for block in group.values() for task in block if task in known}):
        column = entry(task).COLUMNS[0]
        buckets = [b for b in ("0", "1", "2", "3+") if any(task in group.get(b, {}) for group in groups)]
        rows = [[run.name, *(column.text(column.find(group.get(b, {}).get(task))) for b in buckets)]
                for run, group in zip(runs, groups, strict=True)]  # fmt: skip
        tables.append(Table(f"{where}: {_titled(task, column)} by number of targets, strict", ["system", *buckets], rows))
    return tables


def _difference_tables(runs: list[Run], draws: Bootstrap | None, where: str, known: Collection[str]) -> list[Table]:
    if draws is None or len(runs) < 2:
        return []
    rows = []
    base = runs[0]
    theirs = base.results["results"]["strict"]
    for run in runs[1:]:
        for task in in_order(theirs):
            for column in columns(entry(task), "compare") if task in known else ():
                ends = draws.interval(run.name, task, "strict", column.key, base.name)
                mine, other = column.find(run.results["results"]["strict"].get(task)), column.find(theirs[task])
                if ends is not None and mine is not None and other is not None:
                    beyond = ends[0] > 0 or ends[1] < 0
                    better = "better" if (mine > other) == column.higher_is_better else "worse"
                    rows.append([f"{run.name} - {base.name}", _titled(task, column), column.text(mine - other, sign="+")])
                    rows[-1] += [_interval(column, ends, "+").strip(), f"yes, {better}" if beyond else "no"]
    header = ["difference", "metric (strict)", "points", "95 % interval, paired", "beyond chance"]
    return [Table(f"{where}: differences", header, rows, [f"{draws.num_samples} expressions, the same draws for both"])] if rows else []


def _same_protocol(runs: list[Run]) -> None:
    given = [run.results["provenance"]["protocol"] for run in runs]
    if len({(p["name"], p["version"], json.dumps(p["tasks"], sort_keys=True)) for p in given}) > 1:
        named = ", ".join(f"{run.name}: {p['name']} v{p['version']}" for run, p in zip(runs, given, strict=True))
        raise GrexError(
            f"results under different protocols ({named}); expected one protocol, version and rules; "
            "score again under one, or compare in spite of it with --any-protocol"
        )


def _named(runs: list[Run]) -> list[Run]:
    seen: Counter[str] = Counter()
    for run in runs:
        seen[run.name] += 1
        if seen[run.name] > 1:
            run.name = f"{run.name} ({seen[run.name]})"
    return runs


def _titled(task: str, column: Column) -> str:
    return column.name if task in column.name.lower() else f"{task} {column.name}"


def _interval(column: Column, ends: tuple[float, float] | None, sign: str = "") -> str:
    return "" if ends is None else f" [{column.text(ends[0], sign=sign)}, {column.text(ends[1], sign=sign)}]"


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
