"""Numbers of results.json as HTML: tiles, tables beside dummies and published numbers, breakdowns."""

from __future__ import annotations

from typing import Any

from grex_mllm.report.html import escape, is_share, metric_name, number_text
from grex_mllm.report.run_files import is_number

PROTOCOLS = {"strict": "strict: the papers' text, at original size", "official": "official: as the benchmark's released evaluators print"}
TASK_NAMES = {
    "gres": "Masks (GRES)",
    "grec": "Boxes (GREC)",
    "count": "Counts",
    "greg": "Group expressions (GREG)",
}
OTHER_SPLITS = {"testA", "testB"}  # of published rows: val is enough beside other data; `grex compare` shows all
COUNT_NAMES = ("0", "1", "2", "3", "4", "5", ">5")
CAPTIONS = {"greg": "generated text against all references of an object set", "count": "number of objects, 0 to 5 and more"}
COLUMN_ORDER = [
    *("num_samples", "no_target_share", "gIoU", "cIoU", "mIoU", "Pr@F1", "mean_F1", "N_acc", "T_acc", "balanced_acc", "accuracy", "mae"),
    *("Pr@0.5", "Pr@0.6", "Pr@0.7", "Pr@0.8", "Pr@0.9", "METEOR", "CIDEr", "ROUGE-L", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"),
    *("correct", "round_trip_gIoU", "round_trip_Pr@F1"),
]
# (label, task, metric): what a reader wants first
TILES = [
    ("gIoU", "gres", "gIoU"),
    ("Pr@(F1=1)", "grec", "Pr@F1"),
    ("N-acc", "gres", "N_acc"),
    ("T-acc", "gres", "T_acc"),
    ("count accuracy", "count", "accuracy"),
    ("exact set, greedy", "greg.all", "correct"),
    ("exact set, listener", "greg.listener.all", "correct"),
    ("round-trip gIoU", "greg.all", "round_trip_gIoU"),
    ("METEOR", "greg.all", "METEOR"),
    ("CIDEr", "greg.all", "CIDEr"),
]
TALLIES = {"judgements", "statuses"}  # dictionaries of counts, told in a line below the table
UNBOUNDED = {"CIDEr"}  # can exceed 1, so that a bar would mislead
DUMMIES = ("always_empty", "oracle")
BREAKDOWN = [
    ("gIoU", "gres", "gIoU"),
    ("Pr@(F1=1)", "grec", "Pr@F1"),
    ("N-acc", "gres", "N_acc"),
    ("T-acc", "gres", "T_acc"),
    ("count acc.", "count", "accuracy"),
    ("METEOR", "greg.all", "METEOR"),
    ("CIDEr", "greg.all", "CIDEr"),
    ("round-trip gIoU", "greg.all", "round_trip_gIoU"),
]


def protocol_block(block: Any, protocol: str = "strict") -> dict[str, Any]:
    """Return the tasks of one protocol from a block that may or may not be divided by protocol."""
    if not isinstance(block, dict):
        return {}
    block = block.get("results", block)
    if any(name in block for name in PROTOCOLS):
        inner = block.get(protocol)
        return inner if isinstance(inner, dict) else {}
    return block if protocol == "strict" else {}


def lookup(block: dict[str, Any], task: str, metric: str) -> Any:
    """Return block[task][metric], where a dotted task goes deeper; None where it is absent."""
    inner: Any = block
    for part in task.split("."):
        inner = inner.get(part) if isinstance(inner, dict) else None
        if inner is None:
            return None
    return inner.get(metric) if isinstance(inner, dict) else None


def tiles(results: dict[str, Any]) -> str:
    """Return the key numbers, each with a bar on which the dummies are marked."""
    ours = protocol_block(results)
    dummies = {name: protocol_block(block) for name, block in results.get("baselines", {}).items() if name in DUMMIES}
    cells = []
    for label, task, metric in TILES:
        value = lookup(ours, task, metric)
        if not is_number(value):
            continue
        beside = {name: lookup(block, task, metric) for name, block in dummies.items()}
        cells.append(_tile(label, metric, value, {name: number for name, number in beside.items() if is_number(number)}))
    return f'<div class="tiles">{"".join(cells)}</div>' if cells else ""


def _tile(label: str, metric: str, value: float, dummies: dict[str, float]) -> str:
    beside = " · ".join(f"{escape(metric_name(name))} {number_text(metric, number)}" for name, number in dummies.items())
    return (
        f'<div class="tile"><div class="name">{escape(label)}</div><div class="value">{number_text(metric, value)}</div>'
        f'{_meter(value, list(dummies.values())) if metric not in UNBOUNDED else ""}<div class="beside">{beside or "&nbsp;"}</div></div>'
    )


def _meter(value: float, dummies: list[float]) -> str:
    def place(number: float) -> str:
        return f"{100 * min(max(number, 0.0), 1.0):.1f}%"

    marks = "".join(f'<i style="left:{place(number)}"></i>' for number in dummies)
    return f'<div class="meter" aria-hidden="true"><b style="width:{place(value)}"></b>{marks}</div>'


def result_tables(results: dict[str, Any], published: list[dict[str, Any]]) -> str:
    """Return one table for each task and protocol: our rows, the dummies, and published rows set apart as other data."""
    blocks = []
    all_tasks = list(dict.fromkeys(task for protocol in PROTOCOLS for task in protocol_block(results, protocol)))
    for task in sorted(all_tasks, key=lambda name: (list(TASK_NAMES).index(name) if name in TASK_NAMES else 99, name)):
        parts = []
        scored = [protocol for protocol in PROTOCOLS if task in protocol_block(results, protocol)]
        for protocol, meaning in PROTOCOLS.items():
            rows, notes = _rows(task, "this run", protocol_block(results, protocol).get(task))
            if not rows:
                continue
            for name, block in results.get("baselines", {}).items():
                more, _ = _rows(task, f"dummy: {metric_name(name)}", protocol_block(block, protocol).get(task))
                rows += more
            parts.append(_table(rows, CAPTIONS.get(task, meaning)))
            parts += [f'<p class="note">{escape(note)}</p>' for note in notes]
            parts.append(_confusion(protocol_block(results, protocol).get(task)))
            if protocol == scored[-1]:
                parts += [_published_table(table, _columns(rows)) for table in published if table.get("task") == task]
        if parts:
            blocks.append(f'<h3>{escape(TASK_NAMES.get(task, task))}</h3><div class="tables">{"".join(parts)}</div>')
    return "".join(blocks)


def _rows(task: str, label: str, block: Any) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """Divide a task's block into rows of numbers (nested blocks become rows of their own) and notes (its texts)."""
    if not isinstance(block, dict):
        return [], []
    numbers = {key: value for key, value in block.items() if is_number(value) or value is None}
    notes = [f"{metric_name(key)}: {value}" for key, value in block.items() if isinstance(value, str)]
    rows = [(label, numbers)] if any(value is not None for value in numbers.values()) else []
    for key, inner in block.items():
        if key in TALLIES and isinstance(inner, dict):
            notes.append(f"{label}, {key}: " + ", ".join(f"{name} {number_text('num_', count)}" for name, count in inner.items() if count))
        elif isinstance(inner, dict):
            more, inner_notes = _rows(task, f"{label}, {metric_name(key)}", inner)
            rows += more
            notes += inner_notes
    return rows, list(dict.fromkeys(notes))


def _columns(rows: list[tuple[str, dict[str, Any]]]) -> list[str]:
    present = list(dict.fromkeys(key for _, row in rows for key in row))
    return [key for key in COLUMN_ORDER if key in present] + [key for key in present if key not in COLUMN_ORDER]


def _table(rows: list[tuple[str, dict[str, Any]]], caption: str) -> str:
    columns = _columns(rows)
    head = "".join(f'<th scope="col">{escape(metric_name(column))}</th>' for column in columns)
    body = "".join(
        f'<tr class="{"dummy" if label.startswith("dummy") else "ours"}"><th scope="row">{escape(label)}</th>'
        + "".join(f"<td>{escape(number_text(column, row.get(column)))}</td>" for column in columns)
        + "</tr>"
        for label, row in rows
    )
    return _framed("", caption, head, f"<tbody>{body}</tbody>")


def _framed(css_class: str, caption: str, head: str, bodies: str) -> str:
    return (
        f'<div class="scroll"><table class="{css_class}"><caption>{escape(caption)}</caption>'
        f"<thead><tr><td></td>{head}</tr></thead>{bodies}</table></div>"
    )


def _published_table(table: dict[str, Any], ours: list[str]) -> str:
    """Return published rows as a table of their own, in a frame that scrolls; they are in percent and belong to other data."""
    rows = [(row, row.get("values", {})) for row in table["rows"] if row.get("split") not in OTHER_SPLITS]
    columns = [column for column in ours if any(column in values for _, values in rows)]
    if not columns:
        return ""
    head = "".join(f'<th scope="col">{escape(metric_name(column))}</th>' for column in columns)
    body = ""
    for row, values in rows:
        name = " ".join(str(row[key]) for key in ("method", "split") if key in row)
        where = str(row.get("source", table.get("source", "")))
        cells = "".join(f"<td>{escape(values.get(column, '–'))}</td>" for column in columns)
        body += f'<tr><th scope="row" title="{escape(where)}">{escape(name)}</th>{cells}</tr>'
    dataset, source = table.get("dataset", "the papers’ benchmark"), table.get("source", "eval/published")
    label = f"Other data: {dataset}, as published; not comparable"
    frame = _framed("", f"Source: {source}", head, f"<tbody>{body}</tbody>")
    return f'<div class="published" role="region" aria-label="{escape(label)}" tabindex="0"><p>{escape(label)}</p>{frame}</div>'


def _confusion(block: Any) -> str:
    """Return the count's confusion matrix, where the results hold one: rows true, columns predicted."""
    matrix = next(
        (block[key] for key in ("confusion", "confusion_matrix") if isinstance(block, dict) and isinstance(block.get(key), list)), None
    )
    if not matrix or not all(isinstance(row, list) and all(is_number(cell) for cell in row) for row in matrix):
        return ""
    columns = [*COUNT_NAMES, "no answer"][: len(matrix[0])]
    if len(columns) > len(COUNT_NAMES) and not any(row[-1] for row in matrix):
        columns = columns[:-1]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(
            f'<td class="bar" style="--share:{cell / max(sum(row), 1):.3f}">{number_text("num_", cell)}</td>'
            for _, cell in zip(columns, row)
        )
        + "</tr>"
        for name, row in zip(COUNT_NAMES, matrix)
    )
    return _framed("confusion", "true count (rows) against predicted count (columns)", head, f"<tbody>{body}</tbody>")


def breakdown(groups: Any, caption: str, worst_first: bool = False) -> str:
    """Return one table of groups (number of targets, phenomenon, source) with a bar in each cell."""
    if not isinstance(groups, dict) or not groups:
        return ""
    blocks = {name: protocol_block(block) for name, block in groups.items()}
    columns = [column for column in BREAKDOWN if any(is_number(lookup(block, column[1], column[2])) for block in blocks.values())]
    if not columns:
        return ""

    def badness(name: str) -> float:
        values = (lookup(blocks[name], task, metric) for task, metric in (("grec", "Pr@F1"), ("gres", "gIoU")))
        return next((float(value) for value in values if is_number(value)), 2.0)

    names = sorted(blocks, key=badness) if worst_first else list(blocks)
    head = "".join(f'<th scope="col">{escape(label)}</th>' for label, _, _ in columns)
    body = ""
    for name in names:
        sizes = (lookup(blocks[name], task, "num_samples") for task in ("gres", "grec", "count", "greg.all"))
        size = next((value for value in sizes if value is not None), None)
        cells = "".join(_bar_cell(metric, lookup(blocks[name], task, metric)) for _, task, metric in columns)
        body += f'<tr><th scope="row">{escape(metric_name(name))}</th><td>{escape(number_text("num_samples", size))}</td>{cells}</tr>'
    return _framed("breakdown", caption, f'<th scope="col">N</th>{head}', f"<tbody>{body}</tbody>")


def _bar_cell(metric: str, value: Any) -> str:
    if not is_share(metric, value) or metric in UNBOUNDED:
        return f"<td>{escape(number_text(metric, value))}</td>"
    return f'<td class="bar" style="--share:{min(max(float(value), 0.0), 1.0):.3f}">{number_text(metric, value)}</td>'
