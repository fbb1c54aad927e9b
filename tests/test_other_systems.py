"""Files that LISA, GLaMM, Sa2VA and Grounded SAM 2 write give the same numbers as our own lines."""

from __future__ import annotations

import json
import urllib.parse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from score_case import PROTOCOLS, make_dataset, object_mask, right_answers

from grex_mllm.errors import GrexError
from grex_mllm.ops.masks import decode_rle, encode_rle
from grex_mllm.score import score


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "data")


def run(path: Path, data: Path, protocol: str, **options: Any) -> dict[str, Any]:
    results: dict[str, Any] = score(path, data, "val", PROTOCOLS / f"{protocol}.yaml", **options)["results"]["strict"][protocol]
    return results


def name(line: dict[str, Any]) -> str:
    return urllib.parse.quote(line["expression_id"], safe="")


def test_lisas_masks_are_united_and_what_it_did_not_write_is_missing(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vis_output"
    folder.mkdir()
    absent = 0
    for line in right_answers():
        mask = decode_rle(line["mask_rle"])
        if not mask.any():
            absent += 1
            continue
        middle = int(np.median(np.nonzero(mask)[1]))
        parts = mask.copy(), mask.copy()
        parts[0][:, middle:], parts[1][:, :middle] = False, False
        for i, part in enumerate(parts):
            Image.fromarray(part.astype(np.uint8) * 100).save(folder / f"{name(line)}_mask_{i}.jpg", quality=100, subsampling=0)
        Image.new("RGB", mask.shape[::-1]).save(folder / f"{name(line)}_masked_img_0.jpg")
    with pytest.raises(GrexError, match=f"{absent} expressions without a prediction"):
        run(folder, data, "gres")
    found = run(folder, data, "gres", allow_missing=True)
    assert absent and found["N_acc"] == 0.0 and found["T_acc"] == 1.0
    assert found["gIoU"] == pytest.approx(1 - absent / len(right_answers()), abs=0.02)  # JPEG bends edges
    (folder / "notes.txt").write_text("x")
    with pytest.raises(GrexError, match="among LISA's masks"):
        run(folder, data, "gres")


def test_masks_of_glamm_and_sa2va(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gcg"
    folder.mkdir()
    for line in right_answers():
        key = name(line)
        masks = [encode_rle(object_mask(n)) for n in range(len(line["boxes_xyxy"]))]
        value = {"image_id": key, "caption": "a [SEG]", "phrases": ["a"] * len(masks), "pred_masks": masks}
        (folder / f"{key}.json").write_text(json.dumps(value))
    found = run(folder, data, "gres")
    assert (found["gIoU"], found["N_acc"], found["T_acc"]) == (1.0, 1.0, 1.0)
    (folder / f"{key}.json").write_text(json.dumps(value | {"pred_masks": [{"size": [2, 2], "counts": "zz"}]}))
    with pytest.raises(GrexError, match="RLE"):
        run(folder, data, "gres")
    (folder / f"{key}.json").write_text(json.dumps({"masks": []}))
    with pytest.raises(GrexError, match="with masks; expected"):
        run(folder, data, "gres")


def test_detections_of_grounded_sam_2(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    folder.mkdir()
    for line in right_answers():
        rows = [
            {"class_name": "square", "bbox": box, "segmentation": encode_rle(object_mask(n)), "score": [0.97] if n else 0.97}
            for n, box in enumerate(line["boxes_xyxy"])
        ]
        value = {"image_path": "x.jpg", "annotations": rows, "box_format": "xyxy", "img_width": 1, "img_height": 1}
        (folder / f"{name(line)}.json").write_text(json.dumps(value))
    assert run(folder, data, "gres")["gIoU"] == 1.0
    assert run(folder, data, "grec")["N_acc"] == 1.0
    for change, words in (({"box_format": "xywh"}, "box_format"), ({"annotations": [{"bbox": [1, 2, 3]}]}, "bbox .x1")):
        (folder / f"{name(line)}.json").write_text(json.dumps(value | change))
        with pytest.raises(GrexError, match=words):
            run(folder, data, "gres")
