"""A made-up run folder with everything that a report reads: realistic numbers, imperfect answers, one torn log line."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from grex_mllm.ops.masks import encode_rle, mask_to_box_xyxy
from grex_mllm.types import ExpressionRecord, ImageRecord, Instance, Sample

SIDE = 96
COLOURS = {"red": (205, 50, 45), "blue": (50, 90, 200), "green": (60, 150, 70), "yellow": (225, 200, 60)}
CONFUSION = [[9 * (wanted == said) + (wanted + said) % 3 for said in range(7)] + [0] for wanted in range(7)]
WITHOUT_JAVA = {"not_computed": {"METEOR": "no Java runtime found; install default-jre-headless"}}


def make_sample(index: int) -> Sample:
    """Draw squares and discs; the first expression means one colour, the second nothing, the third everything."""
    dice = random.Random(index)
    noise = np.random.default_rng(index).integers(-12, 13, (SIDE, SIDE, 3))
    image = (np.array([150, 150, 145]) + noise).clip(0, 255).astype(np.uint8)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    instances = []
    for number, (x, y) in enumerate(dice.sample([(20, 22), (70, 24), (24, 70), (72, 72), (47, 47)], dice.randint(2, 5))):
        colour, radius, disc = dice.choice(list(COLOURS)), dice.randint(8, 15), dice.random() < 0.5
        inside = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2 if disc else (abs(rows - y) <= radius) & (abs(columns - x) <= radius)
        image[inside] = COLOURS[colour]
        instances.append(Instance(f"{index}-{number}", f"{colour} {'disc' if disc else 'square'}", mask_to_box_xyxy(inside), mask=inside))
    first = instances[0].category.split()[0]
    absent = next((name for name in COLOURS if not any(name in i.category for i in instances)), "violet")
    same = [instance.annotation_id for instance in instances if instance.category.startswith(first)]
    everything = [instance.annotation_id for instance in instances]
    asked = [(f"all {first} shapes", same, "attribute"), (f"the {absent} shapes", [], "negation"), ("everything", everything, "category")]
    records = [
        ExpressionRecord(
            f"made:{index}:{n}", f"{index}:{n}", str(index), text, text, targets, "test", "made", [tag, f"targets_{len(targets)}"]
        )
        for n, (text, targets, tag) in enumerate(asked)
    ]
    return Sample(image, ImageRecord(str(index), "", SIDE, SIDE, instances), records)


def answer_line(sample: Sample, targets: list[str], skill: float, dice: random.Random) -> dict[str, Any]:
    """Answer rightly with probability `skill`, else with something else; masks are never perfect."""
    known = {instance.annotation_id: instance for instance in sample.record.instances}
    said = targets if dice.random() < skill else dice.sample(list(known), dice.randint(0, min(2, len(known))))
    mask = np.zeros((SIDE, SIDE), bool)
    for target in said:
        shifted = known[target].mask
        assert shifted is not None
        mask |= np.roll(shifted, dice.randint(0, 2), axis=1)
    minimap = np.zeros((6, 6))
    for target in said:
        x1, y1, x2, y2 = known[target].box_xyxy
        minimap[int((y1 + y2) / 2 * 6 / SIDE), int((x1 + x2) / 2 * 6 / SIDE)] = dice.uniform(0.6, 1)
    return {
        "mask_rle": encode_rle(mask),
        "boxes_xyxy": [known[target].box_xyxy for target in said],
        "box_scores": [round(dice.uniform(0.7, 1), 3) for _ in said],
        "count": len(said),
        "no_target_prob": round(dice.uniform(0.0, 0.4) if said else dice.uniform(0.6, 1), 3),
        "no_target": not said,
        "minimap": minimap.round(2).tolist(),
        "status": "ok",
    }


def write_predictions(folder: Path, num_images: int, skill: float) -> None:
    dice = random.Random(7)
    lines = []
    for index in range(num_images):
        sample = make_sample(index)
        for record in sample.expressions:
            lines.append(
                {"expression_id": record.expression_id, "image_id": str(index), **answer_line(sample, record.targets, skill, dice)}
            )
        targets = sorted(sample.expressions[0].targets)
        text = sample.expressions[0].expression

        def said(right: bool, targets: list[str] = targets, text: str = text, sample: Sample = sample) -> dict[str, Any]:
            back = answer_line(sample, targets, 1.0 if right else 0.0, dice)
            return {
                "expression": text if right else "the two small discs on the left",
                "status": "ok",
                "judgement": "exact" if right else "wrong",
                "round_trip": {key: back[key] for key in ("mask_rle", "boxes_xyxy", "box_scores", "no_target")},
            }

        better = {"score": 0.9, **said(dice.random() < 0.9)}
        lines.append({"image_id": str(index), "targets": targets, **said(dice.random() < 0.7), "listener": better, "candidates": [text]})
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_log(folder: Path, num_lines: int) -> None:
    dice = random.Random(3)
    terms = {"ground": ["total", "mask", "dice", "box_l1", "box_giou", "no_target", "count", "minimap"], "generate": ["total", "lm"]}
    with (folder / "log.jsonl").open("w", encoding="utf-8") as file:
        for line in range(1, num_lines + 1):
            fall = 0.15 + math.exp(-4 * line / num_lines)
            row: dict[str, Any] = {"step": 20 * line, "task": "generate+ground"}
            for task, names in terms.items():
                row |= {f"loss/{task}/{name}": (place + 1) * 0.7 * fall * dice.uniform(0.8, 1.25) for place, name in enumerate(names)}
            row |= {"grad_norm": dice.uniform(1, 3), "expressions_per_s": dice.uniform(480, 560), "images_per_s": dice.uniform(40, 47)}
            row |= {"peak_memory_bytes": 10**9 + line * 10**6, "lr/0": 1.5e-3 * math.cos(1.5 * line / num_lines), "elapsed_s": 2.0 * line}
            file.write(json.dumps(row) + "\n")
        file.write('{"step": 999999, "loss/gro')  # killed while writing


def block(skill: float, num: int = 1500) -> dict[str, Any]:
    text = {
        "METEOR": None,
        "CIDEr": 1.9 * skill,
        "BLEU-4": 0.5 * skill,
        "ROUGE-L": 0.7 * skill,
        "round_trip_gIoU": 0.85 * skill,
        "correct": skill,
    }
    return {
        "gres": {
            "num_samples": num,
            "no_target_share": 0.226,
            "gIoU": 0.85 * skill,
            "cIoU": 0.83 * skill,
            "N_acc": skill,
            "T_acc": 0.99 * skill,
        },
        "grec": {"num_samples": num, "Pr@F1": 0.9 * skill, "mean_F1": 0.95 * skill, "N_acc": skill, "T_acc": 0.99 * skill},
        "count": {"num_samples": num, "accuracy": 0.93 * skill, "mae": 0.3 / skill, "confusion": CONFUSION},
        "greg": {
            "single": text,
            "multi": text,
            "all": text | WITHOUT_JAVA,
            "listener": {"all": text | {"correct": 0.97}},
            "statuses": {"ok": num},
        },
    }


def write_results(folder: Path) -> None:
    tags = ["category", "attribute", "ordinal", "relation", "exclusion", "compound", "negation"]
    results = {
        "provenance": {
            "protocol": {"name": "all", "version": 3},
            "dataset": {"name": "synthetic", "split": "test"},
            "commit": "0123abc",
            "notes": ["a note of the scorer"],
        },
        "results": {"strict": block(0.95), "official": {"gres": block(0.93)["gres"], "grec": block(0.93)["grec"]}},
        "by_num_targets": {name: {"strict": block(0.98 - 0.05 * n, 300)} for n, name in enumerate(["0", "1", "2", "3+"])},
        "by_tag": {tag: {"strict": block(0.97 - 0.07 * n, 200)} for n, tag in enumerate(tags)},
        "baselines": {
            "always_empty": {
                "strict": {"gres": {"num_samples": 1500, "gIoU": 0.226, "N_acc": 1.0, "T_acc": 0.0}, "grec": {"Pr@F1": 0.226}}
            },
            "oracle": {"strict": block(1.0)},
        },
    }
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")


def make_run(folder: Path, num_images: int = 12, num_lines: int = 40, skill: float = 0.8) -> Path:
    """Write a complete run folder; also of use to look at the page by eye."""
    folder.mkdir(parents=True, exist_ok=True)
    model = "model:\n  vision: {name: resnet, depths: [1, 1, 1, 1]}\n  decoder: {name: instance_selection, width: 128}\n"
    (folder / "config.yaml").write_text(model + "train: {steps: 800, seed: 0}\n", encoding="utf-8")
    write_log(folder, num_lines)
    write_results(folder)
    write_predictions(folder, num_images, skill)
    return folder


def index_sample(image_id: str) -> Sample:
    """Return the sample of an image id of the made-up run."""
    return make_sample(int(image_id))
