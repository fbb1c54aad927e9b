"""LLaVA-1.5: fractions of the square on which the picture is centred, two decimals (haotian-liu/LLaVA#606).

The default image processor of transformers crops the centre instead: set do_pad=True, do_center_crop=False.
"""

from __future__ import annotations

from grex_mllm.zeroshot.families.base import Family
from grex_mllm.zeroshot.families.json_format import RANGES, nothing_plain, plain_boxes
from grex_mllm.zeroshot.families.sizes import padded_square

FRAME, ORDER = "unit_pad", "xyxy"

FAMILY = Family(
    name="llava",
    frame=FRAME,
    order=ORDER,
    patterns=(r"llava",),
    write=plain_boxes(FRAME, ORDER),
    write_nothing=nothing_plain,
    mention=lambda boxes, view: plain_boxes(FRAME, ORDER)(boxes, view, "").replace("\n", ", "),
    formats={
        "boxes": f"Write each bounding box as [x_min, y_min, x_max, y_max], {RANGES[FRAME]}, one a line. "
        "Answer with the boxes alone, and with [] if there is none."
    },
    sent=padded_square(336),
    model_types=("llava", "vipllava"),
)
