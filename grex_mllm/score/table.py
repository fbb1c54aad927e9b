"""The printed table: both protocols, the dummy rows, breakdowns; always with N, the share of no-target samples, and T_acc."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from grex_mllm.metrics import entry, in_order
from grex_mllm.metrics.columns import Column, columns, parts

COMMON = (Column("num_samples", "N", format="count"), Column("no_target_share", "f0"))
MIN_WIDTH = 150


def print_results(results: dict[str, Any], console: Console | None = None) -> None:
    """Print results.json as tables; shares in percent."""
    console = console or wide_console()
    provenance = results["provenance"]
    protocol, dataset = provenance["protocol"], provenance["dataset"]
    rows = table_rows(results)
    if rows:
        names = list(dict.fromkeys(name for _, cells in rows for name in cells))
        table = Table(title=f"{dataset['name']} {dataset['split']}, protocol {protocol['name']} v{protocol['version']} (percent)")
        table.add_column("", no_wrap=True)
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for label, cells in rows:
            table.add_row(
                label, *(cells.get(name, "") for name in names), end_section=label in ("official", "always_empty", "oracle", "3+ targets")
            )
        console.print(table)
    strict = results["results"]["strict"]
    for task in in_order(strict):
        if hasattr(entry(task), "UNIT"):
            console.print(_parts_table(task, strict[task]))
            if (groups := _groups_table(task, results)).row_count:
                console.print(groups)
    for line in asked_lines(provenance["predictions"]):
        console.print(line, highlight=False)
    for note in provenance["notes"]:
        console.print(f"note: {note}", highlight=False)
    console.print(f"thresholds: {provenance['thresholds']['chosen']}", highlight=False)


def asked_lines(predictions: dict[str, Any]) -> list[str]:
    """Return how the questions to a model that was asked in words ended; an answer that cannot be parsed counts as wrong."""
    lines = []
    for task, block in (predictions.get("asked") or {}).items():
        shares = ", ".join(f"{kind.replace('_', ' ')} {100 * share:.1f} %" for kind, share in block["shares"].items())
        lines.append(f"asked ({task}, {', '.join(predictions.get('by') or ['no name'])}): {shares}; {block['num_calls']} calls")
    return lines


def wide_console() -> Console:
    """Return a console for tables: as wide as the terminal, but never so narrow that a number is cut."""
    console = Console()
    return console if console.width >= MIN_WIDTH else Console(width=MIN_WIDTH)


def table_rows(results: dict[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """Return (label, {column: text}) of every row of the grounding table."""
    blocks = [("strict", results["results"]["strict"]), ("official", results["results"]["official"])]
    blocks += [(name, block) for name, block in results["baselines"].items()]
    blocks += [(f"{name} targets", block) for name, block in results["by_num_targets"].items()]
    blocks += [(f"tag {name}", block) for name, block in results["by_tag"].items()]
    if len(results["by_source"]) > 1:
        blocks += [(f"source {name}, {p}", both[p]) for name, both in results["by_source"].items() for p in ("strict", "official")]
    blocks += [(f"mean of sources, {name}", block) for name, block in results.get("mean_of_sources", {}).items()]
    return [(label, cells) for label, block in blocks if (cells := _cells(block))]


def _cells(block: dict[str, Any]) -> dict[str, str]:
    """Return the cells of a row; a column of several metrics (N-acc) is filled by the first that has it."""
    cells: dict[str, str] = {}
    for task in in_order(block):
        for column in (*COMMON, *columns(entry(task), "table")):
            if column.key in block[task]:
                cells.setdefault(column.name, _text(column, block[task][column.key]))
    return cells


def _text(column: Column, value: Any) -> str:
    return str(value) if column.format == "count" and value is not None else column.text(value)


def _parts_table(task: str, block: dict[str, Any]) -> Table:
    """Return the table of a metric of object sets: a row for each part of its block, its texts in the title."""
    rows = parts(block)
    shown = [column for column in (COMMON[0], *columns(entry(task), "table")) if any(column.key in row for _, row in rows)]
    reasons = sorted({reason for _, row in rows for reason in row.get("not_computed", {}).values()})
    settings = [f", {key.replace('_', ' ')} {value}" for key, value in block.items() if isinstance(value, str)]
    table = Table(title=f"{entry(task).TITLE} (percent){''.join(settings)}", caption="; ".join(f"- : {r}" for r in reasons) or None)
    table.add_column("")
    for column in shown:
        table.add_column(column.name, justify="right")
    for name, row in rows:
        table.add_row(name, *(_text(column, row.get(column.key)) for column in shown))
    return table


def _groups_table(task: str, results: dict[str, Any]) -> Table:
    """Return the table of a metric of object sets beside the baselines, and by group: the numbers that stand in the report."""
    groups = [("this run", results["results"]["strict"]), *results["baselines"].items()]
    groups += [(f"{name} targets", block) for name, block in results["by_num_targets"].items()]
    groups += [(f"tag {name}", block) for name, block in results["by_tag"].items()]
    if len(results["by_source"]) > 1:
        groups += [(f"source {name}", both["strict"]) for name, both in results["by_source"].items()]
    groups += [(f"mean of sources, {name}", block) for name, block in results.get("mean_of_sources", {}).items()]
    rows = [(name, block[task]) for name, block in groups if task in block]
    shown = [column for column in columns(entry(task), "report") if any(column.find(row) is not None for _, row in rows)]
    table = Table(title=f"{entry(task).TITLE}, by group (percent)")
    for name in ("", "N", *(column.name for column in shown)):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, row in rows if shown else ():
        size = next((part["num_samples"] for _, part in parts(row)), "")
        table.add_row(name, str(size), *(column.text(column.find(row)) for column in shown))
    return table
