"""What `grex data` does: check, describe and make dataset folders."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from grex_mllm.data.records import Fault
from grex_mllm.errors import fault

ACTIONS = ("check", "stats", "export")
MAX_PRINTED_FAULTS = 200
PIPE_WIDTH = 100_000  # no line of a table that goes to a file or a program is wrapped


def run_data(action: str, folders: list[str], *, image_root: str | None, out: str | None, split: str, length: int, seed: int) -> int:
    """Run one action and return the exit status (check: 1 when it found a fault).

    Raises:
        GrexError: unknown action, or folders that it cannot work on.
    """
    if action not in ACTIONS:
        raise fault(f'grex data "{action}"', " | ".join(ACTIONS), "choose one of them")
    if action == "check":
        return _check(folders, image_root)
    if len(folders) != 1:
        raise fault(f"{len(folders)} folders for grex data {action}", "one folder", "call it once for each")
    if action == "stats":
        return _stats(Path(folders[0]), image_root, out, seed)
    from grex_mllm.data.synthetic.export import export
    from grex_mllm.data.synthetic.settings import SyntheticConfig

    info = export(SyntheticConfig(seed=seed), split, length, folders[0])
    print(f"{folders[0]}: {info['num_images']} scenes, {info['num_expressions']} expressions of split {split}")
    return 0


def _check(folders: list[str], image_root: str | None) -> int:
    from grex_mllm.data.check import check_mixture

    faults = check_mixture(folders, image_root)
    if faults:
        print_faults(faults[:MAX_PRINTED_FAULTS])
    if len(faults) > MAX_PRINTED_FAULTS:
        print(f"... and {len(faults) - MAX_PRINTED_FAULTS} more")
    print(f"{len(faults)} faults in {', '.join(folders)}", file=sys.stderr)
    return 1 if faults else 0


def print_faults(faults: Sequence[Fault]) -> None:
    """Print faults as a table to the standard output: one line each, without colours, where that is no terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=PIPE_WIDTH, force_terminal=False, color_system=None) if not sys.stdout.isatty() else Console()
    table = Table("place", "field", "found", "expected", box=None, pad_edge=False)
    for row in faults:
        place = f"{row.file}:{row.line}" if row.line else row.file
        table.add_row(*(Text(" ".join(text.split()), overflow="fold") for text in (place, row.field, row.found, row.expected)))
    console.print(table)


def _stats(folder: Path, image_root: str | None, out: str | None, seed: int) -> int:
    from grex_mllm.data.stats import dataset_stats, sample_sheet

    print(json.dumps(dataset_stats(folder, image_root), indent=2, ensure_ascii=False))
    sheet = sample_sheet(folder, Path(out) if out else folder / "samples.png", seed=seed, image_root=image_root)
    print(f"picture sheet: {sheet}", file=sys.stderr)
    return 0
