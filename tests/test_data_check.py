"""`check_mixture` finds every kind of fault, all of them at once, and none in a sound folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_folder import expression, rectangle_mask, tiny_folder, tiny_records, write_folder

from grex_mllm.data.check import check_mixture
from grex_mllm.data.stats import dataset_stats, sample_sheet
from grex_mllm.ops.masks import encode_rle

Lines = list[dict[str, Any]]
Change = Callable[[Lines, Lines], None]


def test_a_sound_folder_has_no_fault(tmp_path: Path) -> None:
    assert check_mixture([tiny_folder(tmp_path)]) == []


def edit(part: str, line: int, field: str, value: Any) -> Change:
    def change(images: Lines, expressions: Lines) -> None:
        (images if part == "image" else expressions)[line - 1][field] = value

    return change


def edit_instance(line: int, position: int, field: str, value: Any) -> Change:
    def change(images: Lines, expressions: Lines) -> None:
        images[line - 1]["instances"][position][field] = value

    return change


FAULTS: list[tuple[Change, str, int, str, str]] = [  # change, file, line, words in the field, words in found or expected
    (edit("image", 1, "file", "c.png"), "images.jsonl", 1, "file", "does not exist"),
    (edit("image", 1, "file", "../a.png"), "images.jsonl", 1, "file", "without '..'"),
    (edit("image", 2, "image_id", "1"), "images.jsonl", 2, "image_id", "line 1 has the same"),
    (edit("image", 1, "height", -1), "images.jsonl", 1, "height", "above 0"),
    (edit("image", 1, "camera", 1), "images.jsonl", 1, "camera", "unknown field"),
    (edit_instance(1, 1, "segmentation", encode_rle(rectangle_mask(20, 5, 30, 15, 40, 30))), "images.jsonl", 1, "segmentation", "swapped"),
    (edit_instance(1, 1, "segmentation", {"size": [30, 40], "counts": [5]}), "images.jsonl", 1, "segmentation", "5 pixels"),
    (edit_instance(1, 1, "segmentation", encode_rle(np.zeros((30, 40), bool))), "images.jsonl", 1, "segmentation", "without a pixel"),
    (edit_instance(1, 0, "segmentation", [[1, 1, 5, 5]]), "images.jsonl", 1, "segmentation", "without a pixel"),
    (edit_instance(1, 0, "box_xyxy", [2, 3, 17, 13]), "images.jsonl", 1, "box_xyxy", "within 1.5 px"),
    (edit_instance(2, 1, "box_xyxy", [16, 5, 36, 25]), "images.jsonl", 2, "box_xyxy", "inside the image"),
    (edit_instance(2, 1, "box_xyxy", [16, 5, 16, 25]), "images.jsonl", 2, "box_xyxy", "x1 < x2"),
    (edit_instance(1, 1, "annotation_id", "11"), "images.jsonl", 1, "annotation_id", "more than once"),
    (edit("expression", 1, "targets", ["99"]), "expressions.jsonl", 1, "targets", "image 1 (images.jsonl line 1)"),
    (edit("expression", 1, "targets", ["21"]), "expressions.jsonl", 1, "targets", "annotation of image 1"),
    (edit("expression", 1, "targets", ["13"]), "expressions.jsonl", 1, "targets", "crowd region"),
    (edit("expression", 1, "targets", ["11", "11"]), "expressions.jsonl", 1, "targets", "2 times"),
    (edit("expression", 1, "expression", ""), "expressions.jsonl", 1, "expression", "1 to 1,000 characters"),
    (edit("expression", 1, "expression", "x" * 5000), "expressions.jsonl", 1, "expression", "characters"),
    (edit("expression", 2, "expression_id", "e1"), "expressions.jsonl", 2, "expression_id", "line 1"),
    (edit("expression", 2, "image_id", "9"), "expressions.jsonl", 2, "image_id", "images.jsonl"),
    (edit("expression", 3, "split", "val"), "expressions.jsonl", 3, "split", "one split"),
]


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_each_fault_is_found_where_it_is(tmp_path: Path, number: int) -> None:
    change, file, line, field, words = FAULTS[number]
    images, expressions = tiny_records()
    change(images, expressions)
    faults = check_mixture([write_folder(tmp_path, images, expressions)])
    hits = [fault for fault in faults if fault.file.endswith(file) and fault.line == line and field in fault.field]
    assert any(words in fault.found or words in fault.expected for fault in hits), [str(fault) for fault in faults]


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    images, expressions = tiny_records()
    for change in (FAULTS[0], FAULTS[9], FAULTS[13], FAULTS[21]):
        change[0](images, expressions)
    folder = write_folder(tmp_path, images, expressions)
    with (folder / "expressions.jsonl").open("a") as file:
        file.write("{oops\n")
    found = [(fault.file.rsplit("/", 1)[-1], fault.line, fault.field.rsplit(".", 1)[-1]) for fault in check_mixture([folder])]
    assert found == [
        ("images.jsonl", 1, "file"),
        ("images.jsonl", 1, "box_xyxy"),
        ("expressions.jsonl", 1, "targets"),
        ("expressions.jsonl", 6, "(line)"),
        ("expressions.jsonl", 3, "split"),
    ]


def test_swapped_sides_truncated_jpeg_and_missing_files(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    Image.open(folder / "images" / "a.png").transpose(Image.Transpose.ROTATE_90).save(folder / "images" / "a.png")
    (folder / "images" / "b.png").write_bytes((folder / "images" / "b.png").read_bytes()[:60])
    swapped, truncated = check_mixture([folder])
    assert swapped.found == "30x40" and "swapped" in swapped.expected and swapped.line == 1
    assert "cannot be read" in truncated.found and truncated.line == 2
    (folder / "expressions.jsonl").unlink()
    assert any(fault.found == "missing" for fault in check_mixture([folder]))
    assert {Path(fault.file).name for fault in check_mixture([tmp_path / "nowhere"])} == {
        "dataset.json",
        "images.jsonl",
        "expressions.jsonl",
    }


def test_a_file_cut_between_lines_is_noticed(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    (folder / "dataset.json").write_text(json.dumps({"name": "tiny", "image_root": "images", "num_images": 2, "num_expressions": 6}))
    (fault,) = check_mixture([folder])
    assert (fault.field, fault.found) == ("num_expressions", "6") and fault.expected.startswith("5")


def test_a_leak_between_folders_is_found_by_id_and_by_content(tmp_path: Path) -> None:
    first = tiny_folder(tmp_path / "first")
    images, _ = tiny_records()
    images[0]["image_id"] = "other"  # the same picture under another name
    second = write_folder(
        tmp_path / "second", images, [expression("f1", "other", "the dog", ["11"], "test"), expression("f2", "2", "cat", ["21"])]
    )
    assert check_mixture([second]) == []
    faults = check_mixture([first, second])
    assert [(fault.line, fault.field) for fault in faults] == [(1, "split"), (2, "split")]
    assert '"train"' in faults[0].expected and "second" in faults[0].file


def test_the_image_root_can_be_given(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "folder")
    (folder / "images").rename(tmp_path / "moved")
    assert len(check_mixture([folder])) == 2
    assert check_mixture([folder], tmp_path / "moved") == []


def test_stats_by_hand(tmp_path: Path) -> None:
    stats = dataset_stats(tiny_folder(tmp_path))
    assert (stats["num_images"], stats["num_instances"], stats["num_crowd_regions"], stats["num_expressions"]) == (2, 4, 1, 5)
    assert stats["categories"] == {"dog": 2, "cat": 2}
    train = stats["splits"]["train"]
    assert train["by_num_targets"] == {"0": 1, "1": 1, "2": 1} and train["expressions"] == 3 and train["images"] == 1
    assert train["words"] == {"mean": 3.0, "median": 2.0, "p95": pytest.approx(4.7), "max": 5, "by_length": {"2": 2, "5": 1}}
    json.dumps(stats)


def test_the_sheet_is_seeded_and_shows_every_kind(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "folder")
    one, two = sample_sheet(folder, tmp_path / "one.png", num=3, seed=5), sample_sheet(folder, tmp_path / "two.png", num=3, seed=5)
    assert one.read_bytes() == two.read_bytes()
    sheet = np.asarray(Image.open(one).convert("RGB"))
    assert sheet.shape[1] > 3 * 400 and (sheet != 255).any(axis=(0, 2)).mean() > 0.7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "one.png", "two.png"]
