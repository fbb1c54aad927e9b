"""Answers as JSON, as most families write them, and the sentences that ask for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np

from grex_mllm.ops.frames import DECIMALS, boxes_from_pixels, points_from_pixels
from grex_mllm.zeroshot.base import View
from grex_mllm.zeroshot.families.base import Family, Write, WritePolygons

RANGES = {
    "px": "in pixels of the image, which is {width} wide and {height} high",
    "px_sent": "in pixels of the image, which is {sent_width} wide and {sent_height} high",
    "k1000": "as whole numbers from 0 to 1000, relative to the width and height of the image",
    "k999": "as whole numbers from 0 to 999, relative to the width and height of the image",
    "unit": "as fractions from 0 to 1 of the width and height of the image",
    "unit_pad": "as fractions from 0 to 1 of the image padded to a square",
    "pct": "in percent of the width and height of the image",
}


def box_numbers(boxes_xyxy: np.ndarray, view: View, frame: str, order: str) -> list[list[str]]:
    """Return the four numbers of each box [N, 4] as they are written in a frame and order."""
    columns = (1, 0, 3, 2) if order == "yxyx" else (0, 1, 2, 3)
    return _texts(boxes_from_pixels(boxes_xyxy, frame, view)[:, columns], frame)


def point_numbers(points_xy: np.ndarray, view: View, frame: str, order: str) -> list[list[str]]:
    """Return the two numbers of each point [N, 2] as they are written in a frame and order."""
    points = points_from_pixels(np.asarray(points_xy, float).reshape(-1, 2), frame, view)
    return _texts(points[:, ::-1] if order == "yxyx" else points, frame)


def json_boxes(frame: str, order: str, key: str, fence: bool = True) -> Write:
    """Return a writer of [{KEY: [four numbers], "label": LABEL}], in a code fence where the family writes one."""

    def write(boxes_xyxy: np.ndarray, view: View, label: str) -> str:
        return _list(key, [f"[{', '.join(n)}]" for n in box_numbers(boxes_xyxy, view, frame, order)], label, fence)

    return write


def json_points(frame: str, order: str, key: str, fence: bool = True) -> Write:
    """Return a writer of [{KEY: [two numbers], "label": LABEL}]."""

    def write(points_xy: np.ndarray, view: View, label: str) -> str:
        return _list(key, [f"[{', '.join(n)}]" for n in point_numbers(points_xy, view, frame, order)], label, fence)

    return write


def json_polygons(frame: str, order: str, fence: bool = True) -> WritePolygons:
    """Return a writer of [{"polygon": [[two numbers], ...], "label": LABEL}]."""

    def write(polygons: Sequence[np.ndarray], view: View, label: str) -> str:
        texts = [", ".join(f"[{', '.join(n)}]" for n in point_numbers(p, view, frame, order)) for p in polygons]
        return _list("polygon", [f"[{text}]" for text in texts], label, fence)

    return write


def plain_boxes(frame: str, order: str) -> Write:
    """Return a writer of [four numbers], one a line and without a label; also how boxes are named in a prompt."""

    def write(boxes_xyxy: np.ndarray, view: View, label: str = "") -> str:
        return "\n".join(f"[{', '.join(n)}]" for n in box_numbers(boxes_xyxy, view, frame, order))

    return write


def json_formats(frame: str, order: str, key: str = "bbox_2d", point_key: str = "point_2d") -> Mapping[str, str]:
    """Return the sentences that ask for boxes, points and polygons as JSON."""
    box = "[y_min, x_min, y_max, x_max]" if order == "yxyx" else "[x_min, y_min, x_max, y_max]"
    point = "[y, x]" if order == "yxyx" else "[x, y]"
    end = f"with the coordinates {RANGES[frame]}. Answer with the list alone, and with an empty list [] if there is none."
    return {
        "boxes": f'Write a JSON list of {{"{key}": {box}, "label": "..."}}, {end}',
        "points": f'Write a JSON list of {{"{point_key}": {point}, "label": "..."}}, {end}',
        "polygons": f'Write a JSON list of {{"polygon": [{point}, {point}, ...], "label": "..."}}, one for each outline, {end}',
    }


def json_family(
    name: str, frame: str, order: str, patterns: tuple[str, ...], *, key: str = "bbox_2d", point_key: str = "point_2d", **own
) -> Family:  # type: ignore[no-untyped-def]
    """Return a family that answers boxes, points and polygons as JSON. own: fields of `Family` that differ."""
    mention = plain_boxes(frame, order)
    made = {
        "write": json_boxes(frame, order, key),
        "write_nothing": nothing_in_fence,
        "write_points": json_points(frame, order, point_key),
        "write_polygons": json_polygons(frame, order),
        "mention": lambda boxes, view: mention(boxes, view, "").replace("\n", ", "),
        "formats": json_formats(frame, order, key, point_key),
    }
    return Family(name=name, frame=frame, order=order, patterns=patterns, **{**made, **own})


def nothing_in_fence() -> str:
    """Return an empty list in a code fence."""
    return "```json\n[]\n```"


def nothing_plain() -> str:
    """Return an empty list."""
    return "[]"


def _texts(numbers: np.ndarray, frame: str) -> list[list[str]]:
    return [[f"{value:.{DECIMALS.get(frame, 0)}f}" for value in row + 0.0] for row in numbers]


def _list(key: str, values: list[str], label: str, fence: bool) -> str:
    said = json.dumps(label, ensure_ascii=False)
    lines = ",\n".join(f'\t{{"{key}": {value}, "label": {said}}}' for value in values)
    text = f"[\n{lines}\n]" if values else "[]"
    return f"```json\n{text}\n```" if fence else text
