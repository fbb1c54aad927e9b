"""PaliGemma 1 and 2: 1,024 location tokens over the original, y first; the picture is squashed to 224, 448 or 896 pixels.

Tokens are read as 1/1023, as the authors wrote and scored them (google-research/big_vision, pp/proj/paligemma/segmentation.py and
evaluators/proj/paligemma/transfers/segmentation.py). Some readers divide by 1024: then the far edge of a picture has no token, and a
box that ends there is off by a whole step. Asked by prefixes, which only the "mix" checkpoints know without tuning: `detect`, `answer en`.
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
