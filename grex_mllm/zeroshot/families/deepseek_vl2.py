"""DeepSeek-VL2: 1/999 of the original in <|det|> (deepseek-ai/DeepSeek-VL2#60). No class of transformers: behind a server only."""

from __future__ import annotations

import numpy as np

from grex_mllm.zeroshot.base import View
from grex_mllm.zeroshot.families.base import Family
from grex_mllm.zeroshot.families.json_format import RANGES, nothing_plain, plain_boxes
from grex_mllm.zeroshot.families.sizes import fitted

FRAME, ORDER = "k999", "xyxy"
TILE, MAX_TILES = 384, 9
_plain = plain_boxes(FRAME, ORDER)


def det(boxes_xyxy: np.ndarray, view: View) -> str:
    """Return <|det|>[[...], ...]<|/det|>."""
    return f"<|det|>[{_plain(boxes_xyxy, view, '').replace(chr(10), ', ')}]<|/det|>"


def write(boxes_xyxy: np.ndarray, view: View, label: str) -> str:
    """Write all boxes of the label in one list."""
    return f"<|ref|>{label}<|/ref|>{det(boxes_xyxy, view)}"


FAMILY = Family(
    name="deepseek-vl2",
    frame=FRAME,
    order=ORDER,
    patterns=(r"deepseek-?vl-?2",),
    write=write,
    write_nothing=nothing_plain,
    mention=det,
    formats={
        "boxes": f"Write all bounding boxes in one list, <|det|>[[x_min, y_min, x_max, y_max], ...]<|/det|>, {RANGES[FRAME]}. "
        "Answer with the list alone, and with [] if there is none."
    },
    sent=fitted((w * TILE, h * TILE) for w in range(1, MAX_TILES + 1) for h in range(1, MAX_TILES + 1) if w * h <= MAX_TILES),
)
