"""A hand-made dataset folder: two photographs-to-be of different shapes, five instances of every kind of segmentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from grex_mllm.ops.masks import encode_rle

HEIGHT, WIDTH = 30, 40


def gradient(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 [H, W, 3] in which every pixel tells its place."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.arange(width)[None] * 6
    image[..., 1] = np.arange(height)[:, None] * 8
    image[..., 2] = 40
    return image


def rectangle_mask(x1: int, y1: int, x2: int, y2: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[y1:y2, x1:x2] = True
    return mask


def instance(name: str, box: list[float], segmentation: Any, category: str = "dog", iscrowd: bool = False) -> dict[str, Any]:
    return {"annotation_id": name, "category": category, "box_xyxy": box, "segmentation": segmentation, "iscrowd": iscrowd}


def expression(name: str, image_id: str, text: str, targets: list[str], split: str = "train") -> dict[str, Any]:
    return {
        "expression_id": name,
        "ref_id": name,
        "image_id": image_id,
        "expression": text,
        "raw": text.capitalize(),
        "targets": targets,
        "split": split,
        "source": "tiny",
        "tags": [],
    }


def tiny_records() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    first = {
        "image_id": "1",
        "file": "a.png",
        "height": HEIGHT,
        "width": WIDTH,
        "instances": [
            instance("11", [2, 3, 12, 13], [[2, 3, 12, 3, 12, 13, 2, 13]]),
            instance("12", [20, 5, 30, 15], encode_rle(rectangle_mask(20, 5, 30, 15)), "cat"),
            instance("13", [0, 20, 40, 30], encode_rle(rectangle_mask(0, 20, 40, 30)), "dog", iscrowd=True),
        ],
    }
    second = {
        "image_id": "2",
        "file": "b.png",
        "height": WIDTH,
        "width": HEIGHT,
        "instances": [
            instance("21", [5, 5, 15, 25], [[5, 5, 15, 5, 15, 25, 5, 25]], "cat"),
            instance("22", [16, 5, 26, 25], None),
        ],
    }
    expressions = [
        expression("e1", "1", "the dog", ["11"]),
        expression("e2", "1", "the dog and the cat", ["11", "12"]),
        expression("e3", "1", "the bird", []),
        expression("e4", "2", "the cat", ["21"], "val"),
        expression("e5", "2", "the horse", [], "val"),
    ]
    return [first, second], expressions


def write_folder(folder: Path, images: list[dict[str, Any]], expressions: list[dict[str, Any]]) -> Path:
    """Write the three files and the pictures a.png, b.png, without any check."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.fromarray(gradient()).save(folder / "images" / "a.png")
    Image.fromarray(gradient(WIDTH, HEIGHT)).save(folder / "images" / "b.png")
    (folder / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in images), encoding="utf-8")
    (folder / "expressions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in expressions), encoding="utf-8")
    (folder / "dataset.json").write_text(json.dumps({"name": "tiny", "image_root": "images"}), encoding="utf-8")
    return folder


def tiny_folder(folder: Path) -> Path:
    return write_folder(folder, *tiny_records())
