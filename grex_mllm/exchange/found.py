"""The objects of a predicted answer, one by one: what annotation tools show and people correct."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grex_mllm.data.records import Dataset, load_dataset
from grex_mllm.errors import fault
from grex_mllm.ops.masks import decode_rle
from grex_mllm.score.reading import PredictionFiles, index_predictions


class Found(NamedTuple):
    """One object. mask: bool [H, W], or None.  box_xyxy: in pixels, or None.  score: of the box, or None."""

    mask: np.ndarray | None
    box_xyxy: list[float] | None
    score: float | None


def objects_of(mask: np.ndarray | None, boxes_xyxy: Any, scores: Any) -> list[Found]:
    """Split an answer into objects: each pixel of the mask goes to the box that it lies in, of several to the one nearest in its own size.

    mask: bool [H, W] of all objects together, or None.  boxes_xyxy: [n, 4] pixels, or None.  scores: [n], or None.
    A pixel outside all boxes goes to the nearest one, so that the objects' masks together are the mask. Without boxes the mask is one
    object. A box without pixels has an empty mask.
    """
    if boxes_xyxy is None or len(boxes_xyxy) == 0:
        return [] if mask is None or not mask.any() else [Found(mask, None, None)]
    boxes = np.asarray(boxes_xyxy, np.float64)
    values = [None if scores is None else float(scores[i]) for i in range(len(boxes))]
    if mask is None:
        return [Found(None, box.tolist(), score) for box, score in zip(boxes, values, strict=True)]
    rows, columns = np.nonzero(mask)
    size = np.maximum(boxes[:, 2:] - boxes[:, :2], 1.0)
    offset = np.abs(np.stack([columns, rows], axis=1)[:, None] + 0.5 - (boxes[:, :2] + boxes[:, 2:]) / 2)
    owner = (offset / size).max(axis=2).argmin(axis=1)  # 0.5 = on the box's edge
    found = []
    for i, (box, score) in enumerate(zip(boxes, values, strict=True)):
        own = np.zeros_like(mask)
        own[rows[owner == i], columns[owner == i]] = True
        found.append(Found(own, box.tolist(), score))
    return found


def line_objects(line: dict[str, Any]) -> list[Found]:
    """Return the objects of a grounding line of predictions.jsonl; none where it says "no target" or has no answer."""
    if line.get("status", "ok") != "ok" or line.get("no_target"):
        return []
    code = line.get("mask_rle")
    return objects_of(None if code is None else decode_rle(code), line.get("boxes_xyxy"), line.get("box_scores"))


def open_answers(predictions: str, data: str) -> tuple[PredictionFiles, Dataset]:
    """Open predictions.jsonl and its dataset folder.

    Raises:
        GrexError: files of another form, or predictions of no expression of the folder.
    """
    dataset, answers = load_dataset(data), index_predictions([Path(predictions)])
    if not any(answers.find(record.expression_id) for record in dataset.expressions):
        answers.close()
        raise fault(f"{predictions} without an expression of {data}", "predictions of that dataset", "give the folder they were made on")
    return answers, dataset
