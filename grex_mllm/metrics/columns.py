"""Columns of a metric: how a number of its block of results.json is named, printed, and drawn again for intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

EVERYWHERE = ("table", "compare", "report")
Share = Callable[[dict[str, Any], int], tuple[float, float]]


class Column(NamedTuple):
    """One number. key: in the block; "all.CIDEr" looks into a block within it.

    share: (row, num_targets) -> (above, below), so that sum(above) / sum(below) over rows is the number; None: no interval. A row that
    lacks a key that it reads does not count. format: "percent"; "points", percent that may exceed 100; "number", as it is.
    shown: of "table", "compare" (also published rows) and "report" (tiles and breakdowns; its result tables hold every key).
    """

    key: str
    name: str
    share: Share | None = None
    format: str = "percent"
    higher_is_better: bool = True
    shown: tuple[str, ...] = EVERYWHERE

    def text(self, value: Any, digits: int = 2, sign: str = "") -> str:
        """Return a value as it is printed; nothing as a dash. sign: "+" for differences."""
        if value is None:
            return "-"
        return f"{value:{sign}.3f}" if self.format == "number" else f"{100 * value:{sign}.{digits}f}"

    def find(self, block: Any) -> Any:
        """Return the value in a block, or None where it has none."""
        return find(block, self.key)


def columns(metric: Any, place: str | None = None) -> list[Column]:
    """Return the columns of an entry; place: those that are shown there."""
    return [column for column in metric.COLUMNS if place is None or place in column.shown]


def raw_columns(blocks: Iterable[dict[str, Any]]) -> list[Column]:
    """Return a column for each number of some blocks: of a metric whose module nobody named, and which is not imported therefore."""
    named = (key for block in blocks for key, value in block.items() if type(value) in (int, float))
    return [Column(key, key, format="number") for key in dict.fromkeys(named) if key not in ("num_samples", "no_target_share")]


def find(block: Any, key: str) -> Any:
    """Return block[key]; where there is no such key, "a.b" means block["a"]["b"]; None where nothing is there."""
    if not isinstance(block, dict):
        return None
    first, _, rest = key.partition(".")
    return block[key] if key in block else find(block.get(first), rest) if rest else None


def parts(block: dict[str, Any], label: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Return (label, block) of the parts of a block that have samples of their own: itself, or those within it."""
    if "num_samples" in block:
        return [(label, block)]
    return [part for key, inner in block.items() if isinstance(inner, dict) for part in parts(inner, f"{label} {key}".strip())]


def mean_of(key: str) -> Share:
    """Return the share of a mean over all rows."""
    return lambda row, _: (float(row[key]), 1.0)


def rejected(key: str) -> Share:
    """Return the share of N_acc: of expressions without a target, those of which the row says so under `key`."""
    return lambda row, num_targets: (float(row[key]) * (num_targets == 0), float(num_targets == 0))


def accepted(key: str) -> Share:
    """Return the share of T_acc: of expressions with a target, those of which the row does not deny it under `key`."""
    return lambda row, num_targets: ((1.0 - row[key]) * (num_targets > 0), float(num_targets > 0))
