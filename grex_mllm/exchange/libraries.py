"""Answers as objects of supervision and FiftyOne, which are imported when a function is called, and as the plain numbers they take."""

from __future__ import annotations

from typing import Any

import numpy as np

from grex_mllm.errors import fault
from grex_mllm.exchange.found import Found, objects_of
from grex_mllm.ops.masks import mask_to_box_xyxy
from grex_mllm.types import Grounding


def detections_fields(results: list[Grounding]) -> dict[str, Any]:
    """Return what `supervision.Detections` takes, of N objects of one image: xyxy float32 [N, 4], mask bool [N, H, W] or None, confidence
    float32 [N] or None, class_id int64 [N] (which expression), data["expression"] [N]."""
    rows = [(number, result, found) for number, result in enumerate(results) for found in _objects(result)]
    scored = bool(rows) and all(found.score is not None for _, _, found in rows)
    masked = bool(rows) and all(found.mask is not None for _, _, found in rows)
    return {
        "xyxy": np.array([_box(found) for _, _, found in rows], np.float32).reshape(-1, 4),
        "mask": np.stack([found.mask for _, _, found in rows if found.mask is not None]) if masked else None,
        "confidence": np.array([found.score for _, _, found in rows], np.float32) if scored else None,
        "class_id": np.array([number for number, _, _ in rows], np.int64),
        "data": {"expression": np.array([result.expression for _, result, _ in rows], dtype=str)},
    }


def to_supervision(results: list[Grounding]) -> Any:
    """Return `supervision.Detections` of the answers for one image.

    Raises:
        GrexError: supervision is not installed.
    """
    try:
        import supervision
    except ImportError:
        raise fault("supervision is not installed", "the package", "pip install supervision") from None
    return supervision.Detections(**detections_fields(results))


def fiftyone_fields(result: Grounding) -> list[dict[str, Any]]:
    """Return what `fiftyone.Detection` takes, for each object.

    label; bounding_box [x, y, w, h] in [0, 1] of the image; mask bool within the box, or None; confidence or None.
    """
    height, width = result.mask.shape
    fields = []
    for found in _objects(result):
        extent = found.mask is not None and found.mask.any()
        x1, y1, x2, y2 = mask_to_box_xyxy(found.mask) if extent and found.mask is not None else _box(found)
        inner = found.mask[int(y1) : int(y2), int(x1) : int(x2)] if extent and found.mask is not None else None
        box = [x1 / width, y1 / height, (x2 - x1) / width, (y2 - y1) / height]
        fields.append({"label": result.expression, "bounding_box": box, "mask": inner, "confidence": found.score})
    return fields


def to_fiftyone(file: str, results: list[Grounding]) -> Any:
    """Return a `fiftyone.Sample` of an image file with the objects of all answers under `grounding`.

    Raises:
        GrexError: fiftyone is not installed.
    """
    try:
        import fiftyone
    except ImportError:
        raise fault("fiftyone is not installed", "the package", "pip install fiftyone") from None
    sample = fiftyone.Sample(filepath=file)
    detections = [fiftyone.Detection(**fields) for result in results for fields in fiftyone_fields(result)]
    sample["grounding"] = fiftyone.Detections(detections=detections)
    return sample


def _objects(result: Grounding) -> list[Found]:
    return [] if result.no_target else objects_of(result.mask, result.boxes_xyxy, result.box_scores)


def _box(found: Found) -> list[float]:
    if found.box_xyxy is not None:
        return found.box_xyxy
    assert found.mask is not None
    return mask_to_box_xyxy(found.mask)
