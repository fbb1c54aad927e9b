"""The program around `convert_refs`: flags, dataset.json, table. data_prep/grefcoco.py and data_prep/refcoco.py run it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from grex_mllm.data.coco import check_image_files, convert_refs, describe_file, load_instances, load_refs
from grex_mllm.data.writing import DatasetWriter
from grex_mllm.errors import GrexError

CONSOLE = Console(stderr=True)
MOST_SHOWN = 5  # targets with a column of their own


def build_parser(description: str, name: str, licence: str) -> argparse.ArgumentParser:
    """Return the flags of a program that converts refs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refs", required=True, type=Path, help="refs as published, JSON or pickle (.p)")
    parser.add_argument("--instances", required=True, type=Path, help="COCO instance file of the release")
    parser.add_argument("--images", required=True, type=Path, help="folder with the image files")
    parser.add_argument("--out", required=True, type=Path, help="dataset folder to make")
    parser.add_argument("--name", default=name, help="source name in every record (default: %(default)s)")
    parser.add_argument("--licence", default=licence, help="licence text for dataset.json")
    parser.add_argument("--skip-bad", action="store_true", help="leave out and count empty and over-long expressions instead of stopping")
    parser.add_argument("--overwrite", action="store_true", help="replace the dataset folder --out")
    return parser


def convert(options: argparse.Namespace, program: str) -> dict[str, Any]:
    """Write the folder, all of it or nothing, and return its dataset.json.

    Raises:
        GrexError: any fault of the sources; names file, ref, field and remedy.
    """
    with DatasetWriter(options.out, options.overwrite) as writer:
        with CONSOLE.status(f"reading {options.instances.name} and {options.refs.name}"):
            instances, refs = load_instances(options.instances), load_refs(options.refs)
        progress = track(refs, description="converting refs", console=CONSOLE, disable=not CONSOLE.is_terminal)
        result = convert_refs(progress, instances, options.name, str(options.refs), options.skip_bad)
        check_image_files(result.images, options.images)
        writer.add_images(result.images)
        writer.add_expressions(result.expressions)
        return writer.set_info(
            {
                "name": options.name,
                "tool": program,
                "sources": [describe_file(options.refs), describe_file(options.instances)],
                "licence": options.licence,
                "image_root": str(options.images.resolve()),
                "skipped": dict(result.skipped),
            }
        )


def show(info: dict[str, Any], out: Path) -> None:
    """Print what was written, by split, and what was left out."""
    table = Table(
        caption="right: expressions by number of targets",
        title=f"{info['name']}: {info['num_images']:,} images, {info['num_expressions']:,} expressions",
    )
    few = [str(number) for number in range(MOST_SHOWN + 1)]
    for column in ("split", "images", "refs", "expressions", *few, f">{MOST_SHOWN}"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, row in info["counts"].items():
        by_number = row["by_num_targets"]
        cells = [row["images"], row["refs"], row["expressions"], *(by_number.get(number, 0) for number in few)]
        cells.append(sum(times for number, times in by_number.items() if number not in few))
        table.add_row(split, *(f"{cell:,}" for cell in cells))
    CONSOLE.print(table)
    for reason, number in info["skipped"].items():
        CONSOLE.print(f"left out: {number:,} x {reason}")
    CONSOLE.print(f"written: {out}   next: grex data check {out}", soft_wrap=True)


def run(parser: argparse.ArgumentParser, program: str, arguments: list[str] | None = None) -> int:
    """Run a program that converts refs."""
    options = parser.parse_args(arguments)
    return status_of(program, lambda: show(convert(options, program), options.out))


def status_of(program: str, work: Callable[[], object]) -> int:
    """Do a program's work and return its exit status; a fault of the user's files is one line and status 2."""
    try:
        work()
    except GrexError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    return 0
