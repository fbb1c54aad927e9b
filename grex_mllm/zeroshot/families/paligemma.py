"""PaliGemma 1 and 2: location tokens of 1/1024 of the original, y first; the picture is squashed to 224, 448 or 896 pixels.

The far edge has no token of its own: there a box is off by a whole step of 1/1024, as with all readers that divide by 1024 (the authors'
own evaluation divides by 1023). Asked by prefixes, which only the "mix" checkpoints know without tuning: `detect`, `answer en`.
"""

from __future__ import annotations

import numpy as np

from grex_mllm.ops.frames import boxes_from_pixels
from grex_mllm.zeroshot.base import View
from grex_mllm.zeroshot.families.base import Family
from grex_mllm.zeroshot.families.sizes import square

FRAME, ORDER = "loc1024", "yxyx"


def locations(boxes_xyxy: np.ndarray, view: View) -> list[str]:
    """Return four tokens for each box."""
    numbers = boxes_from_pixels(boxes_xyxy, FRAME, view).astype(int)
    return [f"<loc{y1:04d}><loc{x1:04d}><loc{y2:04d}><loc{x2:04d}>" for x1, y1, x2, y2 in numbers]


FAMILY = Family(
    name="paligemma",
    frame=FRAME,
    order=ORDER,
    patterns=(r"paligemma(-?2)?",),
    write=lambda boxes, view, label: " ; ".join(f"{tokens} {label}" for tokens in locations(boxes, view)),
    write_nothing=lambda: "",
    mention=lambda boxes, view: " ; ".join(locations(boxes, view)),
    formats={"boxes": "Locate each of them."},
    sent=square(224),
    empty_answer="no_target",
    lacks={"greg": "it has a prefix for one caption of a picture, none for several marked objects"},
    model_types=("paligemma",),
)
