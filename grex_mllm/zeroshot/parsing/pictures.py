"""Masks that stand as pictures in an answer: PNGs in data URLs, as Gemini 2.5 writes them beside its boxes.

A mask covers its box and holds probabilities from 0 to 255 (vendor's page on image understanding). What a model wrote is not trusted: the
letters, the format and the size are bounded before anything is unpacked, and what cannot be read is no mask.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

MAX_LETTERS = 400_000  # of one picture in base64; Gemini's have a few thousand
MAX_SIDE = 1024  # pixels
MAX_PICTURES = 100  # of one answer
THRESHOLD = 127
_URL = re.compile(r"(data:image/[a-z]{1,10};base64,)([A-Za-z0-9+/=]++)")
_PLACE = re.compile(r"\s*data:image/png;base64,#(\d{1,3})\s*")
_FAULTS = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, binascii.Error, Image.DecompressionBombError)


@dataclass(frozen=True, eq=False)
class MaskPicture:
    """A mask as it was answered. box_xyxy: float64 [4], pixels of the original, maybe over its edge.  values: uint8 [h, w] over the box."""

    box_xyxy: np.ndarray
    values: np.ndarray

    def placed(self, height: int, width: int) -> np.ndarray:
        """Return bool [height, width]: the pixels of the box, by their centres, whose value is above THRESHOLD."""
        mask = np.zeros((height, width), bool)
        left, top, right, bottom = self.box_xyxy
        x1, y1, x2, y2 = (int(np.ceil(edge - 0.5)) for edge in self.box_xyxy)
        x1, y1, x2, y2 = max(0, x1), max(0, y1), min(width, x2), min(height, y2)
        if x1 >= x2 or y1 >= y2:
            return mask
        rows, columns = self.values.shape
        scale = np.array([columns / (right - left), rows / (bottom - top)] * 2)
        inner = (np.array([x1, y1, x2, y2]) - np.array([left, top, left, top])) * scale
        inner = np.clip(inner, 0, [columns, rows, columns, rows])
        seen = Image.fromarray(self.values).resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR, box=tuple(inner.tolist()))
        mask[y1:y2, x1:x2] = np.asarray(seen) > THRESHOLD
        return mask


def take_out(text: str) -> tuple[str, list[str]]:
    """Return a text with the number of each picture in place of its letters (data:image/png;base64,#0), and the letters."""
    letters: list[str] = []

    def numbered(found: re.Match[str]) -> str:
        if len(letters) >= MAX_PICTURES:
            return found[1]
        letters.append(found[2])
        return f"{found[1]}#{len(letters) - 1}"

    return _URL.sub(numbered, text), letters


def number_of(value: object) -> int | None:
    """Return the number of the picture that a value is, as `take_out` left it; None where it is none."""
    found = _PLACE.fullmatch(value) if isinstance(value, str) and len(value) < 100 else None
    return None if found is None else int(found[1])


def read_mask(letters: str) -> np.ndarray | None:
    """Return the values uint8 [h, w] of a PNG in base64; None where it is no PNG, or larger than the bounds."""
    if len(letters) > MAX_LETTERS:
        return None
    try:
        data = base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
        with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
            if max(picture.size) > MAX_SIDE:
                return None
            return np.asarray(picture.convert("L"), np.uint8)
    except _FAULTS:
        return None


def write_mask(mask: np.ndarray) -> str:
    """Return a mask, bool [h, w] of a box, as a data URL."""
    file = io.BytesIO()
    Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0))).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
