"""Objects shown to a model: numbered marks, outlines, coordinates in text, crops, or several of these ("numbers+coordinates").

Drawn by `grex_mllm.marks`.
"""

from __future__ import annotations

import numpy as np

from grex_mllm.errors import fault
from grex_mllm.marks import COLOURS, NAMES, Shown, crops, line_width, listed, mark_colours, mark_picture, mark_words
from grex_mllm.ops.boxes import clip_boxes
from grex_mllm.ops.masks import mask_to_box_xyxy
from grex_mllm.predictors.protocol import Item, ObjectSet

__all__ = [
    "COLOURS",
    "NAMES",
    "WAYS",
    "Shown",
    "crops",
    "line_width",
    "listed",
    "mark_colours",
    "mark_picture",
    "mark_words",
    "parse_ways",
    "shown_objects",
]

WAYS = ("numbers", "outlines", "coordinates", "crops")


def parse_ways(marking: str) -> tuple[str, ...]:
    """Return the ways of a marking such as "numbers+coordinates", in the order of WAYS.

    Raises:
        GrexError: an unknown or repeated way.
    """
    ways = marking.split("+")
    if not set(ways) <= set(WAYS) or len(set(ways)) != len(ways):
        raise fault(f'marking "{marking}"', f"one of {', '.join(WAYS)}, or several of them with +", "fix the marking")
    return tuple(way for way in WAYS if way in ways)


def shown_objects(item: Item, targets: ObjectSet) -> list[Shown]:
    """Return the objects of a set, in its order.

    Raises:
        GrexError: an annotation that the image lacks, or a malformed mask.
    """
    places = {instance.annotation_id: n for n, instance in enumerate(item.instances)}
    missing = [target for target in targets if target not in places]
    if missing:
        raise fault(f"object set with {', '.join(missing)} of image {item.record.image_id}", "annotations of this image", "fix the set")
    shown = []
    for target in targets:
        instance, mask = item.instances[places[target]], item.masks[places[target]]
        has_mask = (instance.mask is not None or instance.segmentation is not None) and bool(mask.any())
        box = mask_to_box_xyxy(mask) if has_mask else clip_boxes(np.asarray(instance.box_xyxy, np.float64), *mask.shape).tolist()
        shown.append(Shown(mask, (box[0], box[1], box[2], box[3]), has_mask))
    return shown
