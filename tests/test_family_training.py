"""Joint training with a language model of each real family: thirty steps learn eight object sets, which the saved model describes again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_generator import TEXTS
from tiny import tiny_config
from tiny_folder import expression, instance, write_folder
from tiny_llms import FAMILIES, write_llm

from grex_mllm import GrexModel
from grex_mllm.models.lm_framing import INSTRUCTION
from grex_mllm.ops.masks import encode_rle
from grex_mllm.training.run import train_from_config

SIZE = (48, 64)
BOXES = {"1": [[2, 3, 20, 18], [36, 5, 60, 20], [8, 26, 30, 44]],
         "2": [[2, 4, 12, 20], [16, 8, 30, 24], [40, 26, 62, 46], [44, 2, 56, 14], [4, 30, 24, 46]],
         "3": [[3, 24, 28, 46], [34, 4, 52, 40]]}  # fmt: skip
SETS = {"1": [[0], [1, 2]], "2": [[4, 0, 2], [3], [0, 1, 2, 3, 4], [1, 2]], "3": [[0, 1], [1]]}
QUICK = ("qwen3", "none")  # in every run; the others are long
CASES = [*((name, "none") for name in FAMILIES), *((name, base) for name in ("qwen3", "gemma2") for base in ("nf4", "int8"))]


def masks_of(number: str) -> list[np.ndarray]:
    masks = [np.zeros(SIZE, bool) for _ in BOXES[number]]
    for mask, (x1, y1, x2, y2) in zip(masks, BOXES[number], strict=True):
        mask[y1:y2, x1:x2] = True
    return masks


def eight_sets(folder: Path) -> Path:
    """Write three images with eight objects, each of a colour of its own, and eight expressions for as many sets of them."""
    draw, texts = np.random.default_rng(0), iter(TEXTS)
    images, records = [], []
    for number, boxes in BOXES.items():
        file, pixels = f"{number}.png", np.full((*SIZE, 3), 128, np.uint8)
        for mask in masks_of(number):
            pixels[mask] = draw.integers(0, 256, 3)
        (folder / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "images" / file)
        masks = masks_of(number)
        known = [instance(f"{number}{n}", list(box), encode_rle(mask)) for n, (box, mask) in enumerate(zip(boxes, masks, strict=True))]
        images.append({"image_id": number, "file": file, "height": SIZE[0], "width": SIZE[1], "instances": known})
        records += [
            expression(f"e{number}{n}", number, next(texts), [f"{number}{k}" for k in chosen]) for n, chosen in enumerate(SETS[number])
        ]
    return write_folder(folder, images, records)


def train(work: Path, name: str, quantisation: str, **changes: Any) -> Path:
    lm = write_llm(name, work / "lm", [*TEXTS, INSTRUCTION] * 2)
    settings: dict[str, Any] = {
        "data.train": eight_sets(work / "data"), "train.out": work / "run", "train.steps": 30, "train.batch_images": 3,
        "train.precision": "fp32", "train.num_threads": 1, "train.save_every": 30, "train.log_every": 1,
        "train.optim.lr": 1e-2, "train.optim.betas": "[0.9, 0.98]", "train.optim.warmup_fraction": 0.1, "train.optim.weight_decay": 0,
        "train.optim.muon": "true", "train.optim.muon_lr": 2e-2, "train.optim.lr_scale": "{grounding: 0.1, generator.region_tokens: 3}",
        "model.generator.lm": lm, "model.generator.quantisation": quantisation, "model.generator.lora_rank": 16,
        "model.generator.lora_alpha": 64 if name.startswith("gemma") else 32, "model.generator.projector_width": 64,
        "model.generator.image_grid": 0, "model.generator.max_new_tokens": 24,
    }  # fmt: skip
    train_from_config(tiny_config(**{key.replace(".", "__"): value for key, value in (settings | changes).items()}))
    return work / "run"


def described(model: GrexModel, data: Path, alone: bool) -> list[str]:
    answers: list[str] = []
    for number, sets in SETS.items():
        image = np.asarray(Image.open(data / "images" / f"{number}.png"))
        asked = [[chosen] for chosen in sets] if alone else [sets]
        answers += [text for part in asked for text in model.describe(image, masks_of(number), object_sets=part)]
    return answers


@pytest.mark.parametrize(
    ("name", "quantisation"), [case if case == QUICK else pytest.param(*case, marks=pytest.mark.long) for case in CASES]
)
def test_thirty_joint_steps_learn_eight_object_sets(name: str, quantisation: str, tmp_path: Path) -> None:
    run = train(tmp_path, name, quantisation)
    model = GrexModel.from_pretrained(run)
    assert described(model, tmp_path / "data", alone=False) == TEXTS
    assert described(model, tmp_path / "data", alone=True) == TEXTS
    model.save_pretrained(tmp_path / "again")
    torch.manual_seed(1)
    assert described(GrexModel.from_pretrained(tmp_path / "again"), tmp_path / "data", alone=False) == TEXTS
