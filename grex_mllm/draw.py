"""Draw answers on images: masks, boxes, count, minimap, chosen objects, and sheets of pictures.

Every picture keeps the image's pixels where they are: pixel (x, y) of the image covers the square from (x * factor, y * factor) of the
picture, with an integer factor that makes small images readable. A caption is a strip below. Colours are those of Okabe and Ito, which
differ with every kind of colour vision; each line carries a dark and a light edge, so that it shows on any background.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from grex_mllm.errors import fault
from grex_mllm.writing import whole_file

Colour = tuple[int, int, int]

PREDICTED: Colour = (230, 159, 0)  # orange
TRUTH: Colour = (86, 180, 233)  # sky blue
GREEN, YELLOW, PURPLE, RED, BLUE = (0, 158, 115), (240, 228, 66), (204, 121, 167), (213, 94, 0), (0, 114, 178)
OBJECT_COLOURS: tuple[Colour, ...] = (PREDICTED, TRUTH, GREEN, YELLOW, PURPLE, RED, BLUE)
READABLE_SIDE = 384  # small images are enlarged up to this side
PIXELS_PER_LINE = 240  # a line of one pixel for every so many pixels of the longer side
FILL_OPACITY = 0.36
OUTSIDE_LIGHT = 0.42  # what is left of the brightness outside a spotlight
OUTSIDE_LIGHT_LARGE = 0.65  # in photographs, which are often dark and whose surroundings must stay readable
MAX_CAPTION_CHARACTERS = 400
# Dark violet over teal to yellow: rises in lightness alone, so that it reads in grey as well.
HEAT = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], np.float64)
INK: Colour = (20, 22, 26)
PAPER: Colour = (255, 255, 255)
GREY = 128  # in place of an image that is not at hand


def enlarge_factor(height: int, width: int, side: int = READABLE_SIDE) -> int:
    """Return the integer by which a [height, width] image is enlarged so that its longer side comes near `side`; 1 for large images."""
    return max(1, side // max(height, width, 1))


def overlay(
    image: np.ndarray,
    mask: np.ndarray | None = None,
    boxes: np.ndarray | Sequence[Sequence[float]] | None = None,
    count: int | None = None,
    text: str | None = None,
    *,
    box_scores: Sequence[float] | np.ndarray | None = None,
    no_target: bool = False,
    colour: Colour = PREDICTED,
    factor: int | None = None,
    spotlight: bool = False,
) -> Image.Image:
    """Draw one answer on an image.

    image: uint8 [H, W, 3]. mask: bool [H, W]. boxes: [n, 4] xyxy in pixels of the image. count: 6 or more is written ">5".
    text: caption below. factor: enlargement, by default from the size of the image.
    spotlight: darken what is outside the mask in place of tinting what is inside, so that the objects keep their colours.

    Raises:
        GrexError: an image or mask of a wrong shape.
    """
    picture, factor = _canvas(image, factor)
    width = line_width(picture.size)
    if mask is not None:
        mask = _checked_mask(mask, image)
        if spotlight and mask.any():
            picture = _darken_outside(picture, mask, factor)
        picture = _paint_mask(picture, mask, colour, factor, width=width, tint=not spotlight)
    for index, box in enumerate(_box_list(boxes)):
        _frame(picture, box, colour, factor, width)
        if box_scores is not None and index < len(box_scores):
            _label_box(picture, f"{float(box_scores[index]):.2f}", box, colour, factor)
    if no_target:
        _plate(picture, "no target", PAPER)
    elif count is not None:
        _plate(picture, count_name(count), colour)
    return add_caption(picture, text) if text else picture


def grounding_png(answer: Any) -> bytes:
    """Return an answer (`types.Grounding`) as a PNG picture: on its image, or on grey where that is not at hand."""
    image = answer.image if answer.image is not None else np.full((*answer.mask.shape, 3), GREY, np.uint8)
    picture = overlay(
        image, answer.mask, answer.boxes_xyxy, answer.count, answer.expression, box_scores=answer.box_scores, no_target=answer.no_target
    )
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def draw_objects(
    image: np.ndarray,
    masks: Sequence[np.ndarray | None],
    boxes: Sequence[Sequence[float]] | np.ndarray | None = None,
    text: str | None = None,
    *,
    factor: int | None = None,
    spotlight: bool = False,
) -> Image.Image:
    """Draw a set of chosen objects, each with its own colour and number.

    image: uint8 [H, W, 3]. masks: N of bool [H, W] or None. boxes: [N, 4] xyxy. text, factor, spotlight: as in `overlay`.
    """
    picture, factor = _canvas(image, factor)
    width = line_width(picture.size)
    rows = _box_list(boxes)
    known = [_checked_mask(mask, image) for mask in masks if mask is not None]
    if spotlight and known:
        picture = _darken_outside(picture, np.any(known, axis=0), factor)
    for index in range(max(len(masks), len(rows))):
        colour = OBJECT_COLOURS[index % len(OBJECT_COLOURS)]
        mask = masks[index] if index < len(masks) else None
        if mask is not None:
            picture = _paint_mask(picture, mask.astype(bool), colour, factor, width=width, tint=not spotlight)
        if index < len(rows):
            _frame(picture, rows[index], colour, factor, width)
            _label_box(picture, str(index + 1), rows[index], colour, factor)
    return add_caption(picture, text) if text else picture


def minimap_image(minimap: np.ndarray, size: tuple[int, int], image: np.ndarray | None = None) -> Image.Image:
    """Draw a minimap float [P, P] in [0, 1] as a heat map of size (width, height), over the grey image where one is given."""
    values = np.nan_to_num(np.asarray(minimap, np.float64)).clip(0, 1)
    if values.ndim != 2:
        raise fault(f"minimap of shape {values.shape}", "[P, P]", "pass one minimap at a time")
    position = values * (len(HEAT) - 1)
    low = np.minimum(position.astype(int), len(HEAT) - 2)
    part = (position - low)[..., None]
    colours = HEAT[low] * (1 - part) + HEAT[low + 1] * part
    heat = Image.fromarray(colours.round().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    if image is None:
        return heat
    grey = Image.fromarray(np.ascontiguousarray(image)).convert("L").resize(size, Image.Resampling.NEAREST).convert("RGB")
    return Image.blend(heat, grey, 0.4)


def save_mask_png(mask: np.ndarray, path: str | Path) -> Path:
    """Write a bool [H, W] mask as an 8-bit PNG of the same size, 255 where True; whole or not at all."""
    if mask.ndim != 2:
        raise fault(f"mask of shape {tuple(mask.shape)}", "[height, width]", "pass one mask at a time")
    return save_png(_stencil(mask), path)


def save_png(picture: Image.Image, path: str | Path) -> Path:
    """Write a picture as PNG, whole or not at all."""
    with whole_file(path) as work:
        picture.save(work, format="PNG")
    return Path(path)


def contact_sheet(pictures: Sequence[Image.Image], columns: int = 4, gap: int = 12) -> Image.Image:
    """Lay pictures out in rows of `columns` on white, each row as high as its highest."""
    if not pictures:
        return Image.new("RGB", (READABLE_SIDE, READABLE_SIDE // 4), PAPER)
    columns = min(columns, len(pictures))
    rows = [list(pictures[start : start + columns]) for start in range(0, len(pictures), columns)]
    cell = max(picture.width for picture in pictures)
    heights = [max(picture.height for picture in row) for row in rows]
    sheet = Image.new("RGB", (columns * cell + (columns + 1) * gap, sum(heights) + (len(rows) + 1) * gap), PAPER)
    top = gap
    for row, height in zip(rows, heights):
        for column, picture in enumerate(row):
            sheet.paste(picture, (gap + column * (cell + gap), top))
        top += height + gap
    return sheet


def add_caption(picture: Image.Image, text: str) -> Image.Image:
    """Return the picture with `text`, wrapped, on a white strip below it."""
    size = max(16, round(max(picture.size) / 26))
    font = _font(size)
    shown = text if len(text) <= MAX_CAPTION_CHARACTERS else text[: MAX_CAPTION_CHARACTERS - 1] + "…"
    lines = _wrap(shown, font, picture.width - size)
    strip = round(size * (1.3 * len(lines) + 0.7))
    taller = Image.new("RGB", (picture.width, picture.height + strip), PAPER)
    taller.paste(picture, (0, 0))
    draw = ImageDraw.Draw(taller)
    for index, line in enumerate(lines):
        draw.text((size / 2, picture.height + size * (0.35 + 1.3 * index)), line, font=font, fill=INK)
    return taller


def count_name(count: int) -> str:
    """Return how a count class is written: "0" .. "5", ">5"."""
    return str(count) if count <= 5 else ">5"


def line_width(size: tuple[int, int]) -> int:
    """Return the width of a line in a picture of (width, height)."""
    return max(1, round(max(size) / PIXELS_PER_LINE))


def _canvas(image: np.ndarray, factor: int | None) -> tuple[Image.Image, int]:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise fault(f"image of shape {tuple(image.shape)}, {image.dtype}", "uint8 [height, width, 3]", "convert it to RGB first")
    factor = factor or enlarge_factor(*image.shape[:2])
    picture = Image.fromarray(np.ascontiguousarray(image))
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return picture, factor


def _checked_mask(mask: np.ndarray, image: np.ndarray) -> np.ndarray:
    if mask.shape != image.shape[:2]:
        expected = f"{image.shape[0]}x{image.shape[1]}, the image's height x width"
        raise fault(f"mask of shape {tuple(mask.shape)}", expected, "resize the mask to the image")
    return mask.astype(bool)


def _box_list(boxes: np.ndarray | Sequence[Sequence[float]] | None) -> list[list[float]]:
    return [] if boxes is None else [[float(number) for number in box] for box in boxes]


def _paint_mask(picture: Image.Image, mask: np.ndarray, colour: Colour, factor: int, *, width: int, tint: bool = True) -> Image.Image:
    """Tint the mask, and draw its contour inside the mask: a light line at the edge, a dark one within, the colour between."""
    if not mask.any():
        return picture
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    inside = mask[top:bottom, left:right].repeat(factor, axis=0).repeat(factor, axis=1)
    area = (left * factor, top * factor, right * factor, bottom * factor)
    picture = picture.copy()
    shapes = [inside]
    for radius in (max(1, width // 2), width, max(1, width // 2)):
        shapes.append(_erode(shapes[-1], radius))
    stencils = [_stencil(shape) for shape in shapes]
    tinted = picture.crop(area)
    if tint:
        tinted = Image.blend(tinted, Image.new("RGB", tinted.size, colour), FILL_OPACITY)
    for ink, stencil in zip((PAPER, colour, INK), stencils):
        picture.paste(ink, area, stencil)
    picture.paste(tinted, area[:2], stencils[-1])
    return picture


def _darken_outside(picture: Image.Image, mask: np.ndarray, factor: int) -> Image.Image:
    stencil = _stencil(mask.repeat(factor, axis=0).repeat(factor, axis=1))
    light = OUTSIDE_LIGHT if factor > 1 else OUTSIDE_LIGHT_LARGE
    return Image.composite(picture, picture.point(lambda value: value * light), stencil)


def _stencil(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * 255)


def _erode(mask: np.ndarray, radius: int) -> np.ndarray:
    """Keep the pixels whose square of side 2 * radius + 1 lies in the mask; what is outside the array is not in it."""
    for axis in (0, 1):
        wide = np.pad(mask, [(radius, radius) if axis == other else (0, 0) for other in (0, 1)])
        run, goal = 1, 2 * radius + 1  # pixel i holds whether `run` pixels from i on are all set
        while run < goal:
            step = min(run, goal - run)
            wide = wide[:-step] & wide[step:] if axis == 0 else wide[:, :-step] & wide[:, step:]
            run += step
        mask = wide
    return mask


def _frame(picture: Image.Image, box: Sequence[float], colour: Colour, factor: int, width: int) -> None:
    """Draw a box on its pixel edges: colour between a light outer and a dark inner line."""
    left, top = (max(0, round(value * factor)) for value in box[:2])
    right, bottom = min(picture.width, round(box[2] * factor)) - 1, min(picture.height, round(box[3] * factor)) - 1
    draw = ImageDraw.Draw(picture)
    edge = max(1, width // 2)
    inset = 0
    for ink, thickness in ((PAPER, edge), (colour, width), (INK, edge)):
        corners = (left + inset, top + inset, right - inset, bottom - inset)
        if corners[2] > corners[0] and corners[3] > corners[1]:
            draw.rectangle(corners, outline=ink, width=thickness)
        inset += thickness


def _label_box(picture: Image.Image, text: str, box: Sequence[float], colour: Colour, factor: int) -> None:
    size = max(14, round(max(picture.size) / 30))
    font = _font(size)
    width, height = round(font.getlength(text)) + size // 2, round(size * 1.25)
    left = min(max(0, round(box[0] * factor)), max(0, picture.width - width))
    edge = max(0, round(box[1] * factor))
    top = edge - height if edge >= height else edge
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left, top, left + width, top + height), fill=colour, outline=INK)
    draw.text((left + width / 2, top + height / 2), text, font=font, fill=INK, anchor="mm")


def _plate(picture: Image.Image, text: str, colour: Colour) -> None:
    """Write the count in the upper right corner, in ink on a plate with an edge."""
    size = max(17, round(max(picture.size) / 16))
    font = _font(size)
    width, height = max(round(font.getlength(text)) + size, round(size * 1.4)), round(size * 1.4)
    left, top = picture.width - width - size // 4, size // 4
    draw = ImageDraw.Draw(picture)
    draw.rounded_rectangle(
        (left, top, left + width, top + height), radius=size // 4, fill=colour, outline=INK, width=line_width(picture.size)
    )
    draw.text((left + width / 2, top + height / 2), text, font=font, fill=INK, anchor="mm")


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)  # knows more scripts than the one that Pillow carries
    except OSError:
        return ImageFont.load_default(size)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    """Break at spaces; a word longer than a line is cut."""
    lines = [""]
    for word in " ".join(text.split()).split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines
