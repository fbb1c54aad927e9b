"""Progress that tells what is happening and how long it takes: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

PLAIN_EVERY_S = 15.0
NUM_SHOWN = 5


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[..., None]]:
    """Yield `advance(share, note)`: share done in [0, 1], and a number or text to show beside it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield from _plain(title)
        return
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), *times, TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=1.0, note="")
        yield lambda share, note="": bar.update(task, completed=share, note=_text(note))


def list_ids(what: str, ids: Iterable[str]) -> str:
    """Return one line: how many, what befell them, and the first ids."""
    listed = list(ids)
    more = ", ..." if len(listed) > NUM_SHOWN else ""
    return f"{len(listed)} {what}: {', '.join(listed[:NUM_SHOWN])}{more}"


def _plain(title: str) -> Iterator[Callable[..., None]]:
    start = last = time.monotonic()

    def advance(share: float, note: object = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PLAIN_EVERY_S:
            last = now
            left = (now - start) / share * (1.0 - share) if share > 0 else float("nan")
            print(f"{title}: {share:4.0%}, {now - start:.0f} s, {left:.0f} s left {_text(note)}", file=sys.stderr, flush=True)

    yield advance
    print(f"{title}: done in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def _text(note: object) -> str:
    return f"{note:.3f}" if isinstance(note, float) else str(note)
