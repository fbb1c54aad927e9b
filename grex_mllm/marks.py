"""Draw objects for a model to see: numbered marks, outlines, crops.

Numbered marks: set of mark (arXiv 2310.11441). A red outline: arXiv 2304.06712. Both are drawn on a copy of the photograph at its original
size, before any model resizes it. An outline lies around the object, so that it hides nothing of it; only at the picture's edge it lies
within. A number lies in the thickest part of its object, or beside an object that it would hide.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
# Told apart by their names, too, as a model would name them; the first ones differ most.
NAMED: dict[str, Colour] = {
    "red": (235, 25, 25),
    "green": (0, 200, 60),
    "blue": (40, 110, 255),
    "yellow": (255, 215, 0),
    "magenta": (255, 0, 220),
    "cyan": (0, 225, 235),
    "orange": (255, 130, 0),
    "purple": (140, 60, 220),
    "brown": (150, 90, 40),
    "pink": (255, 170, 200),
}
NAMES, COLOURS = tuple(NAMED), tuple(NAMED.values())
INK: Colour = (15, 15, 15)
PAPER: Colour = (255, 255, 255)
PIXELS_PER_WIDTH = 200  # a line is one pixel wide for every so many pixels of the longer side, but 3 at least
MIN_LINE = 3
PIXELS_PER_TEXT = 26  # height of a number, as a share of the longer side
MIN_TEXT = 14
SMALLEST_SHARE = 0.6  # of a number's height, in a thin object
MAX_COVERED = 0.4  # share of an object that its number may hide
CROP_MARGIN = 0.15  # of the box's sides, on each side
MIN_CROP = 32  # pixels


@dataclass(frozen=True, eq=False)
class Shown:
    """An object to show. mask: bool [H, W]; the filled box where there is none.  box_xyxy: pixels.  has_mask: false for a box alone."""

    mask: np.ndarray
    box_xyxy: tuple[float, float, float, float]
    has_mask: bool = True


def mark_picture(pixels: np.ndarray, objects: Sequence[Shown], ways: Sequence[str]) -> np.ndarray:
    """Return a copy of a picture with the marks of `ways` on it: outlines, numbers, or both. Other ways draw nothing.

    pixels: uint8 [H, W, 3].  Outlines alone are all red, so that one word names them; numbers come with outlines of a colour each.
    """
    numbers = "numbers" in ways
    if not numbers and "outlines" not in ways:
        return pixels.copy()
    width = line_width(pixels.shape[1], pixels.shape[0])
    colours = mark_colours(len(objects)) if numbers else [COLOURS[0]] * len(objects)
    drawn = pixels.copy()
    order = sorted(range(len(objects)), key=lambda n: -int(objects[n].mask.sum()))  # small ones last, on top
    for n in order:
        _draw_outline(drawn, objects[n].mask, colours[n], width)
    if not numbers:
        return drawn
    picture = Image.fromarray(drawn)
    plates: list[tuple[int, int, int, int]] = []
    for n in reversed(order):  # small ones choose first
        plates.append(_place_number(str(n + 1), objects, n, plates, picture.size))
        _draw_number(picture, str(n + 1), plates[-1], colours[n])
    return np.asarray(picture)


def crops(pixels: np.ndarray, objects: Sequence[Shown], margin: float = CROP_MARGIN) -> list[np.ndarray]:
    """Return a crop uint8 [h, w, 3] of every object, with a margin of its sides around it; at least MIN_CROP pixels where there are any."""
    height, width = pixels.shape[:2]
    cut = []
    for shown in objects:
        left, right = _span(shown.box_xyxy[0], shown.box_xyxy[2], width, margin)
        top, bottom = _span(shown.box_xyxy[1], shown.box_xyxy[3], height, margin)
        cut.append(pixels[top:bottom, left:right].copy())
    return cut


def mark_words(count: int, ways: Sequence[str]) -> dict[str, str]:
    """Return what a prompt calls the marks of `count` objects: "numbers" ("1, 2 and 3") and "colours" ("red, green and blue")."""
    names = list(dict.fromkeys(NAMES[n % len(NAMES)] for n in range(count))) if "numbers" in ways else [NAMES[0]]
    return {"numbers": listed([str(n + 1) for n in range(count)]), "colours": listed(names)}


def listed(words: Sequence[str]) -> str:
    """Join words as a sentence does: "1, 2 and 3"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def line_width(width: int, height: int) -> int:
    """Return the width in pixels of an outline in a picture of this size: 3 at 640, never less."""
    return max(MIN_LINE, round(max(width, height) / PIXELS_PER_WIDTH))


@lru_cache(maxsize=8)
def mark_colours(count: int) -> list[Colour]:
    """Return `count` distinct colours: the named ones first, then hues spread by the golden ratio."""
    colours = list(COLOURS[:count])
    while len(colours) < count:
        n = len(colours) - len(COLOURS)
        red, green, blue = colorsys.hsv_to_rgb((0.05 + n * 0.618034) % 1, 0.55 if n % 2 else 1.0, 0.95 if n % 3 else 0.65)
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colours


def _span(low: float, high: float, limit: int, margin: float) -> tuple[int, int]:
    extra = max(margin * (high - low), (MIN_CROP - (high - low)) / 2)
    start, end = max(0, int(np.floor(low - extra))), min(limit, int(np.ceil(high + extra)))
    return start, max(end, start + 1)


def _draw_outline(pixels: np.ndarray, mask: np.ndarray, colour: Colour, width: int) -> None:
    """Draw around the mask: the colour, then a dark edge; within it only where the mask reaches the picture's edge."""
    if not mask.any():
        return
    reach = width + 1
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = max(0, rows[0] - reach), max(0, columns[0] - reach)
    bottom, right = min(mask.shape[0], rows[-1] + 1 + reach), min(mask.shape[1], columns[-1] + 1 + reach)
    inside = mask[top:bottom, left:right]
    band = np.ones(mask.shape, bool)
    band[width:-width, width:-width] = False
    line = (_grown(inside, width) & ~inside) | (inside & band[top:bottom, left:right])
    edge = _grown(inside, reach) & ~_grown(inside, width)
    part = pixels[top:bottom, left:right]
    part[edge] = INK
    part[line] = colour


def _grown(mask: np.ndarray, radius: int) -> np.ndarray:
    """Return the pixels within `radius` of the mask."""
    from scipy.ndimage import distance_transform_edt

    return np.asarray(distance_transform_edt(~mask) <= radius)


def _place_number(
    text: str, objects: Sequence[Shown], n: int, plates: list[tuple[int, int, int, int]], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom of the plate of a number: inside the object where it hides little of it, else beside it."""
    from scipy.ndimage import distance_transform_edt

    largest = max(MIN_TEXT, round(max(size) / PIXELS_PER_TEXT))
    smallest = max(MIN_TEXT, round(largest * SMALLEST_SHARE))
    mask, area = objects[n].mask, int(objects[n].mask.sum())
    free = mask.copy()
    for other, shown in enumerate(objects):
        if other != n and int(shown.mask.sum()) < area:
            free &= ~shown.mask  # what overlaps and is smaller lies in front, or is a part
    for left, top, right, bottom in plates:
        free[top:bottom, left:right] = False
    free = free if free.any() else mask
    if free.any():
        first_row, first_column = int(free.any(axis=1).argmax()), int(free.any(axis=0).argmax())
        last_row, last_column = int(np.flatnonzero(free.any(axis=1))[-1]), int(np.flatnonzero(free.any(axis=0))[-1])
        depth = distance_transform_edt(np.pad(free[first_row : last_row + 1, first_column : last_column + 1], 1))[1:-1, 1:-1]
        y, x = (int(place) for place in np.unravel_index(int(depth.argmax()), depth.shape))
        for height in dict.fromkeys((largest, smallest)):
            width = _plate_width(text, height)
            if width * height <= MAX_COVERED * area and height / 2 <= depth[y, x] + 1:
                return _inside((first_column + x - width // 2, first_row + y - height // 2), width, height, size)
    return _beside(objects, n, plates, (_plate_width(text, smallest), smallest), size)


def _beside(
    objects: Sequence[Shown], n: int, plates: list[tuple[int, int, int, int]], plate: tuple[int, int], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Return the place next to the object's outline that hides the least of all objects and other numbers; the first of equals."""
    x1, y1, x2, y2 = objects[n].box_xyxy
    width, height = plate
    reach = line_width(*size) + 1
    middle_x, middle_y = round((x1 + x2) / 2) - width // 2, round((y1 + y2) / 2) - height // 2
    above, below, before, behind = int(y1) - reach - height, int(np.ceil(y2)) + reach, int(x1) - reach - width, int(np.ceil(x2)) + reach
    choices = [(middle_x, above), (behind, middle_y), (middle_x, below), (before, middle_y), (behind, above), (before, above)]

    def hidden(place: tuple[int, int, int, int]) -> int:
        left, top, right, bottom = place
        count = sum(int(shown.mask[top:bottom, left:right].sum()) for shown in objects)
        for other in plates:
            over = (min(right, other[2]) - max(left, other[0]), min(bottom, other[3]) - max(top, other[1]))
            count += 4 * over[0] * over[1] if min(over) > 0 else 0
        return count

    return min((_inside(choice, width, height, size) for choice in choices), key=hidden)


def _inside(corner: tuple[int, int], width: int, height: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    left, top = (min(max(0, place), max(0, limit - side)) for place, limit, side in zip(corner, size, (width, height)))
    return left, top, left + width, top + height


def _draw_number(picture: Image.Image, text: str, place: tuple[int, int, int, int], colour: Colour) -> None:
    """Write a number on a plate of its colour, in the ink that shows on it."""
    left, top, right, bottom = place
    light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 130
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left, top, right - 1, bottom - 1), fill=colour, outline=INK if light else PAPER)
    font = _font(bottom - top)
    draw.text(((left + right) / 2, (top + bottom) / 2), text, font=font, fill=INK if light else PAPER, anchor="mm")


def _plate_width(text: str, height: int) -> int:
    return round(_font(height).getlength(text)) + max(6, height // 3)


@lru_cache(maxsize=16)
def _font(height: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, the same on every machine, for a plate of this height."""
    return ImageFont.load_default(round(height * 0.85))
