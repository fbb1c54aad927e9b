"""Numbers of results.json as HTML: tiles, tables beside dummies and published numbers, breakdowns."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

from grex_mllm.metrics import entry, in_order
from grex_mllm.metrics.columns import Column, columns, find
from grex_mllm.metrics.counting import LABELS
from grex_mllm.report.html import escape, metric_name, number_text
from grex_mllm.report.run_files import is_number

PROTOCOLS = {"strict": "strict: the papers' text, at original size", "official": "official: as the benchmark's released evaluators print"}
OTHER_SPLITS = {"testA", "testB"}  # of published rows: val is enough beside other data; `grex compare` shows all
TALLIES = {"judgements", "statuses"}  # dictionaries of counts, told in a line below the table
DUMMIES = ("always_empty", "oracle")


def protocol_block(block: Any, protocol: str = "strict") -> dict[str, Any]:
    """Return the tasks of one protocol from a block that may or may not be divided by protocol."""
    if not isinstance(block, dict):
        return {}
    block = block.get("results", block)
    if any(name in block for name in PROTOCOLS):
        inner = block.get(protocol)
        return inner if isinstance(inner, dict) else {}
    return block if protocol == "strict" else {}


def known_tasks(blocks: list[dict[str, Any]], modules: Collection[str]) -> list[str]:
    """Return the metrics that some blocks hold and whose module may be imported, in their order."""
    return in_order({task for block in blocks for task in block if task in modules})


def size_of(block: dict[str, Any]) -> Any:
    """Return the number of samples of the first metric that says it."""
    sizes = (find(block[task], key) for task in in_order(block) for key in ("num_samples", "all.num_samples"))
    return next((size for size in sizes if size is not None), None)


def tiles(results: dict[str, Any], modules: Collection[str]) -> str:
    """Return the key numbers, each with a bar on which the dummies are marked."""
    ours = protocol_block(results)
    dummies = {name: protocol_block(block) for name, block in results.get("baselines", {}).items() if name in DUMMIES}
    cells: dict[str, str] = {}
    for task in known_tasks([ours], modules):
        for column in columns(entry(task), "report"):
            value = column.find(ours[task])
            beside = {name: column.find(block.get(task)) for name, block in dummies.items()}
            if is_number(value) and column.name not in cells:
                cells[column.name] = _tile(column, value, {name: number for name, number in beside.items() if is_number(number)})
    return f'<div class="tiles">{"".join(cells.values())}</div>' if cells else ""


def _tile(column: Column, value: float, dummies: dict[str, float]) -> str:
    beside = " · ".join(f"{escape(metric_name(name))} {column.text(number, 1)}" for name, number in dummies.items())
    return (
        f'<div class="tile"><div class="name">{escape(column.name)}</div><div class="value">{column.text(value, 1)}</div>'
        f'{_meter(value, list(dummies.values())) if column.format == "percent" else ""}<div class="beside">{beside or "&nbsp;"}</div></div>'
    )


def _meter(value: float, dummies: list[float]) -> str:
    def place(number: float) -> str:
        return f"{100 * min(max(number, 0.0), 1.0):.1f}%"

    marks = "".join(f'<i style="left:{place(number)}"></i>' for number in dummies)
    return f'<div class="meter" aria-hidden="true"><b style="width:{place(value)}"></b>{marks}</div>'


def result_tables(results: dict[str, Any], published: list[dict[str, Any]], modules: Collection[str]) -> str:
    """Return one table for each task and protocol: our rows, the dummies, and published rows set apart as other data."""
    blocks = []
    all_tasks = list(dict.fromkeys(task for protocol in PROTOCOLS for task in protocol_block(results, protocol)))
    for task in in_order(all_tasks):
        parts, known = [], {column.key: column for column in columns(entry(task))} if task in modules else {}
        title, about = (entry(task).TITLE, str(entry(task).__doc__).split("\n")[0]) if known else (task, "")
        scored = [protocol for protocol in PROTOCOLS if task in protocol_block(results, protocol)]
        for protocol, meaning in PROTOCOLS.items():
            rows, notes = _rows(task, "this run", protocol_block(results, protocol).get(task))
            if not rows:
                continue
            for name, block in results.get("baselines", {}).items():
                more, _ = _rows(task, f"dummy: {metric_name(name)}", protocol_block(block, protocol).get(task))
                rows += more
            parts.append(_table(rows, meaning if len(scored) > 1 or not about else about, known))
            parts += [f'<p class="note">{escape(note)}</p>' for note in notes]
            parts.append(_confusion(protocol_block(results, protocol).get(task)))
            if protocol == scored[-1]:
                parts += [_published_table(table, _columns(rows)) for table in published if table.get("task") == task]
        if parts and not known:
            parts.append('<p class="note">Raw numbers: the module is imported only where the protocol file is named (--protocol).</p>')
        if parts:
            blocks.append(f'<h3>{escape(title)}</h3><div class="tables">{"".join(parts)}</div>')
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
    return list(dict.fromkeys(key for _, row in rows for key in row))


def _table(rows: list[tuple[str, dict[str, Any]]], caption: str, known: dict[str, Column]) -> str:
    """Return a table of all numbers of the rows, those of known columns in their names and formats."""
    keys = _columns(rows)

    def text(key: str, value: Any) -> str:
        return known[key].text(value, 1) if key in known and is_number(value) else number_text(key, value)

    head = _heads(known[key].name if key in known else metric_name(key) for key in keys)
    body = "".join(
        f'<tr class="{"dummy" if label.startswith("dummy") else "ours"}"><th scope="row">{escape(label)}</th>'
        + "".join(f"<td>{escape(text(key, row.get(key)))}</td>" for key in keys)
        + "</tr>"
        for label, row in rows
    )
    return _framed("", caption, head, f"<tbody>{body}</tbody>")


def _heads(names: Iterable[str]) -> str:
    return "".join(f'<th scope="col">{escape(name)}</th>' for name in names)


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
    head = _heads(map(metric_name, columns))
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
    matrix = block.get("confusion") if isinstance(block, dict) else None
    if (
        not isinstance(matrix, list)
        or not matrix
        or not all(isinstance(row, list) and all(is_number(cell) for cell in row) for row in matrix)
    ):
        return ""
    columns = [*LABELS, "no answer"][: len(matrix[0])]
    if len(columns) > len(LABELS) and not any(row[-1] for row in matrix):
        columns = columns[:-1]
    head = _heads(columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(
            f'<td class="bar" style="--share:{cell / max(sum(row), 1):.3f}">{number_text("num_", cell)}</td>'
            for _, cell in zip(columns, row)
        )
        + "</tr>"
        for name, row in zip(LABELS, matrix)
    )
    return _framed("confusion", "true count (rows) against predicted count (columns)", head, f"<tbody>{body}</tbody>")


def breakdown(groups: Any, caption: str, modules: Collection[str], worst_first: bool = False) -> str:
    """Return one table of groups (number of targets, phenomenon, source) with a bar in each cell."""
    if not isinstance(groups, dict) or not groups:
        return ""
    blocks = {name: protocol_block(block) for name, block in groups.items()}
    tasks = known_tasks(list(blocks.values()), modules)
    found = [(task, column) for task in tasks for column in columns(entry(task), "report")]
    shown = {c.name: (task, c) for task, c in reversed(found) if any(is_number(c.find(block.get(task))) for block in blocks.values())}
    chosen = [pair for pair in found if pair in shown.values()]
    if not chosen:
        return ""

    def goodness(name: str) -> float:
        pairs = ((entry(task).COLUMNS[0], entry(task).COLUMNS[0].find(blocks[name].get(task))) for task in tasks)
        return next((float(value) if column.higher_is_better else -float(value) for column, value in pairs if is_number(value)), math.inf)

    head = _heads(["N", *(column.name for _, column in chosen)])
    body = ""
    for name in sorted(blocks, key=goodness) if worst_first else blocks:
        cells = "".join(_bar_cell(column, column.find(blocks[name].get(task))) for task, column in chosen)
        size = escape(number_text("num_samples", size_of(blocks[name])))
        body += f'<tr><th scope="row">{escape(metric_name(name))}</th><td>{size}</td>{cells}</tr>'
    return _framed("breakdown", caption, head, f"<tbody>{body}</tbody>")


def _bar_cell(column: Column, value: Any) -> str:
    if not is_number(value) or column.format != "percent":
        return f"<td>{escape(column.text(value, 1) if is_number(value) else '–')}</td>"
    return f'<td class="bar" style="--share:{min(max(float(value), 0.0), 1.0):.3f}">{column.text(value, 1)}</td>'
