"""Coordinate frames of multimodal language models: from the numbers of an answer to pixels of the original image, and back.

Numbers are always in the order x, y here (a family's order y, x is the parser's and the writer's affair). A box is two corners.

| frame | a number means | written as |
|---|---|---|
| px | pixels of the original | whole numbers |
| px_sent | pixels of the picture that the model finally saw | whole numbers |
| k1000, k999 | thousandths (1/999) of the original's width or height | whole numbers |
| unit | fraction of the original | two decimals |
| unit_pad | fraction of the square on which the original is centred | two decimals |
| pct | percent of the original | one decimal |
| loc1024 | 1/1024 of the original | location tokens, 0 to 1023 |
| loc1000 | bin of the original; its centre is meant, cut to a whole pixel | location tokens, 0 to 999 |
| patch32 | column or row of 32; the cell's centre is meant, whole cells where both corners lie in one row or column | patch tokens |
"""

from __future__ import annotations

from itertools import product
from typing import Protocol

import numpy as np

from grex_mllm.errors import fault


class View(Protocol):
    """Size of an original, and of the picture of it that a model saw, without padding."""

    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def sent_width(self) -> int: ...
    @property
    def sent_height(self) -> int: ...


FRAMES = ("px", "px_sent", "k1000", "k999", "unit", "unit_pad", "pct", "loc1024", "loc1000", "patch32")
ORDERS = ("xyxy", "yxyx")
CELLS = 32
DECIMALS = {"unit": 2, "unit_pad": 2, "pct": 1}
_PARTS = {"k1000": 1000.0, "k999": 999.0, "unit": 1.0, "pct": 100.0, "loc1024": 1024.0, "loc1000": 1000.0, "patch32": float(CELLS)}


def points_to_pixels(numbers: np.ndarray, frame: str, view: View) -> np.ndarray:
    """Turn numbers of a frame, [..., 2] in the order x, y, into pixels of the original, float64; nothing is clipped.

    Raises:
        GrexError: an unknown frame.
    """
    size, parts = np.array([view.width, view.height], float), _parts(frame, view)
    numbers = np.asarray(numbers, float)
    if frame == "unit_pad":
        return numbers * size.max() - (size.max() - size) / 2
    if frame == "loc1000":  # the family's own processor cuts to whole pixels
        return np.trunc((numbers + 0.5) * size / parts)
    return (numbers + (0.5 if frame == "patch32" else 0.0)) * size / parts


def boxes_to_pixels(numbers: np.ndarray, frame: str, view: View) -> np.ndarray:
    """Turn boxes of a frame, [N, 4] in the order x, y, x, y, into xyxy pixels of the original, float64; nothing is clipped."""
    corners = np.asarray(numbers, float).reshape(-1, 2, 2)
    boxes = points_to_pixels(corners, frame, view)
    if frame == "patch32":
        flat = (corners[:, 0] == corners[:, 1]).any(axis=1)
        cell = np.array([view.width, view.height], float) / CELLS
        boxes[flat] = (corners[flat] + np.array([[0.0], [1.0]])) * cell
    return boxes.reshape(-1, 4)


def points_from_pixels(points_xy: np.ndarray, frame: str, view: View) -> np.ndarray:
    """Turn points of the original, [..., 2] in pixels, into the numbers that a model writes in this frame: rounded, within its range."""
    size, parts = np.array([view.width, view.height], float), _parts(frame, view)
    points = np.asarray(points_xy, float)
    if frame == "unit_pad":
        return np.round((points + (size.max() - size) / 2) / size.max(), DECIMALS[frame])
    numbers = points * parts / size
    if frame in DECIMALS:
        return np.round(numbers, DECIMALS[frame])
    if frame == "loc1024":
        return np.clip(np.round(numbers), 0, 1023)
    if frame in ("loc1000", "patch32"):
        return np.clip(np.floor(numbers), 0, parts - 1)
    return np.round(numbers)


def boxes_from_pixels(boxes_xyxy: np.ndarray, frame: str, view: View) -> np.ndarray:
    """Turn xyxy boxes of the original, [N, 4] in pixels, into the numbers of this frame, in the order x, y, x, y."""
    boxes = np.asarray(boxes_xyxy, float).reshape(-1, 4)
    if frame != "patch32" or not len(boxes):
        return points_from_pixels(boxes.reshape(-1, 2, 2), frame, view).reshape(-1, 4)
    return np.stack([_nearest_cells(box, view) for box in boxes])


def step(frame: str, view: View) -> tuple[float, float]:
    """Return the quantisation step of the frame in pixels of the original, along x and y.

    At the far edge loc1024 is off by a whole step: it has no number for the edge itself.
    """
    size, parts = np.array([view.width, view.height], float), _parts(frame, view)
    if frame == "unit_pad":
        size = np.full(2, size.max())
    x, y = size / (parts * 10.0 ** DECIMALS.get(frame, 0))
    return float(x), float(y)


def _parts(frame: str, view: View) -> np.ndarray:
    """Into how many units of the frame the original is divided, along x and y."""
    if frame == "px":
        return np.array([view.width, view.height], float)
    if frame == "px_sent":
        return np.array([view.sent_width, view.sent_height], float)
    if frame not in FRAMES:
        raise fault(f'coordinate frame "{frame}"', f"one of {', '.join(FRAMES)}", "fix the name")
    return np.full(2, _PARTS.get(frame, 1.0))


def _nearest_cells(box: np.ndarray, view: View) -> np.ndarray:
    """Return columns and rows [4] of the cells whose reading is nearest to the box: greatest corner error least."""
    cell = np.array([view.width, view.height] * 2, float) / CELLS
    around = [sorted({int(np.clip(np.floor(v) + d, 0, CELLS - 1)) for d in (-1, 0, 1)}) for v in box / cell]
    choices = np.array(list(product(*around)), float)
    choices = choices[(choices[:, 0] <= choices[:, 2]) & (choices[:, 1] <= choices[:, 3])]
    errors = np.abs((boxes_to_pixels(choices, "patch32", view) - box) / cell).max(axis=1)
    return choices[errors.argmin()]
