"""Kosmos-2: cells of a 32 x 32 grid over the original, top left and bottom right; the picture is squashed to a square of 224 pixels.

It continues `<grounding><phrase> ...</phrase>` with the cells, and answers `Question: ... Answer:` (model card of
microsoft/kosmos-2-patch14-224; `eval/prompts/*/native_kosmos2.yaml`).
"""

from __future__ import annotations

import numpy as np

from grex_mllm.ops.frames import CELLS, boxes_from_pixels
from grex_mllm.zeroshot.base import View
from grex_mllm.zeroshot.families.base import Family
from grex_mllm.zeroshot.families.sizes import square

FRAME, ORDER = "patch32", "xyxy"
BETWEEN = "</delimiter_of_multi_objects/>"


def patches(boxes_xyxy: np.ndarray, view: View) -> str:
    """Return <object> with two cells for each box."""
    cells = boxes_from_pixels(boxes_xyxy, FRAME, view).astype(int)
    tokens = [f"<patch_index_{y1 * CELLS + x1:04d}><patch_index_{y2 * CELLS + x2:04d}>" for x1, y1, x2, y2 in cells]
    return f"<object>{BETWEEN.join(tokens)}</object>"


FAMILY = Family(
    name="kosmos2",
    frame=FRAME,
    order=ORDER,
    patterns=(r"kosmos-?2(?![.]\d)",),
    write=lambda boxes, view, label: f"<phrase> {label}</phrase>{patches(boxes, view)}",
    write_nothing=lambda: "There is none.",
    mention=patches,
    formats={"boxes": "Locate each of them."},
    sent=square(224),
    lacks={
        "greg": "it describes a picture or one region, it has no task for several marked objects",
    },
    model_types=("kosmos-2",),
)
