"""The printed table: both protocols, the dummy rows, breakdowns; always with N, the share of no-target samples, and T_acc."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = (
    ("N", None, "num_samples"),
    ("f0", None, "no_target_share"),
    ("gIoU", "gres", "gIoU"),
    ("cIoU", "gres", "cIoU"),
    ("mIoU", "res", "mIoU"),
    ("Pr@F1", "grec", "Pr@F1"),
    ("REC Pr@0.5", "rec", "Pr@0.5"),
    ("mean F1", "grec", "mean_F1"),
    ("N-acc", None, "N_acc"),
    ("T-acc", None, "T_acc"),
    ("bal-acc", None, "balanced_acc"),
    ("J", "rvos", "J"),
    ("F", "rvos", "F"),
    ("J&F", "rvos", "J&F"),
    ("count acc", "count", "accuracy"),
    ("count MAE", "count", "mae"),
)
ORDER = ("gres", "grec", "res", "rec", "count", "rvos")
TEXT_COLUMNS = (
    "num_samples",
    "METEOR",
    "CIDEr",
    "BLEU-1",
    "BLEU-4",
    "ROUGE-L",
    "SPICE",
    "round_trip_gIoU",
    "round_trip_Pr@F1",
    "correct",
    "distinct",
)
MIN_WIDTH = 150
PLAIN = ("num_samples", "mae")


def print_results(results: dict[str, Any], console: Console | None = None) -> None:
    """Print results.json as tables; shares in percent."""
    console = console or wide_console()
    provenance = results["provenance"]
    protocol, dataset = provenance["protocol"], provenance["dataset"]
    rows = table_rows(results)
    if rows:
        names = [name for name, *_ in COLUMNS if any(name in cells for _, cells in rows)]
        table = Table(title=f"{dataset['name']} {dataset['split']}, protocol {protocol['name']} v{protocol['version']} (percent)")
        table.add_column("", no_wrap=True)
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        for label, cells in rows:
            table.add_row(
                label, *(cells.get(name, "") for name in names), end_section=label in ("official", "always_empty", "oracle", "3+ targets")
            )
        console.print(table)
    greg = results["results"]["strict"].get("greg")
    if greg:
        console.print(_text_table(greg))
    for note in provenance["notes"]:
        console.print(f"note: {note}", highlight=False)
    console.print(f"thresholds: {provenance['thresholds']['chosen']}", highlight=False)


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
    return [(label, cells) for label, block in blocks if (cells := _cells(block))]


def cell(value: Any, key: str) -> str:
    """Return a number as it is printed: shares in percent with two digits, counts as they are, nothing as a dash."""
    if value is None:
        return "-"
    if key == "num_samples":
        return str(value)
    return f"{value:.3f}" if key in PLAIN else f"{100 * value:.2f}"


def _cells(block: dict[str, Any]) -> dict[str, str]:
    tasks = [task for task in ORDER if task in block]
    cells = {}
    for name, task, key in COLUMNS:
        for candidate in [task] if task else tasks:
            if candidate in block and key in block[candidate]:
                cells[name] = cell(block[candidate][key], key)
                break
    return cells


def _text_table(greg: dict[str, Any]) -> Table:
    rows: list[tuple[str, dict[str, Any]]] = [(name, greg[name]) for name in ("single", "multi", "all") if name in greg]
    rows += [(f"listener {name}", greg["listener"][name]) for name in ("single", "multi", "all") if name in greg.get("listener", {})]
    keys = [key for key in TEXT_COLUMNS if any(key in row for _, row in rows)]
    reasons = sorted({reason for _, row in rows for reason in row.get("not_computed", {}).values()})
    title = f"generation (percent), references by {greg['group_by']}, tokenizer {greg['tokenizer']}"
    table = Table(title=title, caption="; ".join(f"- : {reason}" for reason in reasons) or None)
    table.add_column("")
    for key in keys:
        table.add_column("N" if key == "num_samples" else key, justify="right")
    for name, row in rows:
        table.add_row(name, *(cell(row.get(key), key) for key in keys))
    return table
