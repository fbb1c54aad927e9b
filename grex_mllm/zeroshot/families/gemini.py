"""Gemini 2 and later: box_2d as [ymin, xmin, ymax, xmax] in thousandths of the original.

2.5 also writes masks, as a PNG over each box (vendor's page on image understanding); later ones write outlines or nothing of the kind.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from grex_mllm.ops.masks import mask_to_box_xyxy
from grex_mllm.zeroshot.base import View
from grex_mllm.zeroshot.families.json_format import box_numbers, json_family, json_formats
from grex_mllm.zeroshot.parsing.pictures import write_mask

FRAME, ORDER = "k1000", "yxyx"


def write_masks(masks: Sequence[np.ndarray], label: str) -> str:
    """Write the box of each mask, bool [H, W], and what it holds as a picture."""
    boxes = [mask_to_box_xyxy(mask) for mask in masks]
    height, width = masks[0].shape if len(masks) else (1, 1)
    numbers = box_numbers(np.asarray(boxes, np.float64).reshape(-1, 4), View(width, height, width, height), FRAME, ORDER)
    cut = [mask[int(b[1]) : int(b[3]), int(b[0]) : int(b[2])] for mask, b in zip(masks, boxes, strict=True)]
    items = [{"box_2d": [int(n) for n in box], "mask": write_mask(part), "label": label} for box, part in zip(numbers, cut, strict=True)]
    return f"```json\n{json.dumps(items, ensure_ascii=False)}\n```"


FAMILY = json_family(
    "gemini",
    FRAME,
    ORDER,
    (r"gemini",),
    key="box_2d",
    point_key="point",
    write_masks=write_masks,
    formats={
        **json_formats(FRAME, ORDER, "box_2d", "point"),
        "masks": 'Output a JSON list of segmentation masks where each entry contains the 2D bounding box in the key "box_2d", '
        'the segmentation mask in key "mask", and the text label in the key "label". Answer with an empty list [] if there is none.',
    },
)
