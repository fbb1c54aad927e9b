"""One image, one question: what `grex ground` and `grex describe` do."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from grex_mllm.errors import GrexError, fault
from grex_mllm.types import MORE_THAN_FIVE, ExpressionRecord, ImageRecord, Instance

MAX_SHOWN = 80


def ground_image(
    model: str, image: str, expressions: list[str], out: Path, *, device: str, threshold: float | None
) -> list[dict[str, Any]]:
    """Ground expressions, write an overlay and a mask PNG of the image's size for each, and return what is printed.

    threshold: "no target" is said above this probability; None = as the model's configuration says.

    Raises:
        GrexError: an unreadable image or model, an expression that cannot be answered, or a threshold outside [0, 1].
    """
    from grex_mllm.data.images import load_image
    from grex_mllm.draw import overlay, save_mask_png, save_png
    from grex_mllm.models.grex import check_expression
    from grex_mllm.predictors import open_blind
    from grex_mllm.predictors.protocol import Item, Options

    for expression in expressions:
        check_expression(expression)
    pixels = load_image(image)
    predictor = open_blind(model, Options(device, precision="fp32", threshold=threshold), "ground")
    record = ImageRecord("0", image, pixels.shape[0], pixels.shape[1])
    asked = [ExpressionRecord(f"{n}", f"{n}", "0", text, text, [], "", "") for n, text in enumerate(expressions)]
    given = {answer.key: answer for answer in predictor.ground([Item(record, Path(image), lambda: pixels, asked)])}
    results = []
    for question in asked:
        answer = given[question.expression_id]
        if answer.grounding is None:
            raise fault(f"{model} answers {answer.status} ({answer.reason})", "a grounding", "ask otherwise, or another model")
        results.append(answer.grounding)
    out.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w.-]", "_", Path(image).stem)
    answers = []
    for number, result in enumerate(results):
        name = f"{stem}.{number}" if len(results) > 1 else stem
        picture, mask = out / f"{name}.overlay.png", out / f"{name}.mask.png"
        boxes = result.boxes_xyxy if result.boxes_xyxy is not None else ()
        options = {"box_scores": result.box_scores, "no_target": result.no_target, "factor": 1}
        drawn = overlay(pixels, result.mask, boxes, result.count, **options)  # type: ignore[arg-type]
        save_png(drawn, picture)
        save_mask_png(result.mask, mask)
        answers.append(
            {
                "expression": result.expression,
                "no_target": result.no_target,
                "no_target_prob": round(result.no_target_prob, 4),
                "count": "more than 5" if result.count is not None and result.count >= MORE_THAN_FIVE else result.count,
                "boxes_xyxy": None if result.boxes_xyxy is None else np.round(result.boxes_xyxy.astype(float), 1).tolist(),
                "box_scores": None if result.box_scores is None else np.round(result.box_scores.astype(float), 4).tolist(),
                "mask_pixels": int(result.mask.sum()),
                "overlay": str(picture),
                "mask": str(mask),
            }
        )
    return answers


def describe_objects(
    model: str,
    image: str,
    *,
    boxes: str | None,
    masks: list[str] | None,
    mode: str,
    candidates: int,
    rerank: str | None,
    seed: int,
    device: str,
) -> dict[str, Any]:
    """Describe one set of objects given as boxes or mask files and return what is printed.

    Raises:
        GrexError: neither or both given, boxes in another form, files that are no masks, and all that `describe` raises.
    """
    from grex_mllm.data.images import load_image
    from grex_mllm.ops.masks import mask_to_box_xyxy
    from grex_mllm.ops.selection import selection_masks
    from grex_mllm.predictors import open_blind
    from grex_mllm.predictors.protocol import Item, Options

    corners = None if boxes is None else parse_boxes(boxes)
    pixels = load_image(image)
    chosen = None if masks is None else [_read_mask(file, pixels.shape[:2]) for file in masks]
    height, width = pixels.shape[:2]
    selection_masks(height, width, chosen, corners)
    objects = [Instance(f"{n}", "", box) for n, box in enumerate(corners or [])]
    objects += [Instance(f"{n}", "", mask_to_box_xyxy(mask), mask=mask) for n, mask in enumerate(chosen or [])]
    given = {"mode": (mode, "greedy"), "candidates": (candidates, 1), "rerank": (rerank, None), "seed": (seed, 0)}
    speech = {name: value for name, (value, usual) in given.items() if value != usual}
    predictor = open_blind(model, Options(device, precision="fp32", speech=speech), "generate")
    targets = tuple(item.annotation_id for item in objects)
    record = ImageRecord("0", image, height, width, objects)
    (answer,) = predictor.describe([Item(record, Path(image), lambda: pixels, object_sets=[targets], complete=False)])
    if answer.expression is None:
        raise fault(f"{model} answers {answer.status} ({answer.reason})", "an expression", "ask otherwise, or another model")
    printed: dict[str, Any] = {"expression": answer.expression}
    if answer.fields.get("score") is not None:
        printed["listener_score"] = round(answer.fields["score"], 4)
    if answer.fields.get("candidates"):
        options = answer.fields["candidates"]
        printed["candidates"] = [{"expression": t} | ({"listener_score": round(v, 4)} if v == v else {}) for t, v in options]
    if answer.fields.get("costs"):
        printed["listener_costs"] = answer.fields["costs"]
    return printed


def parse_boxes(text: str) -> list[list[float]]:
    """Return the boxes of the text "[[x1,y1,x2,y2], ...]", in pixels.

    Raises:
        GrexError: other text, with the place where it differs.
    """
    shown = text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."

    def wrong(what: str, remedy: str) -> GrexError:
        return fault(f"--boxes {shown!r}: {what}", 'a list of boxes in pixels, "[[x1,y1,x2,y2], ...]" with x1 < x2 and y1 < y2', remedy)

    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise wrong("not a list of lists of numbers", "write numbers, commas and closed brackets alone, in quotes") from None
    if not isinstance(value, list) or not value:
        raise wrong("no box", "give at least one box")
    if not any(isinstance(box, list) for box in value):
        raise wrong("no brackets around each box", "put each box into brackets, also a single one: [[x1,y1,x2,y2]]")
    for number, box in enumerate(value):
        if not isinstance(box, list) or len(box) != 4:
            given = f"box {number} has {len(box)} entries" if isinstance(box, list) else f"box {number} is no list"
            raise wrong(given, "give four numbers for each box")
        if any(isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v) for v in box):
            raise wrong(f"box {number} has an entry that is no finite number", "give numbers without quotes")
        if box[0] >= box[2] or box[1] >= box[3]:
            raise wrong(f"box {number} has no area", "give the top left corner first, then the bottom right one, not width and height")
    return [[float(v) for v in box] for box in value]


def _read_mask(file: str, size: tuple[int, ...]) -> np.ndarray:
    from grex_mllm.data.images import load_image

    mask = load_image(file).max(axis=-1) > 127
    if mask.shape != size:
        given = f"mask {file} is {mask.shape[0]}x{mask.shape[1]}"
        raise fault(given, f"{size[0]}x{size[1]}, the image's height x width", "give a mask of that size")
    if not mask.any():
        raise fault(f"mask {file} without a pixel above 127", "at least one, where the object is", "leave the empty mask out")
    return mask
