"""Strict reading and atomic writing of dataset folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_folder import tiny_folder, tiny_records, write_folder

from grex_mllm.data.records import load_dataset
from grex_mllm.data.writing import DatasetWriter, image_to_json
from grex_mllm.errors import GrexError
from grex_mllm.types import ExpressionRecord, ImageRecord, Instance


def test_a_folder_reads_back(tmp_path: Path) -> None:
    dataset = load_dataset(tiny_folder(tmp_path))
    images, expressions = tiny_records()
    assert dataset.name == "tiny" and dataset.image_root == tmp_path / "images"
    assert list(dataset.images) == ["1", "2"] and dataset.images.line_of("2") == 2
    assert [image_to_json(record) for record in dataset.images.values()] == images
    assert [vars(record) for record in dataset.expressions] == expressions
    assert dataset.splits == ["train", "val"]
    assert [record.expression_id for record in dataset.expressions_of("val")] == ["e4", "e5"]
    assert load_dataset(tmp_path, "/elsewhere").image_root == Path("/elsewhere")


def test_unknown_split_names_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(GrexError, match=r'"test".*train, val'):
        load_dataset(tiny_folder(tmp_path)).expressions_of("test")


@pytest.mark.parametrize(
    ("line", "field", "value", "words"),
    [
        (1, "height", 0, "field height: 0"),
        (1, "height", "30", 'field height: "30"'),
        (1, "width", True, "field width: true"),
        (2, "image_id", 2, "field image_id: 2"),
        (2, "image_id", "1", "line 1 has the same"),
        (1, "instances", {}, "a list of instances"),
        (1, "colour", "red", "unknown field"),
        (2, "file", None, "field file: null"),
    ],
)
def test_image_lines_are_strict(tmp_path: Path, line: int, field: str, value: Any, words: str) -> None:
    images, expressions = tiny_records()
    images[line - 1][field] = value
    with pytest.raises(GrexError) as caught:
        load_dataset(write_folder(tmp_path, images, expressions))
    assert words in str(caught.value) and f"images.jsonl line {line}" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("box_xyxy", [1, 2, 3], "four finite numbers"),
        ("box_xyxy", [1, 2, 3, "4"], "four finite numbers"),
        ("segmentation", "rle", "a list of polygons"),
        ("segmentation", [[1, 2, None]], "a list of polygons"),
        ("segmentation", {"size": [3, 3]}, "a list of polygons"),
        ("iscrowd", 0, "true or false"),
        ("annotation_id", 7, "a non-empty string"),
        ("attributes", {"colour": "red"}, "whole numbers"),
        ("mask", [], "unknown field"),
    ],
)
def test_instances_are_strict(tmp_path: Path, field: str, value: Any, words: str) -> None:
    images, expressions = tiny_records()
    images[0]["instances"][1][field] = value
    with pytest.raises(GrexError) as caught:
        load_dataset(write_folder(tmp_path, images, expressions))
    assert words in str(caught.value) and f"instances[1].{field}" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("expression", "  ", "1 to 1,000 characters"),
        ("raw", "word " * 1000, "(5,002 characters)"),
        ("expression_id", "e1", "line 1 has the same"),
        ("image_id", "3", "the id of a line of images.jsonl"),
        ("targets", "11", "list of annotation ids"),
        ("targets", [11], "list of annotation ids"),
        ("split", "", "a non-empty string"),
        ("score", 1, "unknown field"),
    ],
)
def test_expression_lines_are_strict(tmp_path: Path, field: str, value: Any, words: str) -> None:
    images, expressions = tiny_records()
    expressions[2][field] = value
    with pytest.raises(GrexError) as caught:
        load_dataset(write_folder(tmp_path, images, expressions))
    assert words in str(caught.value) and "expressions.jsonl line 3" in str(caught.value)


@pytest.mark.parametrize("kind", ["images", "instances", "expressions"])
def test_every_field_is_required(tmp_path: Path, kind: str) -> None:
    fields = {"images": tiny_records()[0][0], "instances": tiny_records()[0][0]["instances"][0], "expressions": tiny_records()[1][0]}[kind]
    for field in list(fields):
        images, expressions = tiny_records()
        del {"images": images[0], "instances": images[0]["instances"][0], "expressions": expressions[0]}[kind][field]
        with pytest.raises(GrexError, match=f"{field}: missing"):
            load_dataset(write_folder(tmp_path, images, expressions))


def test_text_that_is_not_json(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    lines = (folder / "expressions.jsonl").read_text().splitlines()
    for bad in ("{", '{"a": NaN}', "[" * 100_000):
        (folder / "expressions.jsonl").write_text("\n".join([lines[0], bad, *lines[1:]]))
        with pytest.raises(GrexError, match=r"expressions.jsonl line 2.*not JSON"):
            load_dataset(folder)
    (folder / "expressions.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(GrexError, match="line 1"):
        load_dataset(folder)


def test_missing_files_and_folder(tmp_path: Path) -> None:
    with pytest.raises(GrexError, match="does not exist"):
        load_dataset(tmp_path / "nothing")
    for name in ("dataset.json", "images.jsonl", "expressions.jsonl"):
        folder = tiny_folder(tmp_path / name)
        (folder / name).unlink()
        with pytest.raises(GrexError, match=name):
            load_dataset(folder)
    folder = tiny_folder(tmp_path / "info")
    (folder / "dataset.json").write_text('{"name": "tiny"}')
    with pytest.raises(GrexError, match="image_root"):
        load_dataset(folder)


def test_a_file_that_changes_underneath_is_noticed(tmp_path: Path) -> None:
    dataset = load_dataset(tiny_folder(tmp_path))
    (tmp_path / "images.jsonl").write_text("{}\n" + (tmp_path / "images.jsonl").read_text())
    with pytest.raises(GrexError, match="no longer"):
        _ = dataset.images["2"]


def records() -> tuple[list[ImageRecord], list[ExpressionRecord]]:
    instance = Instance("1", "dog", [0.0, 0.0, 2.0, 2.0], [[0, 0, 2, 0, 2, 2]], attributes={"colour": 3})
    return [ImageRecord("7", "a.png", 4, 4, [instance])], [
        ExpressionRecord("x", "r", "7", "the dög", "The dög!", ["1"], "train", "tiny", ["t"])
    ]


def test_writing_and_reading(tmp_path: Path) -> None:
    images, expressions = records()
    with DatasetWriter(tmp_path / "out") as writer:
        writer.add_images(images)
        writer.add_expressions(expressions)
        writer.set_info({"name": "w", "image_root": "."})
    dataset = load_dataset(tmp_path / "out")
    assert list(dataset.images.values()) == images and dataset.expressions == expressions
    assert "dög" in (tmp_path / "out" / "expressions.jsonl").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_nothing_half_written_stays(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), DatasetWriter(tmp_path / "out") as writer:
        writer.add_images(records()[0])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_existing_folders_are_safe(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "old")
    before = (folder / "images.jsonl").read_bytes()
    with pytest.raises(GrexError, match="--overwrite"):
        DatasetWriter(folder)
    with pytest.raises(ValueError, match="boom"), DatasetWriter(folder, overwrite=True):
        raise ValueError("boom")
    assert (folder / "images.jsonl").read_bytes() == before
    with DatasetWriter(folder, overwrite=True) as writer:
        writer.set_info({"name": "new", "image_root": "."})
    assert load_dataset(folder).name == "new"
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years of work")
    with pytest.raises(GrexError, match=r"no dataset\.json"):
        DatasetWriter(other, overwrite=True)


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    images, expressions = records()
    expressions[0].expression = "x" * 1001
    with pytest.raises(GrexError, match="field expression"), DatasetWriter(tmp_path / "out") as writer:
        writer.add_expressions(expressions)
    images[0].instances[0].segmentation, images[0].instances[0].mask = None, np.zeros((4, 4), bool)
    with pytest.raises(GrexError, match="pixel mask only"), DatasetWriter(tmp_path / "out") as writer:
        writer.add_images(images)
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_numpy_are_refused_with_the_field(tmp_path: Path) -> None:
    images, _ = records()
    images[0].height = np.int64(4)  # type: ignore[assignment]
    with pytest.raises(GrexError, match="field height"), DatasetWriter(tmp_path / "out") as writer:
        writer.add_images(images)


def test_memory_holds_no_image_records(tmp_path: Path) -> None:
    images, expressions = tiny_records()
    dataset = load_dataset(write_folder(tmp_path, images, expressions))
    assert dataset.images["1"] is not dataset.images["1"]  # parsed anew from the file
    assert json.loads((tmp_path / "images.jsonl").read_text().splitlines()[0])["image_id"] == "1"
