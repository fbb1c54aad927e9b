"""LLaVA-OneVision: fractions of the original; its authors document no format for grounding, so LLaVA's brackets are asked for."""

from __future__ import annotations

from grex_mllm.zeroshot.families.base import Family
from grex_mllm.zeroshot.families.json_format import RANGES, nothing_plain, plain_boxes
from grex_mllm.zeroshot.families.sizes import fitted

FRAME, ORDER = "unit", "xyxy"
TILE = 384

FAMILY = Family(
    name="llava-onevision",
    frame=FRAME,
    order=ORDER,
    patterns=(r"llava-?onevision(-?1[._]5)?",),
    write=plain_boxes(FRAME, ORDER),
    write_nothing=nothing_plain,
    mention=lambda boxes, view: plain_boxes(FRAME, ORDER)(boxes, view, "").replace("\n", ", "),
    formats={
        "boxes": f"Write each bounding box as [x_min, y_min, x_max, y_max], {RANGES[FRAME]}, one a line. "
        "Answer with the boxes alone, and with [] if there is none."
    },
    sent=fitted((w * TILE, h * TILE) for h in range(1, 7) for w in range(1, 7)),
    model_types=("llava_onevision",),
)
