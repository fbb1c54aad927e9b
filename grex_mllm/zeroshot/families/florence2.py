"""Florence-2: 1,000 location bins of the original, boxes and polygons; the picture is squashed to a square of 768 pixels.

Asked by task words, which its processor of transformers replaces by a sentence: <CAPTION_TO_PHRASE_GROUNDING>,
<OPEN_VOCABULARY_DETECTION>, <REFERRING_EXPRESSION_SEGMENTATION> (`eval/prompts/*/native_florence2*.yaml`). Its makers search with three
beams; here it is greedy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grex_mllm.ops.frames import boxes_from_pixels, points_from_pixels
from grex_mllm.zeroshot.base import View
from grex_mllm.zeroshot.families.base import Family
from grex_mllm.zeroshot.families.sizes import square

FRAME, ORDER = "loc1000", "xyxy"


def locations(numbers: np.ndarray) -> str:
    """Return one token for each number."""
    return "".join(f"<loc_{int(n)}>" for n in np.ravel(numbers))


def write(boxes_xyxy: np.ndarray, view: View, label: str) -> str:
    """Write the label and four tokens for each box."""
    return label + locations(boxes_from_pixels(boxes_xyxy, FRAME, view))


def write_polygons(polygons: Sequence[np.ndarray], view: View, label: str) -> str:
    """Write the tokens of each outline, with <sep> between."""
    return label + "<sep>".join(locations(points_from_pixels(p, FRAME, view)) for p in polygons)


FAMILY = Family(
    name="florence2",
    frame=FRAME,
    order=ORDER,
    patterns=(r"florence-?2",),
    write=write,
    write_nothing=lambda: "",
    write_polygons=write_polygons,
    mention=lambda boxes, view: locations(boxes_from_pixels(boxes, FRAME, view)),
    formats={"boxes": "Locate each of them.", "polygons": "Segment each of them."},
    sent=square(768),
    empty_answer="no_target",
    lacks={
        "greg": "it describes a picture or one region, it has no task for several marked objects",
        "count": "it has no task for numbers",
        "exists": "it has no task for yes and no",
    },
    model_types=("florence2",),
)
