"""A model that knows the truth, behind a real server: what it says in a family's own format scores exactly what the same answers score when
they are written directly as predictions. So nothing between request and score loses anything."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_server import FakeServer, Reply, completion, last_text
from PIL import Image
from score_case import PROTOCOLS, read_lines, write_lines
from test_segmenters import write_sam

from grex_mllm.cli import main
from grex_mllm.data.records import Dataset, load_dataset
from grex_mllm.ops.frames import boxes_from_pixels, boxes_to_pixels, points_from_pixels, points_to_pixels
from grex_mllm.ops.masks import encode_rle, mask_to_box_xyxy, segmentation_to_mask
from grex_mllm.score import score
from grex_mllm.types import Instance
from grex_mllm.zeroshot.base import Picture, View
from grex_mllm.zeroshot.families import FAMILIES, Family, find_family
from grex_mllm.zeroshot.parsing import Parsed
from grex_mllm.zeroshot.parsing.pictures import MaskPicture
from grex_mllm.zeroshot.segmenters import open_segmenter

SIZES = ((640, 480), (333, 500), (900, 301), (97, 120))
POINTS = ("molmo", "molmo2")
NAME = re.compile(r"thing (\d)-(\d)")


def objects(width: int, height: int, image: int) -> list[dict[str, Any]]:
    """Three objects that lie apart, each a square-edged L of two thirds of its box, at places of no grid."""
    rng, found = np.random.default_rng(image), []
    for n in range(3):
        x1 = width * (0.04 + n / 3) + rng.uniform(0, 0.05 * width)
        y1 = height * rng.uniform(0.05, 0.4)
        x2, y2 = x1 + width * rng.uniform(0.15, 0.22), y1 + height * rng.uniform(0.3, 0.5)
        middle = [(x1 + x2) / 2, (y1 + y2) / 2]
        outline = [x1, y1, middle[0], y1, middle[0], middle[1], x2, middle[1], x2, y2, x1, y2]
        found.append({"annotation_id": f"{image}.{n}", "category": "thing", "box_xyxy": [x1, y1, x2, y2], "segmentation": [outline]})
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset: four sizes, expressions with 0 to 3 targets; a tiny SAM; references written as predictions, for the oracle of texts."""
    root = tmp_path_factory.mktemp("perfect")
    (root / "d").mkdir()
    images, expressions = [], []
    for i, (width, height) in enumerate(SIZES):
        noise = np.random.default_rng(i).integers(60, 190, (height, width, 3), dtype=np.uint8)
        noise[0, 0] = i  # by which the model recognises the picture, whatever is drawn on it
        Image.fromarray(noise).save(root / "d" / f"{i}.png")
        found = [instance | {"iscrowd": False} for instance in objects(width, height, i)]
        images.append({"image_id": f"{i}", "file": f"{i}.png", "height": height, "width": width, "instances": found})
        for k in range(4):
            line = {
                "expression_id": f"{i}-{k}",
                "ref_id": f"{i}{k}",
                "image_id": f"{i}",
                "expression": f"thing {i}-{k}",
                "raw": f"thing {i}-{k}",
            }
            expressions.append(line | {"targets": [f"{i}.{n}" for n in range(k)], "split": "val", "source": "made", "tags": []})
    write_lines(root / "d" / "images.jsonl", images)
    write_lines(root / "d" / "expressions.jsonl", expressions)
    (root / "d" / "dataset.json").write_text(json.dumps({"name": "made", "image_root": ".", "counts": {}}))
    write_sam(root / "sam")
    return root


def targets(data: Dataset, image: int, number: int) -> list[Instance]:
    return data.images[f"{image}"].instances[:number]


def inside(instance: Instance) -> np.ndarray:
    """A point within the L, near its corner."""
    x1, y1, x2, y2 = instance.box_xyxy
    return np.array([x1 + 0.2 * (x2 - x1), y1 + 0.7 * (y2 - y1)])


def outline(instance: Instance) -> np.ndarray:
    return np.asarray(instance.segmentation[0], float).reshape(-1, 2)


def drawn(instance: Instance, view: View) -> np.ndarray:
    return segmentation_to_mask(instance.segmentation, view.height, view.width)


def says(data: Dataset, family: Family, kind: str) -> Any:
    """Return the script of a server whose model knows everything. kind: boxes, points, polygons or masks."""
    originals = [np.asarray(Image.open(data.image_root / f"{i}.png")) for i in range(len(SIZES))]

    def script(body: dict[str, Any]) -> Reply:
        asked = NAME.search(last_text(body))
        if asked is None:
            return completion(described(body, originals))
        image, number = int(asked[1]), int(asked[2])
        view, found = family.view(*SIZES[image]), targets(data, image, number)
        if not found:
            return completion(family.write_nothing())
        if kind == "points":
            assert family.write_points is not None
            return completion(family.write_points(np.stack([inside(i) for i in found]), view, "it"))
        if kind == "masks":
            assert family.write_masks is not None
            return completion(family.write_masks([drawn(i, view) for i in found], "it"))
        if kind == "polygons":
            assert family.write_polygons is not None
            return completion(family.write_polygons([outline(i) for i in found], view, "it"))
        return completion(family.write(np.array([i.box_xyxy for i in found]), view, "it"))

    return script


def described(body: dict[str, Any], originals: list[np.ndarray]) -> str:
    """Return the reference of the set that is marked: the objects around which the picture is not as it was."""
    url = next(part["image_url"]["url"] for part in body["messages"][-1]["content"] if part["type"] == "image_url")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
    image = int(pixels[0, 0, 0])
    changed = (pixels != originals[image]).any(axis=2)
    width, height = SIZES[image]
    marked = [bool(changed[int(o["box_xyxy"][1]) : int(o["box_xyxy"][3]), int(o["box_xyxy"][0]) - 2 : int(o["box_xyxy"][0]) + 2].any())
              for o in objects(width, height, image)]  # fmt: skip
    assert marked == sorted(marked, reverse=True)
    return f'"Thing {image}-{sum(marked)}."'


def filled(boxes: np.ndarray, view: View) -> np.ndarray:
    """The pixels whose centre lies in one of the boxes."""
    x, y = np.arange(view.width) + 0.5, np.arange(view.height)[:, None] + 0.5
    mask = np.zeros((view.height, view.width), bool)
    for x1, y1, x2, y2 in boxes:
        mask |= (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
    return mask


def directly(data: Dataset, family: Family, kind: str, sam: Path) -> Iterator[dict[str, Any]]:
    """Yield the prediction lines of the true answers, quantised as the family writes them."""
    for record in data.expressions_of("val"):
        image = int(record.image_id)
        view, found = family.view(*SIZES[image]), targets(data, image, len(record.targets))
        ends = np.array([view.width, view.height] * 2, float)
        boxes = np.zeros((0, 4))
        mask = np.zeros((view.height, view.width), bool)
        if found and kind == "boxes":
            numbers = boxes_from_pixels(np.array([i.box_xyxy for i in found]), family.frame, view)
            boxes = np.clip(boxes_to_pixels(numbers, family.frame, view), 0, ends)
            mask = filled(boxes, view)
        if found and kind == "points":
            points = points_to_pixels(points_from_pixels(np.stack([inside(i) for i in found]), family.frame, view), family.frame, view)
            segmenter = open_segmenter(f"sam:{sam}", "cpu")
            assert segmenter is not None
            pixels = np.asarray(Image.open(data.image_root / f"{image}.png"))
            mask, boxes, _ = segmenter.segment(Picture(pixels), Parsed("ok", points=points))
        if found and kind == "polygons":
            numbers_of = [points_from_pixels(outline(i), family.frame, view) for i in found]
            polygons = [np.clip(points_to_pixels(numbers, family.frame, view), 0, ends[:2]) for numbers in numbers_of]
            boxes = np.array([[*p.min(axis=0), *p.max(axis=0)] for p in polygons])
            mask = segmentation_to_mask([p.reshape(-1).tolist() for p in polygons], view.height, view.width)
        for mine in (drawn(i, view) for i in found) if kind == "masks" else ():
            x1, y1, x2, y2 = (int(edge) for edge in mask_to_box_xyxy(mine))
            numbers = boxes_from_pixels(np.array([[x1, y1, x2, y2]], float), family.frame, view)
            box = boxes_to_pixels(numbers, family.frame, view)
            boxes = np.concatenate([boxes, box])
            mask |= MaskPicture(box[0], np.where(mine[y1:y2, x1:x2], 255, 0).astype(np.uint8)).placed(view.height, view.width)
        line = {"expression_id": record.expression_id, "mask_rle": encode_rle(mask), "boxes_xyxy": np.round(boxes, 3).tolist()}
        line |= {"box_scores": [1.0] * len(boxes), "count": len(found), "no_target": not found, "no_target_prob": float(not found)}
        yield line


WAYS = [(name, "points" if name in POINTS else "boxes") for name in FAMILIES]
WAYS += [(name, "points") for name in ("qwen2.5-vl", "qwen3-vl", "gemini")] + [(n, "polygons") for n in ("florence2", "gpt", "qwen2.5-vl")]
WAYS += [("gemini", "masks")]


@pytest.mark.parametrize(("name", "kind"), WAYS)
def test_a_perfect_model_scores_what_its_answers_score(place: Path, tmp_path: Path, name: str, kind: str) -> None:
    data, family = load_dataset(place / "d"), find_family(name)
    flags = [f"--ask.family={name}", f"--ask.task={'grec' if kind == 'boxes' else 'gres'}"]
    if kind == "points":
        flags += [f"--ask.masks=sam:{place / 'sam'}", "--ask.mask_device=cpu"]
    if kind == "polygons":
        flags += ["--ask.masks=polygon"]
    if kind == "masks":
        flags += ["--ask.masks=mask", "--ask.prompt=native_gemini_masks"]
    elif kind == "boxes" or name in (*POINTS, "florence2"):
        flags += [] if kind != "points" else ["--ask.prompt=uniform_points"]
    else:
        flags += [f"--ask.prompt=uniform_{kind}"]
    words = ["predict", "--model", "openai:perfect", "--data", f"{place / 'd'}", "--split", "val", "--out", f"{tmp_path / 'x.jsonl'}"]
    with FakeServer(says(data, family, kind)) as server:
        assert main([*words, "--base-url", server.url, *flags, "--ask.describe=uniform"]) == 0
        assert len(server.seen) == 16 + 12
    own = [line for line in read_lines(tmp_path / "x.jsonl") if "expression_id" in line]
    assert [line["status"] for line in own] == ["ok"] * 16, [line.get("reason") for line in own]
    write_lines(tmp_path / "direct.jsonl", list(directly(data, family, kind, place / "sam")))
    texts = [line for line in read_lines(tmp_path / "x.jsonl") if "expression_id" not in line]
    assert [line["expression"] for line in texts] == [f"Thing {i}-{k}" for i in range(4) for k in (1, 2, 3)]
    write_lines(tmp_path / "own.jsonl", own)
    scored = [
        score(tmp_path / f"{which}.jsonl", place / "d", "val", PROTOCOLS / "all.yaml", allow_missing=True)["results"]["strict"]
        for which in ("own", "direct")
    ]
    assert scored[0] == scored[1]
    assert scored[0]["count"]["accuracy"] == 1 and scored[0]["gres"]["N_acc"] == 1
    if kind != "points":
        assert scored[0]["grec"]["Pr@F1"] == 1
