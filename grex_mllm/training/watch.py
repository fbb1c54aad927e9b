"""Who hangs: every process marks where it stands; when nothing has moved for too long, the one that is behind is named and all end.

The marks are files in `train.out`, so that they can be read while every process is stuck in a collective operation or has been frozen.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

FOLDER = ".standing"
STATUS = 3  # exit status of a run that was ended because it hung
LOOKS = 10  # how often a process looks around within the limit
LONGEST_LOOK_S = 30.0
LINE_BYTES = 320


class Watch:
    """Watch one process of a run and, through files, the others; `mark` tells that it goes on.

    limit_s: seconds without a mark after which the run ends with status 3 (`train.hang_s`); 0 = no watch.
    A process that was itself stopped for a while (a closed laptop, a debugger of the system) does not count that time.
    """

    def __init__(self, out: str | Path, rank: int, num_ranks: int, limit_s: float) -> None:
        self.folder, self.rank, self.num_ranks, self.limit_s = Path(out) / FOLDER, rank, num_ranks, limit_s
        self._standing: dict[str, Any] = {"step": 0, "doing": "starting", "mark": 0, "beat": 0}
        self._standing |= {"host": socket.gethostname()[:64], "process": os.getpid()}
        self._lock, self._done = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._look_around, name="watch", daemon=True)
        self._file: int | None = None

    def __enter__(self) -> Self:
        if self.limit_s > 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.rank == 0:  # what a killed run of more processes left
                for left in set(self.folder.glob("rank_*.json")) - {self._path(rank) for rank in range(self.num_ranks)}:
                    left.unlink(missing_ok=True)
            self._file = os.open(self._path(self.rank), os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            self._write()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._done.set()
            self._thread.join()
            os.close(self._file)
            with contextlib.suppress(OSError):  # the last process removes the folder
                self._path(self.rank).unlink()
                self.folder.rmdir()

    def mark(self, step: int, doing: str) -> None:
        """Say what this process does from now on, in which step."""
        if self._file is not None:
            with self._lock:
                self._standing |= {"step": step, "doing": doing, "mark": self._standing["mark"] + 1}
                self._write()

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.json"

    def _write(self) -> None:
        assert self._file is not None
        line = json.dumps(self._standing).ljust(LINE_BYTES) + "\n"
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, line.encode())

    def _look_around(self) -> None:
        every = min(self.limit_s / LOOKS, LONGEST_LOOK_S)
        waited, last, seen = 0.0, time.monotonic(), -1
        beats: dict[int, int] = {}
        while not self._done.wait(every):
            now = time.monotonic()
            waited, last = waited + min(now - last, 2 * every), now
            with self._lock:
                self._standing["beat"] += 1
                self._write()
                mark = self._standing["mark"]
            with contextlib.suppress(OSError):  # other machines see the line at once
                os.fsync(self._file or 0)
            if mark != seen:
                seen, waited, beats = mark, 0.0, {}
            if waited > self.limit_s / 2 and not beats:
                beats = {rank: line["beat"] for rank, line in self._read().items()}
            if waited > self.limit_s:
                self._end(self._read(), beats)

    def _read(self) -> dict[int, dict[str, Any]]:
        """Return where the processes stand; one that has ended has no file."""
        found = {}
        for rank in range(self.num_ranks):
            with contextlib.suppress(OSError, ValueError):
                found[rank] = json.loads(self._path(rank).read_text(encoding="utf-8"))
        return found

    def _end(self, lines: dict[int, dict[str, Any]], beats: dict[int, int]) -> None:
        """Name who is behind and end this process; the launcher ends the others, or their own watch does."""
        behind = find_behind(lines, beats, self.num_ranks)
        speakers = {rank for rank in behind if rank in lines} | {min(set(lines) - set(behind), default=self.rank)}
        if self.rank in speakers:
            print(describe(lines, behind, self.limit_s, self.num_ranks), file=sys.stderr, flush=True)
        time.sleep(0.0 if self.rank in speakers else 1.0)  # the words come before the launcher's signal
        os._exit(STATUS)


def find_behind(lines: dict[int, dict[str, Any]], beats: dict[int, int], num_ranks: int) -> dict[int, str]:
    """Return rank -> what is wrong with it; empty where all stand at the same place.

    lines: where the processes stand.  beats: rank -> its beat half the limit ago; one that answers has a higher one now.
    """
    behind = {rank: "has ended" for rank in range(num_ranks) if rank not in lines}
    behind |= {rank: "does not answer" for rank, line in lines.items() if beats.get(rank) == line["beat"]}
    if (not behind and len({line["mark"] for line in lines.values()}) > 1) or len(lines) == num_ranks == 1:
        lowest = min(line["mark"] for line in lines.values())
        behind = {rank: "has not gone on" for rank, line in lines.items() if line["mark"] == lowest}
    return behind


def describe(lines: dict[int, dict[str, Any]], behind: dict[int, str], limit_s: float, num_ranks: int) -> str:
    """Return the message: who is behind, at which step, doing what, on which machine; where the others stand; what to do."""

    def place(rank: int) -> str:
        line = lines.get(rank)
        return f"at step {line['step']} ({line['doing']}; process {line['process']} on {line['host']})" if line else "at an unknown step"

    named = "; ".join(f"rank {rank} {what} {place(rank)}" for rank, what in sorted(behind.items()))
    others = [rank for rank in sorted(lines) if rank not in behind]
    if others and behind:
        line = lines[others[0]]
        named += f"; {len(others)} of {num_ranks} wait, rank {others[0]} at step {line['step']} ({line['doing']})"
    if not behind and lines:
        named = f"all {num_ranks} ranks wait for each other {place(min(lines))}"
    expected = "every process to go on within train.hang_s"
    return f"training hung for {limit_s:g} s: {named}; expected {expected}; look at that process, then go on with --train.resume=true"
