"""Answers on disk, so that the same request is never paid twice: one SQLite file, shared by any number of processes, safe to kill.

Neither pictures nor keys of servers are in it: what was asked stands as a SHA-256, what was answered as JSON.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from grex_mllm.errors import GrexError, fault
from grex_mllm.zeroshot.base import FINISHES, RawAnswer

APPLICATION = 0x67726578  # "grex": which program a SQLite file belongs to
VERSION = 1
BUSY_S = 60.0
NAMES = {f.name for f in fields(RawAnswer)} - {"cached", "cost"}

T = TypeVar("T")


class Store:
    """Answers by key.

    path: of the file; it is made where there is none.

    Raises:
        GrexError: a file that is no such store, that is damaged, or in a place where SQLite cannot share it between processes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._closed = False
        self._lock = threading.Lock()
        with self._told():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            self._open_patiently()

    def _open_patiently(self) -> None:
        """Open the file; SQLite's own patience does not cover the moment in which another process turns a new file's journal to WAL."""
        end = time.monotonic() + BUSY_S
        while True:
            try:
                self._open()
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
                if self._file.in_transaction:
                    self._file.execute("ROLLBACK")
                time.sleep(0.02)

    def _open(self) -> None:
        mode = self._file.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        if mode != "wal":
            raise fault(
                f"cache {self.path} in a place where SQLite has journal mode {mode}", "a local disk (mode wal)", "choose another cache"
            )
        self._file.execute("PRAGMA synchronous=NORMAL")
        self._file.execute("BEGIN IMMEDIATE")  # of several processes that find no file, one makes the table
        (version,) = self._file.execute("PRAGMA user_version").fetchone()
        (application,) = self._file.execute("PRAGMA application_id").fetchone()
        (tables,) = self._file.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables == 0:
            self._file.execute(f"PRAGMA application_id={APPLICATION}")
            self._file.execute(f"PRAGMA user_version={VERSION}")
            self._file.execute("CREATE TABLE answers (key TEXT PRIMARY KEY, model TEXT NOT NULL, answer TEXT NOT NULL) WITHOUT ROWID")
        self._file.execute("COMMIT")
        if tables and (application, version) != (APPLICATION, VERSION):
            given = f"cache {self.path} is a SQLite file of another program or version"
            raise fault(given, f"answers of this program, version {VERSION}", "choose another cache")

    def get(self, key: str) -> RawAnswer | None:
        """Return the answer to a key, marked as cached; None where there is none."""
        row = self._do(lambda: self._file.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone())
        if row is None:
            return None
        try:
            return self._read(row[0])
        except (ValueError, TypeError):
            raise self._damaged("an answer that cannot be read") from None

    def put(self, key: str, model: str, answer: RawAnswer) -> None:
        """Keep an answer that came whole; of several to one key the first stays."""
        assert answer.finish != "error", "an error is no answer"
        text = json.dumps({name: value for name, value in answer.fields().items() if name in NAMES})
        self._do(lambda: self._file.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", (key, model, text)).fetchone())

    def __len__(self) -> int:
        count: int = self._do(lambda: self._file.execute("SELECT count(*) FROM answers").fetchone()[0])
        return count

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._closed = True
            self._file.close()

    def settle(self) -> None:
        """Move what was written into the file itself, as far as no other process is reading; a closed file is settled."""
        if not self._closed:
            self._do(lambda: self._file.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall())

    def _read(self, text: str) -> RawAnswer:
        known = json.loads(text)
        if not isinstance(known, dict) or not known.keys() <= NAMES or known.get("finish") not in FINISHES:
            raise ValueError("no answer")
        if known.get("sent") is not None:
            known["sent"] = tuple(known["sent"])
        return RawAnswer(known.pop("text", None), **known, cached=True)

    def _do(self, action: Callable[[], T]) -> T:
        with self._lock, self._told():
            return action()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn what SQLite and the disk say into what a person can act on."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise self._no_place(str(error)) from None
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from None
        except OSError as error:
            raise self._no_place(str(error.strerror)) from None

    def _no_place(self, why: str) -> GrexError:
        return fault(f"cache {self.path} cannot be used ({why})", "a place that can be written to", "choose another, or free it")

    def _damaged(self, why: str) -> GrexError:
        return fault(f"cache {self.path} is damaged ({why})", "a SQLite file of answers", "move it away; answers in it are asked again")
