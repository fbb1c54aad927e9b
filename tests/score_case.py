"""A small dataset folder with predictions of known quality, for the tests of scoring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from grex_mllm.ops.masks import encode_rle

HEIGHT, WIDTH = 24, 32
NUM_IMAGES = 6
ROOT = Path(__file__).resolve().parent.parent
PROTOCOLS = ROOT / "eval" / "protocols"


def object_mask(n: int) -> np.ndarray:
    """Three squares of 8x8 pixels that do not touch."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[8:16, 1 + 10 * n : 9 + 10 * n] = True
    return mask


def object_box(n: int) -> list[float]:
    return [1.0 + 10 * n, 8.0, 9.0 + 10 * n, 16.0]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_dataset(folder: Path) -> Path:
    """Six images with three objects; for each, expressions with 0, 1, 2 and 3 targets; the last image is split "train"."""
    folder.mkdir(parents=True, exist_ok=True)
    images, expressions = [], []
    for i in range(NUM_IMAGES):
        Image.new("RGB", (WIDTH, HEIGHT), (40 * i, 90, 90)).save(folder / f"{i}.png")
        instances = [
            {"annotation_id": f"{i}.{n}", "category": "square", "box_xyxy": object_box(n), "iscrowd": False}
            | {"segmentation": encode_rle(object_mask(n))}
            for n in range(3)
        ]
        images.append({"image_id": str(i), "file": f"{i}.png", "height": HEIGHT, "width": WIDTH, "instances": instances})
        for k in range(4):
            expressions.append(
                {"expression_id": f"made:{i}-{k}", "ref_id": f"{i}{k}", "image_id": str(i), "expression": f"the {k} squares", "raw": "x"}
                | {"targets": [f"{i}.{n}" for n in range(k)], "split": "val" if i < NUM_IMAGES - 1 else "train"}
                | {"source": "refcoco" if i == 0 else "made", "tags": ["counting"] if k > 1 else ["attribute"]}
            )
    write_lines(folder / "images.jsonl", images)
    write_lines(folder / "expressions.jsonl", expressions)
    (folder / "dataset.json").write_text(json.dumps({"name": "made", "image_root": ".", "counts": {}}))
    return folder


def answer(i: int, k: int, objects: list[int] | None = None) -> dict[str, Any]:
    """The line of expression i-k that gives some objects (default: the right ones)."""
    chosen = list(range(k)) if objects is None else objects
    mask = np.zeros((HEIGHT, WIDTH), bool)
    for n in chosen:
        mask |= object_mask(n)
    return {
        "expression_id": f"made:{i}-{k}",
        "mask_rle": encode_rle(mask),
        "mask_rle_input": encode_rle(mask),
        "boxes_xyxy": [object_box(n) for n in chosen],
        "box_scores": [0.9] * len(chosen),
        "count": len(chosen),
        "no_target_prob": 0.9 if not chosen else 0.2,
        "no_target": not chosen,
        "status": "ok",
    }


def right_answers() -> list[dict[str, Any]]:
    return [answer(i, k) for i in range(NUM_IMAGES - 1) for k in range(4)]


def generation(i: int, k: int, text: str, judgement: str | None = None) -> dict[str, Any]:
    line = {"image_id": str(i), "targets": [f"{i}.{n}" for n in range(k)], "expression": text, "status": "ok"}
    return line if judgement is None else line | {"judgement": judgement}
