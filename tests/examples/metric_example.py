"""A worked example of a metric: how far the centre of the best-scored box lies from the centre of all targets.

It is no part of the package: a protocol names it by its dotted path, with this file's folder on PYTHONPATH. The contract that it follows
is the docstring of `grex_mllm.metrics`; `tests/test_example_metric.py` runs it.

    tasks:
      examples.metric_example: {unit: pixels}
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from grex_mllm.metrics.columns import Column, mean_of
from grex_mllm.metrics.detection import prediction_boxes
from grex_mllm.metrics.sums import Means
from grex_mllm.metrics.truth import Truth

TITLE = "Centres"
NEEDS = {"strict": ("boxes_xyxy",)}  # one way of scoring, from boxes
LEFT_OUT = "have no target"
COLUMNS = (
    Column("centre_error", "centre error", mean_of("centre_error"), format="number", higher_is_better=False),
    Column("centre_hit", "centre hit", mean_of("centre_hit")),
)


@dataclass(frozen=True)
class Rules:
    """unit: of the distance. hit_radius: a centre within it is a hit, as a share of the image diagonal."""

    unit: Literal["pixels", "diagonal"] = "diagonal"
    hit_radius: float = 0.1


def row(prediction: dict[str, Any] | None, truth: Truth, rules: Rules, protocol: str) -> dict[str, Any] | None:
    """Return centre_error and centre_hit of one answer; None without a target. No answer, or no box, is a whole diagonal off."""
    if not truth.targets:
        return None
    diagonal = math.hypot(truth.image.width, truth.image.height)
    boxes, scores = prediction_boxes(prediction) if prediction is not None else ([], [])
    distance = diagonal
    if boxes:
        best = max(zip(scores, boxes, strict=True))[1]
        corners = list(zip(*truth.boxes, strict=True))
        wanted = [min(corners[0]), min(corners[1]), max(corners[2]), max(corners[3])]
        distance = math.dist(_centre(best), _centre(wanted))
    return {
        "centre_error": distance if rules.unit == "pixels" else distance / diagonal,
        "centre_hit": distance <= rules.hit_radius * diagonal,
    }


def sums(rules: Rules, protocol: str) -> Means:
    """Return empty sums: the means of both numbers."""
    return Means("centre_error", "centre_hit")


def _centre(box_xyxy: list[float]) -> tuple[float, float]:
    return (box_xyxy[0] + box_xyxy[2]) / 2, (box_xyxy[1] + box_xyxy[3]) / 2
