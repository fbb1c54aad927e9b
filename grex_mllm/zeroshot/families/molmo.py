"""Molmo: points in percent of the original; boxes are asked of it as one point each, at the box's centre. Masks need a segmenter."""

from __future__ import annotations

import numpy as np

from grex_mllm.zeroshot.base import View
from grex_mllm.zeroshot.families.base import Family
from grex_mllm.zeroshot.families.json_format import plain_boxes, point_numbers

FRAME, ORDER = "pct", "xyxy"


def centres(boxes_xyxy: np.ndarray) -> np.ndarray:
    """Return the centres [N, 2] of boxes."""
    return np.asarray(boxes_xyxy, float).reshape(-1, 2, 2).mean(axis=1)


def write_points(points_xy: np.ndarray, view: View, label: str) -> str:
    """Write one <point>, or <points> for several."""
    numbers = point_numbers(points_xy, view, FRAME, ORDER)
    told = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    if len(numbers) == 1:
        return f'<point x="{numbers[0][0]}" y="{numbers[0][1]}" alt="{told}">{told}</point>'
    places = " ".join(f'x{i}="{x}" y{i}="{y}"' for i, (x, y) in enumerate(numbers, 1))
    return f'<points {places} alt="{told}">{told}</points>'


FAMILY = Family(
    name="molmo",
    frame=FRAME,
    order=ORDER,
    patterns=(r"molmo",),
    write=lambda boxes, view, label: write_points(centres(boxes), view, label),
    write_nothing=lambda: "There are none.",
    write_points=write_points,
    mention=lambda boxes, view: plain_boxes(FRAME, ORDER)(boxes, view, "").replace("\n", ", "),
    formats={"points": 'Point to each of them. If there is none, answer "There are none."'},
    answer="points",
)
