"""From answers to the fields of a prediction line (`eval/README.md`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from grex_mllm.ops.masks import encode_rle
from grex_mllm.predictors.protocol import Answer
from grex_mllm.types import Grounding

ROUND_TRIP = ("mask_rle", "boxes_xyxy", "box_scores", "no_target")


def grounding_fields(result: Grounding, masks: bool = True) -> dict[str, Any]:
    """Return the fields of a grounding; what the model has no head for is left out.

    `no_target` is what the head alone says, which the official protocol reads.  masks: false leaves them out, so that they are not scored.
    """
    fields: dict[str, Any] = {"mask_rle": encode_rle(result.mask)} if masks else {}
    for name, values, places in (("boxes_xyxy", result.boxes_xyxy, 3), ("box_scores", result.box_scores, 5)):
        if values is not None:
            fields[name] = np.round(values.astype(np.float64), places).tolist()
    if result.count is not None:
        fields["count"] = result.count
    fields |= {"no_target_prob": round(result.no_target_prob, 6), "no_target": result.head_no_target}
    if masks and result.mask_input is not None:
        fields["mask_rle_input"] = encode_rle(result.mask_input)
    if result.minimap is not None:
        fields["minimap"] = np.round(result.minimap.astype(np.float64), 2).tolist()
    return fields


def answer_fields(answer: Answer) -> dict[str, Any]:
    """Return the fields of an answer, its status last unless it brings one at a place of its own."""
    fields: dict[str, Any] = {} if answer.grounding is None else grounding_fields(answer.grounding, answer.masks)
    if answer.expression is not None:
        fields["expression"] = answer.expression
    fields |= answer.fields
    fields["status"] = answer.status
    if answer.reason:
        fields["reason"] = answer.reason
    return fields


def round_trip_fields(answer: Answer) -> dict[str, Any]:
    """Return the fields of a `round_trip`; none of an answer whose status is not ok."""
    return {name: value for name, value in answer_fields(answer).items() if name in ROUND_TRIP and answer.status == "ok"}
