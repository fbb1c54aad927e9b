"""Shares of a drawn set: what there is too much of goes, spread over all images."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from grex_mllm.data.templates.drawing import NONE, ONE, SEVERAL, WHOLE, Shares, Statement


def balanced(images: Sequence[tuple[str, list[Statement]]], shares: Shares) -> list[list[Statement]]:
    """Return the statements of each image without the surplus of classes. images: (a name of its own, statements).

    Which ones go depends on the names and places alone; the last of an image go first.
    """
    entries = [(place, number, said) for place, (_, found) in enumerate(images) for number, said in enumerate(found)]
    order = sorted(entries, key=lambda entry: (entry[1] // 2, _digest(f"{images[entry[0]][0]}/{entry[1]}")))
    classes = {group: [entry for entry in order if entry[2].group == group] for group in (NONE, WHOLE, ONE, SEVERAL)}
    kept = _kept(
        {group: len(found) for group, found in classes.items()}, sum(len(entry[2].targets) > 1 for entry in classes[WHOLE]), shares
    )
    chosen = {(place, number) for group, found in classes.items() for place, number, _ in found[: kept[group]]}
    return [[said for number, said in enumerate(found) if (place, number) in chosen] for place, (_, found) in enumerate(images)]


def _kept(given: dict[str, int], several_wholes: int, shares: Shares) -> dict[str, int]:
    """Return how many of each class fit the shares: one object first gives way to several, then wholes to both, then those without."""
    several, one, whole, none = given[SEVERAL], given[ONE], given[WHOLE], given[NONE]
    for _ in range(50):
        true = several + one + whole
        none = min(given[NONE], round(true * shares.no_target / max(1 - shares.no_target, 1e-9)))
        total = true + none
        before = (one, whole, none)
        whole = min(whole, int(shares.whole * total)) if several + one else whole
        share_of_wholes = several_wholes / max(given[WHOLE], 1)
        lacking = shares.several * total - several - whole * share_of_wholes
        if lacking > 0 and one:
            one = max(0, one - max(1, round(lacking / max(shares.several, 1e-9) * 0.5)))
        if (one, whole, none) == before:
            break
    return {NONE: none, WHOLE: whole, ONE: one, SEVERAL: several}


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def distribution(drawn: Iterable[tuple[str, str, list[Statement]]]) -> dict[str, dict[str, Any]]:
    """Return, by source and split, the numbers of images and expressions, shares in percent, and expressions by kind.

    drawn: (source, split, statements) of each image.
    """
    cells: dict[str, dict[str, list[list[Statement]]]] = {}
    for source, split, found in drawn:
        if found:
            cells.setdefault(source, {}).setdefault(split, []).append(found)
    return {source: {split: _cell(images) for split, images in by_split.items()} for source, by_split in cells.items()}


def _cell(images: list[list[Statement]]) -> dict[str, Any]:
    every = [said for found in images for said in found]

    def percent(number: int) -> float:
        return round(100 * number / len(every), 1)

    return {
        "images": len(images),
        "expressions": len(every),
        "no_target_percent": percent(sum(not said.targets for said in every)),
        "multi_target_percent": percent(sum(len(said.targets) > 1 for said in every)),
        "whole_category_percent": percent(sum(said.group == WHOLE for said in every)),
        "kinds": dict(Counter(said.kind for said in every).most_common()),
    }


def distribution_table(found: dict[str, dict[str, Any]]) -> Table:
    """Return a printed form of `distribution`, without kinds."""
    table = Table(title="expressions by source and split")
    columns = ("images", "expressions", "no_target_percent", "multi_target_percent", "whole_category_percent")
    for column in ("source", "split", "images", "expressions", "no target %", "several %", "whole category %"):
        table.add_column(column, justify="left" if column in ("source", "split") else "right")
    for source, by_split in found.items():
        for split, row in by_split.items():
            table.add_row(source, split, *(f"{row[name]:,}" for name in columns))
    return table
