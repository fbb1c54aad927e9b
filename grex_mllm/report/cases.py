"""Choose the cases that the page shows: random ones and the worst, by the strict protocol's own numbers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grex_mllm.errors import GrexError
from grex_mllm.metrics import detection, language, segmentation
from grex_mllm.metrics.truth import Truth, target_mask
from grex_mllm.ops.masks import decode_rle, segmentation_to_mask
from grex_mllm.report.run_files import GenerationKey, RunFiles
from grex_mllm.types import ExpressionRecord, ImageRecord, Instance, Sample

GetSample = Callable[[str], Sample]


@dataclass
class GroundingCase:
    """One answered expression. iou: strict protocol; None in box-only data. f1: of the boxes; None where there are none to compare."""

    image_id: str
    expression_id: str
    iou: float | None
    f1: float | None
    confidence: float
    tags: list[str]

    @property
    def score(self) -> float:
        return self.iou if self.iou is not None else self.f1 or 0.0


@dataclass
class GenerationCase:
    """One described object set. iou: round trip of the final answer; right: it means exactly this set; None where nobody can tell."""

    image_id: str
    key: GenerationKey
    iou: float | None
    right: bool | None

    @property
    def score(self) -> float:
        return (0.0 if self.right is False else 1.0) + (self.iou if self.iou is not None else 0.0)

    @property
    def tags(self) -> list[str]:
        return [f"{len(self.key[1])} object{'s' if len(self.key[1]) > 1 else ''}"]


@dataclass
class Scan:
    """What looking through the predictions found."""

    grounding: list[GroundingCase] = field(default_factory=list)
    generation: list[GenerationCase] = field(default_factory=list)
    num_images: int = 0
    num_images_all: int = 0
    notes: list[str] = field(default_factory=list)


def scan(run: RunFiles, get_sample: GetSample, image_ids: Iterable[str], max_images: int, seed: int) -> Scan:
    """Score every prediction of at most `max_images` images, drawn with `seed`; keeps numbers only, so that memory stays small."""
    ids = list(dict.fromkeys(str(image_id) for image_id in image_ids))
    chosen = ids if len(ids) <= max_images else random.Random(seed).sample(ids, max_images)
    by_image: dict[str, list[GenerationKey]] = {}
    for key in run.generation:
        by_image.setdefault(key[0], []).append(key)
    found = Scan(num_images_all=len(ids))
    faults: Counter[str] = Counter()
    for image_id in chosen:
        try:
            sample = get_sample(image_id)
            for record in sample.expressions:
                if record.expression_id in run.grounding:
                    found.grounding.append(judge_grounding(sample, record, run.grounding[record.expression_id]))
            for key in by_image.get(image_id, []):
                found.generation.append(judge_generation(sample, key, run.generation[key]))
            found.num_images += 1
        except (GrexError, KeyError) as error:
            faults[f"{type(error).__name__}: {error}"] += 1
    if faults:
        most, _ = faults.most_common(1)[0]
        found.notes.append(f"{sum(faults.values())} of {len(chosen)} images could not be shown; the most frequent reason: {most}")
    return found


def judge_grounding(sample: Sample, record: ExpressionRecord, line: dict[str, Any]) -> GroundingCase:
    """Score the final answer to one expression by the strict rules of the metrics; an answer "no target" has no boxes."""
    truth = truth_of(sample.record, record.targets)
    mask = segmentation.row(line, truth, segmentation.Rules(), "strict") if isinstance(line.get("mask_rle"), dict) else None
    f1: float | None = None
    if "boxes_xyxy" in line:
        says_none = mask["no_target"] if mask else bool(line.get("no_target"))
        boxes: dict[str, Any] = {"boxes_xyxy": [], "box_scores": []} if says_none else {}
        f1 = detection.row(line | boxes, truth, detection.Rules(select="all"), "strict")["f1"]
    prob = float(line.get("no_target_prob") or 0.0)
    return GroundingCase(record.image_id, record.expression_id, mask["iou"] if mask else None, f1, abs(prob - 0.5), list(record.tags))


def judge_generation(sample: Sample, key: GenerationKey, ways: dict[str, dict[str, Any]]) -> GenerationCase:
    """Score the final answer for an object set: the listener's choice where there is one."""
    line = ways[final_way(ways)]
    return GenerationCase(key[0], key, round_trip_iou(sample.record, key[1], line), is_right(line))


def is_right(line: dict[str, Any]) -> bool | None:
    """Return what the grammar's evaluator said of a text; None outside synthetic data."""
    return line["judgement"] == "exact" if "judgement" in line else None


def final_way(ways: dict[str, dict[str, Any]]) -> str:
    """Return the way of choosing whose text is the system's last word."""
    return next((way for way in ("listener", "greedy") if way in ways), sorted(ways)[0])


def round_trip_iou(record: ImageRecord, targets: Iterable[str], line: dict[str, Any]) -> float | None:
    """Return the IoU of the grounded generated text with the chosen objects, where the line holds it."""
    back = line.get("round_trip")
    iou: float | None = language.round_trip(back, truth_of(record, list(targets)))["iou"] if isinstance(back, dict) else None
    return iou


def worst(cases: list[Any], number: int) -> list[Any]:
    """Return the lowest scores, at most a quarter with one first tag, so that one weakness does not fill the sheet."""
    ranked = sorted(cases, key=lambda case: (case.score, -getattr(case, "confidence", 0.0)))
    taken: list[Any] = []
    seen: Counter[str] = Counter()
    for case in ranked:
        tag = case.tags[0] if case.tags else ""
        if case.score < 1 and len(taken) < number and seen[tag] < max(1, number // 4):
            taken.append(case)
            seen[tag] += 1
    rest = [case for case in ranked if case not in taken and case.score < 1]
    return sorted(taken + rest[: number - len(taken)], key=lambda case: case.score)


def spread(cases: list[Any], number: int) -> list[Any]:
    """Return `number` cases at even distances, all of them where there are no more."""
    return cases if len(cases) <= number else [cases[(2 * k + 1) * len(cases) // (2 * number)] for k in range(number)]


def truth_of(record: ImageRecord, targets: list[str]) -> Truth:
    """Return what is true of an expression or object set with these targets."""
    return Truth(record.image_id, targets, lambda: record)


def instance_mask(record: ImageRecord, instance: Instance) -> np.ndarray | None:
    """Return bool [H, W], or None in box-only data."""
    if instance.mask is not None:
        return instance.mask
    return None if instance.segmentation is None else segmentation_to_mask(instance.segmentation, record.height, record.width)


def union_mask(record: ImageRecord, targets: Iterable[str]) -> np.ndarray | None:
    """Return the union of the targets' masks, bool [H, W]; None where one of them has none."""
    code = target_mask(record, list(targets))
    return None if code is None else decode_rle(code)


def answer_mask(record: ImageRecord, line: dict[str, Any]) -> np.ndarray | None:
    """Return the predicted mask at original size, or None where the line holds none."""
    rle = line.get("mask_rle")
    return decode_rle(rle, record.height, record.width) if isinstance(rle, dict) else None


def says_none(line: dict[str, Any], answer: np.ndarray | None) -> bool:
    """Return the final answer to "is nothing meant?": the head says so, or the mask is empty."""
    return bool(line.get("no_target")) or (answer is not None and not answer.any())
