"""InternVL2.5, 3 and 3.5: thousandths of the whole original, not of a tile (OpenGVLab/InternVL#227, #285)."""

from __future__ import annotations

import numpy as np

from grex_mllm.zeroshot.base import View
from grex_mllm.zeroshot.families.base import Family
from grex_mllm.zeroshot.families.json_format import RANGES, nothing_plain, plain_boxes
from grex_mllm.zeroshot.families.sizes import tiles

FRAME, ORDER = "k1000", "xyxy"
_plain = plain_boxes(FRAME, ORDER)


def box_list(boxes_xyxy: np.ndarray, view: View) -> str:
    """Return <box>[[...], ...]</box>."""
    return f"<box>[{_plain(boxes_xyxy, view, '').replace(chr(10), ', ')}]</box>"


def write(boxes_xyxy: np.ndarray, view: View, label: str) -> str:
    """Write all boxes of the label in one list."""
    return f"<ref>{label}</ref>{box_list(boxes_xyxy, view)}"


FAMILY = Family(
    name="internvl",
    frame=FRAME,
    order=ORDER,
    patterns=(r"intern-?vl",),
    write=write,
    write_nothing=nothing_plain,
    mention=box_list,
    formats={
        "boxes": f"Write all bounding boxes in one list, <box>[[x_min, y_min, x_max, y_max], ...]</box>, {RANGES[FRAME]}. "
        "Answer with the list alone, and with [] if there is none."
    },
    sent=tiles(448, 12),
    model_types=("internvl",),
)
