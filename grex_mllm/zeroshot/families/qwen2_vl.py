"""Qwen2-VL: thousandths of the original in box tokens (QwenLM/Qwen3-VL#536, #342)."""

from __future__ import annotations

import numpy as np

from grex_mllm.zeroshot.base import View
from grex_mllm.zeroshot.families.base import Family
from grex_mllm.zeroshot.families.json_format import RANGES, box_numbers, nothing_plain
from grex_mllm.zeroshot.families.sizes import smart

FRAME, ORDER = "k1000", "xyxy"


def pairs(boxes_xyxy: np.ndarray, view: View) -> list[str]:
    """Return (x1,y1),(x2,y2) for each box."""
    return [f"({n[0]},{n[1]}),({n[2]},{n[3]})" for n in box_numbers(boxes_xyxy, view, FRAME, ORDER)]


def write(boxes_xyxy: np.ndarray, view: View, label: str) -> str:
    """Write boxes with the family's special tokens."""
    boxes = "".join(f"<|box_start|>{pair}<|box_end|>" for pair in pairs(boxes_xyxy, view))
    return f"<|object_ref_start|>{label}<|object_ref_end|>{boxes}"


FAMILY = Family(
    name="qwen2-vl",
    frame=FRAME,
    order=ORDER,
    patterns=(r"qwen2?-?vl",),
    write=write,
    write_nothing=nothing_plain,
    mention=lambda boxes, view: ", ".join(pairs(boxes, view)),
    formats={
        "boxes": f"Write each bounding box as (x_min,y_min),(x_max,y_max), {RANGES[FRAME]}, one a line. "
        "Answer with the boxes alone, and with [] if there is none."
    },
    sent=smart(28, 56 * 56, 16384 * 28 * 28),
    model_types=("qwen2_vl",),
)
