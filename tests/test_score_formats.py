"""Other systems' files give the same numbers as our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from score_case import HEIGHT, PROTOCOLS, ROOT, WIDTH, make_dataset, object_mask, read_lines, right_answers, write_lines

from grex_mllm.errors import GrexError
from grex_mllm.ops.masks import decode_rle, encode_rle
from grex_mllm.score import score
from grex_mllm.score.truth import open_truth


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "data")


def run(path: Path, data: Path, protocol: str = "all", **options: Any) -> dict[str, Any]:
    return score(path, data, "val", PROTOCOLS / f"{protocol}.yaml", **options)


def test_coco_results(data: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for line in right_answers():
        key = line["expression_id"]
        rows += [
            {"image_id": key, "category_id": 1, "bbox": [b[0], b[1], 8.0, 8.0], "score": 0.9, "segmentation": encode_rle(object_mask(n))}
            for n, b in enumerate(line["boxes_xyxy"])
        ] or [{"image_id": key, "score": 0.0}]
    rows[1]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": _runs(object_mask(0))}  # uncompressed
    path = tmp_path / "results_of_a_peer.json"
    path.write_text(json.dumps(rows))
    for protocol, task in (("gres", "gres"), ("grec", "grec")):
        results = run(path, data, protocol)
        assert set(results["results"]["strict"][task].values()) <= {1.0, 20, 0.25}
        assert "COCO results, 20 expressions" in results["provenance"]["notes"][0]
    path.write_text(json.dumps([rows[0] | {"area_of_interest": 1}]))
    with pytest.raises(GrexError, match="area_of_interest"):
        run(path, data, "gres")
    path.write_text('{"images": []}')
    with pytest.raises(GrexError, match="a list of objects"):
        run(path, data, "gres")


def test_folder_of_png_masks(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "masks"
    folder.mkdir()
    for n, line in enumerate(right_answers()):
        mask = decode_rle(line["mask_rle"]).astype(np.uint8) * 255
        name = line["expression_id"] if n % 2 else line["expression_id"].replace(":", "%3A")
        picture = Image.fromarray(mask) if n % 3 else Image.merge("RGB", [Image.fromarray(mask)] * 3)
        picture.save(folder / f"{name}.png")
    strict = run(folder, data, "gres")["results"]["strict"]["gres"]
    assert (strict["gIoU"], strict["N_acc"], strict["T_acc"]) == (1.0, 1.0, 1.0)
    (folder / "made:0-0.png").write_bytes(b"no picture")
    with pytest.raises(GrexError, match="cannot be read"):
        run(folder, data, "gres")
    (folder / "notes.txt").write_text("x")
    with pytest.raises(GrexError, match="1 files that are no PNG"):
        run(folder, data, "gres")


def test_nested_frames_as_video_benchmarks_take_them(data: Path, tmp_path: Path) -> None:
    """Submissions of the video benchmarks: <video>/<expression>/<frame>.png is the expression id, palette pictures included."""
    expressions = read_lines(data / "expressions.jsonl")
    folder = tmp_path / "submission"
    scored = [record for record in expressions if record["split"] == "val"]
    for line, record in zip(right_answers(), scored, strict=True):
        record["expression_id"] = f"video{record['image_id']}/{record['ref_id']}/00000"
        picture = Image.fromarray(decode_rle(line["mask_rle"]).astype(np.uint8), "L").convert("P")
        (folder / record["expression_id"]).parent.mkdir(parents=True)
        picture.save(folder / f"{record['expression_id']}.png")
    write_lines(data / "expressions.jsonl", expressions)
    found = run(folder, data, "rvos")["results"]["strict"]["rvos"]
    assert (found["num_expressions"], found["J&F"]) == (20, 1.0)


def test_relas_own_file_weights_only(data: Path, tmp_path: Path) -> None:
    rows = []
    for line in right_answers():
        image, k = line["expression_id"].split(":")[1].split("-")
        mask = np.kron(decode_rle(line["mask_rle"]), np.ones((2, 3))).astype(np.int8)
        rows.append(
            {"img_id": image, "sent": f"the {k} squares", "source": "grefcoco", "pred_mask": mask, "pred_nt": k == "0", "gt_nt": k == "0"}
        )
    path = tmp_path / "ref_seg_predictions.pth"
    torch.save(rows, path)
    results = run(path, data, "gres")["results"]
    assert results["strict"]["gres"]["gIoU"] == 1.0
    assert results["official"]["gres"]["gIoU"] == 1.0
    torch.save([rows[0] | {"sent": "who"}], path)
    with pytest.raises(GrexError, match="1 predictions match no expression"):
        run(path, data, "gres")
    torch.save(Path, path)
    with pytest.raises(GrexError, match="no plain torch file"):
        run(path, data, "gres")


def test_unknown_kinds(data: Path, tmp_path: Path) -> None:
    for name, words in (("p.csv", "unknown kind"), ("nowhere.jsonl", "do not exist")):
        if name == "p.csv":
            (tmp_path / name).write_text("a,b")
        with pytest.raises(GrexError, match=words):
            run(tmp_path / name, data)


def test_two_files_are_read_as_one(data: Path, tmp_path: Path) -> None:
    lines = right_answers()
    first, second = write_lines(tmp_path / "a.jsonl", lines[:7]), write_lines(tmp_path / "b.jsonl", lines[7:])
    results = score([first, second], data, "val", PROTOCOLS / "all.yaml")
    assert results["results"]["strict"]["gres"]["gIoU"] == 1.0
    assert results["provenance"]["predictions"]["files"] == ["a.jsonl", "b.jsonl"]


def test_polygons_and_crowds_of_the_dataset(data: Path, tmp_path: Path) -> None:
    images = read_lines(data / "images.jsonl")
    polygon = [1.0, 8.0, 9.0, 8.0, 9.0, 16.0, 1.0, 16.0]
    for image in images:
        image["instances"][0]["segmentation"] = [polygon, [1.0, 2.0]]
        image["instances"][1]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": _runs(object_mask(1))}
    write_lines(data / "images.jsonl", images)
    path = write_lines(tmp_path / "p.jsonl", right_answers())
    assert run(path, data, "gres")["results"]["strict"]["gres"]["gIoU"] == 1.0


def _runs(mask: np.ndarray) -> list[int]:
    flat = mask.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    return np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()


def test_ground_truth_at_input_size_equals_the_released_preprocessing(shared: Path, tmp_path: Path) -> None:
    """All 72 recorded masks, 480x480, bit for bit: what the official protocol compares with."""
    source, out = shared / "oracle" / "preprocess", tmp_path / "converted"
    command = [sys.executable, str(ROOT / "data_prep" / "grefcoco.py"), "--refs", str(source / "grefcoco" / "grefs(unc).json")]
    command += ["--instances", str(source / "grefcoco" / "instances.json"), "--images", str(source / "images" / "train2014")]
    done = subprocess.run(
        [*command, "--out", str(out), "--skip-bad"], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    recorded, masks = json.loads((source / "expected.json").read_text()), np.load(source / "expected.npz")
    for split in ("train", "val"):
        truth = open_truth(out, split)
        found: dict[tuple[str, str], list[bytes]] = {}
        for record in truth.expressions():
            mask = truth.mask(record.image_id, record.targets, (480, 480))
            assert mask is not None
            found.setdefault((record.image_id, record.raw), []).append(np.packbits(decode_rle(mask)).tobytes())
        assert len(truth) == len(recorded[split])
        for n, sample in enumerate(recorded[split]):
            assert masks[f"{split}_{n:02d}_mask"].tobytes() in found[str(sample["image_id"]), sample["sentence"]["raw"]]
