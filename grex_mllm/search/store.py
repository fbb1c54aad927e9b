"""The index on disk: rows of one size in a file that is mapped into memory, and a journal that says whose they are.

`index.json` says what a row holds and which model made it, `features.bin` holds the rows, `images.jsonl` a line for every file that was
read, refused or removed; a later line about a file takes the place of an earlier one. A row is on the disk before its line is. So whatever
is cut off in between is not there, and is done again; a row that does not fit its line's checksum, too.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from grex_mllm.errors import GrexError, fault
from grex_mllm.writing import flush_entry, whole_file

HEAD, ROWS, JOURNAL, LOCK = "index.json", "features.bin", "images.jsonl", "index.lock"
VERSION = 1
MAX_LINE_BYTES = 100_000
LOCK_WAIT_S = 5.0


@dataclass(frozen=True)
class Entry:
    """What is known of a file. row: its place in the rows, -1 = none.  refused: why it has none."""

    file: str
    size_bytes: int
    mtime_ns: int
    row: int = -1
    crc32: int = 0
    refused: str = ""


class IndexStore:
    """An index folder. head: what `index.json` must say; it is written where there is none.

    Raises:
        GrexError: an index of another model or version (without `rebuild`), a damaged head, or a folder that cannot be written to.
    """

    def __init__(self, folder: str | Path, head: dict[str, Any], row_bytes: int, *, rebuild: bool = False) -> None:
        self.folder, self.row_bytes = Path(folder), row_bytes
        self.entries: dict[str, Entry] = {}
        self._num_lines = 0
        wanted = {"version": VERSION, "row_bytes": row_bytes, **head}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.lock():
                if rebuild or not (self.folder / HEAD).exists():
                    self._start(wanted)
                self._check(wanted)
                self._read()
        except OSError as error:
            given = f"the index folder {self.folder} cannot be used ({error.strerror or error})"
            raise fault(given, "a folder that can be written to", "give another with --index") from None

    def lock(self) -> Any:
        """Return what keeps other processes from writing, while it is entered; the system frees it when a process is killed.

        Raises:
            GrexError: on entering, where another process writes.
        """
        return _Lock(self.folder / LOCK)

    @property
    def indexed(self) -> list[Entry]:
        """The files with a row, in the order of their names."""
        return sorted((entry for entry in self.entries.values() if entry.row >= 0), key=lambda entry: entry.file)

    def rows(self, places: Sequence[int]) -> np.ndarray:
        """Return uint8 [n, row_bytes] of some rows; only they are read from the disk."""
        if not len(places):
            return np.zeros((0, self.row_bytes), np.uint8)
        return np.asarray(self._mapped()[np.asarray(places, np.int64)])

    def add(self, entries: Sequence[Entry], rows: np.ndarray) -> None:
        """Keep files with their rows uint8 [n, row_bytes]; their places and checksums are filled in. Files that were known are replaced."""
        free = self._free(len(entries))
        with open(self.folder / ROWS, "r+b") as file:
            for place, row in zip(free, rows, strict=True):
                file.seek(place * self.row_bytes)
                file.write(row.tobytes())
            file.flush()
            os.fsync(file.fileno())
        placed = [
            Entry(entry.file, entry.size_bytes, entry.mtime_ns, place, zlib.crc32(row.tobytes()))
            for entry, place, row in zip(entries, free, rows, strict=True)
        ]
        self.note(placed)

    def note(self, entries: Sequence[Entry], removed: Sequence[str] = ()) -> None:
        """Write lines about files that have their row, were refused, or are gone."""
        lines = [asdict(entry) for entry in entries] + [{"file": name, "removed": True} for name in removed]
        if not lines:
            return
        with open(self.folder / JOURNAL, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        self.entries |= {entry.file: entry for entry in entries}
        for name in removed:
            self.entries.pop(name, None)
        self._num_lines += len(lines)

    def tidy(self) -> None:
        """Write the journal anew where most of its lines are no longer true."""
        if self._num_lines > 2 * len(self.entries) + 100:
            with whole_file(self.folder / JOURNAL) as work:
                work.write_text("".join(json.dumps(asdict(entry)) + "\n" for entry in self.entries.values()), encoding="utf-8")
            self._num_lines = len(self.entries)

    def _start(self, wanted: dict[str, Any]) -> None:
        for name in (HEAD, JOURNAL, ROWS):
            (self.folder / name).unlink(missing_ok=True)
        for name in (JOURNAL, ROWS):
            (self.folder / name).touch()
        with whole_file(self.folder / HEAD) as work:
            work.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
        flush_entry(self.folder)

    def _check(self, wanted: dict[str, Any]) -> None:
        remedy = "give another folder with --index, or --rebuild to replace it"
        try:
            head = json.loads((self.folder / HEAD).read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            head = None
        if not isinstance(head, dict):
            raise fault(f"{self.folder / HEAD} is damaged", "what the index holds, as JSON", remedy)
        for name, value in wanted.items():
            if head.get(name) != value:
                raise fault(
                    f"the index in {self.folder} was made by another model or version ({name} differs)", "one of this model", remedy
                )
        for name in (JOURNAL, ROWS):
            if not (self.folder / name).is_file():
                raise fault(f"{self.folder} without {name}", "an index that is whole", remedy)

    def _read(self) -> None:
        """Read the journal up to the first line that is cut off or damaged, and drop the rest, and entries whose rows do not fit."""
        good = 0
        with open(self.folder / JOURNAL, "rb") as file:
            while line := file.readline(MAX_LINE_BYTES):
                change = _parsed(line)
                if change is None:
                    break
                good = file.tell()
                self._num_lines += 1
                if isinstance(change, Entry):
                    self.entries[change.file] = change
                else:
                    self.entries.pop(change, None)
        if good < (self.folder / JOURNAL).stat().st_size:
            os.truncate(self.folder / JOURNAL, good)
        mapped = self._mapped()
        for entry in [entry for entry in self.entries.values() if entry.row >= 0]:
            if entry.row >= len(mapped) or zlib.crc32(mapped[entry.row].tobytes()) != entry.crc32:
                del self.entries[entry.file]

    def _mapped(self) -> np.ndarray:
        count = (self.folder / ROWS).stat().st_size // self.row_bytes
        if not count:
            return np.zeros((0, self.row_bytes), np.uint8)
        return np.memmap(self.folder / ROWS, np.uint8, "r", shape=(count, self.row_bytes))

    def _free(self, number: int) -> list[int]:
        """Return places for new rows: those of no file first. An image that changed keeps its old row until its line is written."""
        used = {entry.row for entry in self.entries.values()}
        places = (place for place in range(len(used) + number + 1) if place not in used)
        return [next(places) for _ in range(number)]


class _Lock:
    def __init__(self, path: Path) -> None:
        from filelock import FileLock

        self._path, self._lock = path, FileLock(path, timeout=LOCK_WAIT_S)

    def __enter__(self) -> None:
        from filelock import Timeout

        try:
            self._lock.acquire()
        except Timeout:
            raise fault(f"{self._path.parent} is being written by another process", "one at a time", "wait for it") from None

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _parsed(line: bytes) -> Entry | str | None:
    """Return what a line of the journal says: an entry, the name of a removed file, or None for a damaged line."""
    try:
        fields = json.loads(line) if line.endswith(b"\n") else None
        if not isinstance(fields, dict):
            return None
        if fields.get("removed") is True:
            return str(fields["file"])
        entry = Entry(**fields)
    except (ValueError, TypeError, KeyError, RecursionError, GrexError):
        return None
    numbers = (entry.size_bytes, entry.mtime_ns, entry.row, entry.crc32)
    whole = all(isinstance(number, int) for number in numbers) and isinstance(entry.file, str) and isinstance(entry.refused, str)
    return entry if whole else None
