"""Files and folders that appear whole or not at all: written under another name, flushed to the disk, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield the name beside `path` to write to; after the block the file takes its place. A block that fails leaves what was there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield work
        flush(work)
        take_place(work, path)
    finally:
        work.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Yield the new empty folder beside `path` to fill; after the block it takes its place. A block that fails leaves what was there."""
    path = Path(path)
    work = path.with_name(f".{path.name}.partial")
    shutil.rmtree(work, ignore_errors=True)  # left over by a killed run
    work.mkdir(parents=True)
    try:
        yield work
        flush(work)
        take_place(work, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def whole_entries(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder within `folder` to fill; after the block its files and folders take their places there, each of them whole."""
    work = Path(folder) / ".writing"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
        flush(work)
        for item in sorted(work.iterdir()):
            take_place(item, Path(folder) / item.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def take_place(source: Path, target: Path) -> None:
    """Rename source to target; a folder that is in the way is moved aside first, since folders cannot be overwritten."""
    if target.is_dir():
        aside = target.parent / f".old_{target.name}"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(target, aside)
        os.rename(source, target)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.replace(source, target)
    flush_entry(target.parent)


def flush(path: Path) -> None:
    """Write a file, or every file and folder below a folder, through to the disk."""
    for item in [path, *path.rglob("*")] if path.is_dir() else [path]:
        flush_entry(item)


def flush_entry(path: Path, windows: bool = os.name == "nt") -> None:
    """Write one file, or one folder's list of names, through to the disk."""
    if windows and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)  # and flushes only what may be written to
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
