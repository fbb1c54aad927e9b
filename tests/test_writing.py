"""Files and folders that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from grex_mllm.writing import whole_entries, whole_file, whole_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_at_the_end_of_the_block(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "a.txt"
    for text in ("one", "two"):
        before = path.read_text() if path.exists() else None
        with whole_file(path) as work:
            work.write_text(text)
            assert (path.read_text() if path.exists() else None) == before and work.parent == path.parent
        assert path.read_text() == text and names(path.parent) == ["a.txt"]
    with pytest.raises(OSError, match="disk full"), whole_file(path) as work:
        work.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "two" and names(path.parent) == ["a.txt"]


def test_a_folder_is_replaced_at_the_end_of_the_block(tmp_path: Path) -> None:
    folder = tmp_path / "deeper" / "data"
    (folder.parent / ".data.partial" / "of a killed run").mkdir(parents=True)
    for name in ("one", "two"):
        with whole_folder(folder) as work:
            (work / "images").mkdir()
            (work / "images" / name).write_text(name)
        assert names(folder / "images") == [name] and names(folder.parent) == ["data"]
    with pytest.raises(OSError, match="disk full"), whole_folder(folder):
        raise OSError("disk full")
    assert names(folder / "images") == ["two"] and names(folder.parent) == ["data"]


def test_entries_take_their_places_beside_others(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("stays")
    for text in ("one", "two"):
        with whole_entries(tmp_path) as work:
            (work / "tokenizer").mkdir()
            (work / "tokenizer" / text).write_text(text)
            (work / "weights").write_text(text)
        assert names(tmp_path) == ["other", "tokenizer", "weights"] and names(tmp_path / "tokenizer") == [text]
    with pytest.raises(OSError, match="disk full"), whole_entries(tmp_path) as work:
        (work / "weights").write_text("half")
        raise OSError("disk full")
    assert (tmp_path / "weights").read_text() == "two" and names(tmp_path) == ["other", "tokenizer", "weights"]
