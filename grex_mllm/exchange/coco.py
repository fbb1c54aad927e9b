"""Predictions as COCO results: one row for each object, with bbox, score and segmentation (RLE). `grex score` reads them back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grex_mllm.exchange.found import Found, line_objects, open_answers
from grex_mllm.ops.masks import encode_rle
from grex_mllm.writing import whole_file

CATEGORY = 1  # what an expression means is no category; tools want a number


def write_coco(predictions: str, data: str, out: str) -> list[str]:
    """Write the rows and return lines to print. An expression without objects has one row with neither bbox nor segmentation.

    Count and no-target probability have no place in this form.

    Raises:
        GrexError: files of another form, or predictions of no expression of the dataset folder.
    """
    answers, dataset = open_answers(predictions, data)
    rows: list[dict[str, Any]] = []
    number = 0
    for record in dataset.expressions:
        line = answers.find(record.expression_id)
        if line is None:
            continue
        number += 1
        same = {"expression_id": record.expression_id, "image_id": record.image_id, "category_id": CATEGORY}
        objects: list[Found | None] = [*line_objects(line)]
        for found in objects or [None]:
            row: dict[str, Any] = dict(same)
            if found is not None and found.box_xyxy is not None:
                x1, y1, x2, y2 = found.box_xyxy
                row |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "score": 1.0 if found.score is None else found.score}
            if found is not None and found.mask is not None:
                row["segmentation"] = encode_rle(found.mask)
            rows.append(row)
    answers.close()
    with whole_file(out) as work:
        Path(work).write_text(json.dumps(rows), encoding="utf-8")
    return [f"{out}: {len(rows)} rows of {number} expressions"]
