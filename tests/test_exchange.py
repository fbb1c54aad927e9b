"""Predictions in other tools' forms and back: COCO results, Label Studio both ways, supervision, FiftyOne, notebooks."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_folder import HEIGHT, WIDTH, rectangle_mask, tiny_folder

from grex_mllm.cli import main
from grex_mllm.data.check import check_mixture
from grex_mllm.data.records import load_dataset
from grex_mllm.errors import GrexError
from grex_mllm.exchange.brush import decode_brush, encode_brush
from grex_mllm.exchange.found import objects_of
from grex_mllm.exchange.label_studio import read_annotations, write_tasks
from grex_mllm.exchange.libraries import detections_fields, fiftyone_fields, to_fiftyone, to_supervision
from grex_mllm.ops.masks import encode_rle, segmentation_to_mask
from grex_mllm.score import score
from grex_mllm.types import Grounding

TWO = rectangle_mask(2, 3, 12, 13) | rectangle_mask(20, 5, 30, 15)
BOXES = [[2.0, 3.0, 12.0, 13.0], [20.0, 5.0, 30.0, 15.0]]


def predictions(folder: Path, lines: list[dict[str, Any]]) -> Path:
    file = folder / "predictions.jsonl"
    file.write_text("".join(json.dumps({"status": "ok", **line}) + "\n" for line in lines), encoding="utf-8")
    return file


@pytest.fixture
def answered(tmp_path: Path) -> tuple[Path, Path]:
    """A dataset folder, and right answers for its split train: one object without boxes, two with, none."""
    data = tiny_folder(tmp_path / "data")
    nothing = encode_rle(np.zeros((HEIGHT, WIDTH), bool))
    lines = [
        {
            "expression_id": "e1",
            "mask_rle": encode_rle(rectangle_mask(2, 3, 12, 13)),
            "boxes_xyxy": BOXES[:1],
            "box_scores": [0.9],
            "count": 1,
        },
        {
            "expression_id": "e2",
            "mask_rle": encode_rle(TWO),
            "boxes_xyxy": BOXES,
            "box_scores": [0.9, 0.7],
            "count": 2,
            "no_target_prob": 0.2,
        },
        {
            "expression_id": "e3",
            "mask_rle": nothing,
            "boxes_xyxy": [],
            "box_scores": [],
            "count": 0,
            "no_target_prob": 0.9,
            "no_target": True,
        },
    ]
    return data, predictions(tmp_path, lines)


def submitted(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What Label Studio exports where people submit the pre-annotations as they are."""
    return [{"id": n, "data": task["data"], "annotations": [{"id": n, "was_cancelled": False, "result": task["predictions"][0]["result"]}]}
            for n, task in enumerate(tasks)]  # fmt: skip


def union(folder: Path, expression_id: str) -> np.ndarray:
    dataset = load_dataset(folder)
    (record,) = [r for r in dataset.expressions if r.expression_id == expression_id]
    image = dataset.images[record.image_id]
    mask = np.zeros((image.height, image.width), bool)
    for instance in image.instances:
        if instance.annotation_id in record.targets:
            mask |= segmentation_to_mask(instance.segmentation, image.height, image.width)
    return mask


@given(st.integers(1, 9), st.integers(1, 9), st.data())
@settings(max_examples=40, deadline=None)
def test_brush_code_there_and_back(height: int, width: int, data: st.DataObject) -> None:
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))).reshape(height, width)
    np.testing.assert_array_equal(decode_brush(encode_brush(mask), height, width), mask)


def test_brush_code_by_hand() -> None:
    """2 x 1 pixels, the first one set: head, a run of four 255, a run of four 0."""
    head = f"{8:032b}" + f"{7:05b}" + f"{2:04b}{3:04b}{7:04b}{15:04b}"
    bits = head + "1" + "00" + "011" + "1" * 8 + "1" + "00" + "011" + "0" * 8
    bits += "0" * (-len(bits) % 8)
    code = [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]
    assert encode_brush(np.array([[True, False]])) == code
    literal = (
        head + "0" + "00" + "111" + "".join(f"{v:08b}" for v in (9, 9, 9, 0, 0, 0, 0, 200))
    )  # as painting tools write: values one by one
    literal += "0" * (-len(literal) % 8)
    code = [int(literal[i : i + 8], 2) for i in range(0, len(literal), 8)]
    assert decode_brush(code, 1, 2).tolist() == [[False, True]]


def test_brush_code_of_a_large_mask() -> None:
    mask = np.zeros((600, 800), bool)
    mask[100:500, 200:700] = True
    code = encode_brush(mask)
    np.testing.assert_array_equal(decode_brush(code, 600, 800), mask)
    assert len(code) < 10_000


@pytest.mark.parametrize("code", ["x", [1.5], [-1], [256], [], [0] * 3, encode_brush(TWO)[:-3], encode_brush(TWO[:-1])])
def test_damaged_brush_codes(code: Any) -> None:
    with pytest.raises(GrexError):
        decode_brush(code, HEIGHT, WIDTH)


def test_objects_share_the_mask() -> None:
    found = objects_of(TWO, BOXES, [0.9, 0.7])
    np.testing.assert_array_equal(found[0].mask, rectangle_mask(2, 3, 12, 13))
    np.testing.assert_array_equal(found[1].mask, rectangle_mask(20, 5, 30, 15))
    stray = TWO | rectangle_mask(35, 25, 38, 28)
    parts = [f.mask for f in objects_of(stray, BOXES, None) if f.mask is not None]
    np.testing.assert_array_equal(parts[0] | parts[1], stray)
    assert not (parts[0] & parts[1]).any()
    assert objects_of(np.zeros((2, 2), bool), None, None) == objects_of(None, None, None) == []
    assert [f.box_xyxy for f in objects_of(None, BOXES, [0.1, 0.2])] == BOXES


def test_coco_results_score_as_the_predictions(answered: tuple[Path, Path], tmp_path: Path) -> None:
    data, file = answered
    assert main(["convert", "coco", str(file), str(data), "--out", str(tmp_path / "coco.json")]) == 0
    rows = json.loads((tmp_path / "coco.json").read_text(encoding="utf-8"))
    assert [row["expression_id"] for row in rows] == ["e1", "e2", "e2", "e3"]
    assert rows[1]["bbox"] == [2, 3, 10, 10] and "bbox" not in rows[3]
    both = []
    for given_file in (file, tmp_path / "coco.json"):
        score(given_file, data, "train", ROOT / "eval" / "protocols" / "gres.yaml", tmp_path / "results.json")
        both.append(json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["results"]["strict"])
    assert both[0]["gres"]["gIoU"] == both[1]["gres"]["gIoU"] == 1
    assert both[0]["gres"]["N_acc"] == both[1]["gres"]["N_acc"] == 1


def test_label_studio_round_trip(answered: tuple[Path, Path], tmp_path: Path) -> None:
    data, file = answered
    assert main(["convert", "label_studio", str(file), str(data), "--out", str(tmp_path / "tasks.json")]) == 0
    tasks = json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))
    assert [len(task["predictions"][0]["result"]) for task in tasks] == [1, 2, 0]
    assert tasks[2]["predictions"][0]["score"] == 0.9
    assert 'toName="image"' in (tmp_path / "tasks.xml").read_text(encoding="utf-8")
    (tmp_path / "export.json").write_text(json.dumps(submitted(tasks)), encoding="utf-8")
    words = ["convert", "from_label_studio", str(tmp_path / "export.json"), str(data), "--out", str(tmp_path / "corrected")]
    assert main(words) == 0
    assert check_mixture([tmp_path / "corrected"]) == []
    dataset = load_dataset(tmp_path / "corrected")
    assert [len(record.targets) for record in dataset.expressions] == [1, 2, 0]
    np.testing.assert_array_equal(union(tmp_path / "corrected", "e1"), rectangle_mask(2, 3, 12, 13))
    np.testing.assert_array_equal(union(tmp_path / "corrected", "e2"), TWO)
    assert dataset.expressions[0].targets[0] in dataset.expressions[1].targets  # the same pixels: the same object
    assert dataset.expressions[0].split == "train" and dataset.expressions[0].source == "label_studio"


def test_people_correct(answered: tuple[Path, Path], tmp_path: Path) -> None:
    """A polygon, a rectangle, a removed region, a skipped task, and the last of two annotations."""
    data, file = answered
    write_tasks(str(file), str(data), str(tmp_path / "tasks.json"))
    done = submitted(json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8")))
    size = {"original_width": WIDTH, "original_height": HEIGHT}
    corners = [[50, 50], [75, 50], [75, 100], [50, 100]]
    outline = {"type": "polygonlabels", **size, "value": {"points": corners, "polygonlabels": ["target"]}}
    box = {"type": "rectanglelabels", **size, "value": {"x": 10, "y": 20, "width": 30, "height": 40, "rotation": 0}}
    done[0]["annotations"].append({"result": [outline, box], "was_cancelled": False})
    done[1]["annotations"][0]["result"].pop()
    done[2]["annotations"][0]["was_cancelled"] = True
    (tmp_path / "export.json").write_text(json.dumps(done), encoding="utf-8")
    lines = read_annotations(str(tmp_path / "export.json"), str(data), str(tmp_path / "out"))
    assert "1 tasks without a submitted annotation left out" in lines[0]
    dataset = load_dataset(tmp_path / "out")
    first, second = dataset.expressions
    boxes = {i.annotation_id: i.box_xyxy for i in dataset.images["1"].instances}
    assert [boxes[name] for name in first.targets] == [[20, 15, 30, 30], [4, 6, 16, 18]]
    assert len(second.targets) == 1
    assert check_mixture([tmp_path / "out"]) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["data"].update(expression_id="e9"), "e9"),
        (lambda t: t["annotations"][0]["result"][0].update(type="ellipselabels"), "ellipselabels"),
        (lambda t: t["annotations"][0]["result"][0].update(original_width=41), "30x41"),
        (lambda t: t["annotations"][0]["result"][0]["value"].update(rle=[1, 2]), "cut off"),
        (lambda t: t["annotations"][0]["result"][0]["value"].update(rle=encode_brush(np.zeros((HEIGHT, WIDTH), bool))), "without a pixel"),
        (lambda t: t["annotations"][0].update(result="x"), "regions"),
        (lambda t: t["annotations"][0]["result"][0].update(type="rectanglelabels", value={"x": float("nan")}), "percent"),
        (lambda t: t["annotations"][0]["result"][0].update(type="polygonlabels", value={"points": [[1, 2]]}), "three points"),
    ],
)
def test_wrong_annotations_are_refused(answered: tuple[Path, Path], tmp_path: Path, change: Any, said: str) -> None:
    data, file = answered
    write_tasks(str(file), str(data), str(tmp_path / "tasks.json"))
    done = submitted(json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8")))
    change(done[0])
    (tmp_path / "export.json").write_text(json.dumps(done), encoding="utf-8")
    with pytest.raises(GrexError, match=said):
        read_annotations(str(tmp_path / "export.json"), str(data), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "{}", "[1]", "[" * 100_000])
def test_files_that_are_no_export(answered: tuple[Path, Path], tmp_path: Path, text: str) -> None:
    (tmp_path / "export.json").write_text(text, encoding="utf-8")
    with pytest.raises(GrexError, match="Label Studio"):
        read_annotations(str(tmp_path / "export.json"), str(answered[0]), str(tmp_path / "out"))


def test_predictions_of_another_dataset(answered: tuple[Path, Path], tmp_path: Path) -> None:
    file = predictions(tmp_path, [{"expression_id": "other", "mask_rle": None}])
    with pytest.raises(GrexError, match="without an expression"):
        write_tasks(str(file), str(answered[0]), str(tmp_path / "tasks.json"))


def grounding(no_target: bool = False) -> Grounding:
    boxes, scores = np.array([] if no_target else BOXES, np.float32).reshape(-1, 4), np.array([] if no_target else [0.9, 0.7], np.float32)
    return Grounding("both", TWO & (not no_target), None, boxes, scores, 0 if no_target else 2, no_target, 0.9 if no_target else 0.1)


def test_supervision() -> None:
    fields = detections_fields([grounding(), grounding(no_target=True), grounding()])
    assert fields["xyxy"].tolist() == BOXES * 2 and fields["class_id"].tolist() == [0, 0, 2, 2]
    assert fields["mask"].shape == (4, HEIGHT, WIDTH) and fields["confidence"].shape == (4,)
    assert detections_fields([grounding(no_target=True)])["xyxy"].shape == (0, 4)
    package = pytest.importorskip("supervision", reason="supervision is not installed: only the fields that it takes were tested")
    found = to_supervision([grounding(), grounding(no_target=True), grounding()])
    assert isinstance(found, package.Detections) and len(found) == 4
    assert found.xyxy.tolist() == BOXES * 2 and np.allclose(found.confidence, [0.9, 0.7] * 2)
    second = found[found.class_id == 2]
    assert second.data["expression"].tolist() == ["both"] * 2 and (np.any(second.mask, axis=0) == TWO).all()
    drawn = package.MaskAnnotator().annotate(np.zeros((HEIGHT, WIDTH, 3), np.uint8), found)
    assert (drawn.any(axis=2) == TWO).all()
    assert to_supervision([grounding(no_target=True)]).is_empty() and to_supervision([]).is_empty()


def test_fiftyone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fields, and the calls with a stand-in of the package."""
    first, second = fiftyone_fields(grounding())
    assert first["bounding_box"] == pytest.approx([2 / WIDTH, 3 / HEIGHT, 10 / WIDTH, 10 / HEIGHT])
    assert second["mask"].shape == (10, 10) and second["mask"].all() and second["label"] == "both"
    assert fiftyone_fields(grounding(no_target=True)) == []
    stand_in = types.ModuleType("fiftyone")
    stand_in.Sample = lambda filepath: {"filepath": filepath}  # type: ignore[attr-defined]
    stand_in.Detection = dict  # type: ignore[attr-defined]
    stand_in.Detections = lambda detections: detections  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fiftyone", stand_in)
    assert len(to_fiftyone("a.png", [grounding()])["grounding"]) == 2


def test_fiftyone_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIFTYONE_DO_NOT_TRACK", "true")
    package = pytest.importorskip("fiftyone", reason="fiftyone is not installed: the calls were tested with a stand-in of it")
    sample = to_fiftyone(str(tmp_path / "a.png"), [grounding(), grounding(no_target=True)])
    assert isinstance(sample, package.Sample)
    first, second = sample["grounding"].detections
    assert first.bounding_box == pytest.approx([2 / WIDTH, 3 / HEIGHT, 10 / WIDTH, 10 / HEIGHT]) and first.label == "both"
    assert second.mask.shape == (10, 10) and second.mask.all() and second.confidence == pytest.approx(0.7)


@pytest.mark.parametrize("name", ["supervision", "fiftyone"])
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(GrexError, match=f"pip install {name}"):
        to_supervision([]) if name == "supervision" else to_fiftyone("a.png", [])


def test_results_show_themselves_in_notebooks() -> None:
    shown = Image.open(io.BytesIO(grounding()._repr_png_()))
    assert shown.width >= WIDTH and len(set(shown.convert("RGB").getdata())) > 1
    again = grounding()
    again.image = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    assert Image.open(io.BytesIO(again._repr_png_())).size == shown.size
    assert again._repr_png_() != grounding()._repr_png_()
    assert grounding(no_target=True)._repr_png_()[:4] == b"\x89PNG"
