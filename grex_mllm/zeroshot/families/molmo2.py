"""Molmo2: points in thousandths of the original, <points coords="IMAGE ID X Y ID X Y ...">; see Molmo."""

from __future__ import annotations

import numpy as np

from grex_mllm.zeroshot.base import View
from grex_mllm.zeroshot.families.base import Family
from grex_mllm.zeroshot.families.json_format import plain_boxes, point_numbers
from grex_mllm.zeroshot.families.molmo import centres

FRAME, ORDER = "k1000", "xyxy"


def write_points(points_xy: np.ndarray, view: View, label: str) -> str:
    """Write the points of one picture; each has a running number."""
    places = " ".join(f"{i} {x} {y}" for i, (x, y) in enumerate(point_numbers(points_xy, view, FRAME, ORDER), 1))
    told = label.replace("&", "&amp;").replace("<", "&lt;")
    return f'<points coords="1 {places}">{told}</points>'


FAMILY = Family(
    name="molmo2",
    frame=FRAME,
    order=ORDER,
    patterns=(r"molmo-?2",),
    write=lambda boxes, view, label: write_points(centres(boxes), view, label),
    write_nothing=lambda: "There are none.",
    write_points=write_points,
    mention=lambda boxes, view: plain_boxes(FRAME, ORDER)(boxes, view, "").replace("\n", ", "),
    formats={"points": 'Point to each of them. If there is none, answer "There are none."'},
    answer="points",
)
