"""What an object of a synthetic scene can be, and how it looks: attribute names and rasterised shape templates.

Everything is integer arithmetic: sines and cosines come from tables rounded to 1/4096, so that the last bit of a machine's libm cannot
move a pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "bar", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
DIAMETERS = (11, 13, 15, 20, 24, 28)  # pixels in a scene of 96 x 96; larger scenes scale them

ATTRIBUTES: dict[str, list[str]] = {
    "shape": list(SHAPES),
    "colour": list(COLOURS),
    "size": list(SIZES),
    "texture": list(TEXTURES),
    "scale": [f"diameter {d}" for d in DIAMETERS],
}

SHAPE, COLOUR, SIZE, TEXTURE = range(4)
NUM_VALUES = (len(SHAPES), len(COLOURS), len(SIZES), len(TEXTURES))
NUM_ANGLES = 32
FIRST_LARGE = 3  # DIAMETERS[FIRST_LARGE:] are "large"

_UNIT = 4096
# hue in 1/1536 of the circle, its jitter, and the range of the value channel
_HUES = ((0, 14, 205, 235), (118, 12, 225, 241), (246, 16, 225, 241), (520, 55, 140, 205), (945, 50, 170, 235), (1210, 45, 140, 215))
_LIGHT_TEXTURE = (True, False, False, True, True, True)  # light marks would vanish on orange and yellow


@dataclass(frozen=True)
class Template:
    """One rasterised object.

    mask: bool [h, w], tight.  shade: int [h, w], 0 fill, 1 texture mark, 2 edge.  num_pixels: pixels of the mask.
    """

    mask: np.ndarray
    shade: np.ndarray
    num_pixels: int


def _polygon(*points: tuple[float, float]) -> np.ndarray:
    return np.array([[round(x * _UNIT), round(y * _UNIT)] for x, y in points], dtype=np.int64)


_STAR = [(radius * math.sin(math.pi * k / 5), -radius * math.cos(math.pi * k / 5)) for k, radius in enumerate([1.2, 0.56] * 5)]
_ARM = [(-0.37, -1.06), (0.37, -1.06), (0.37, -0.37)]  # of the cross; turned by quarters it is the others

# in units of the radius, y down; a circle and a ring have none
_POLYGONS: dict[str, np.ndarray] = {
    "square": _polygon((-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)),
    "triangle": _polygon((0.0, -1.18), (1.03, 0.72), (-1.03, 0.72)),
    "star": _polygon(*_STAR),
    "bar": _polygon((-1.2, -0.43), (1.2, -0.43), (1.2, 0.43), (-1.2, 0.43)),
    "cross": _polygon(*((x * c - y * s, x * s + y * c) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1)) for x, y in _ARM)),
}
_RING_HOLE = round(0.46 * _UNIT)


def _unit_area(shape: str) -> int:
    disc = 3217 * _UNIT * _UNIT // 1024  # pi
    if shape == "circle":
        return disc
    if shape == "ring":
        return disc - 3217 * _RING_HOLE * _RING_HOLE // 1024
    x, y = _POLYGONS[shape].T
    return abs(int((x * np.roll(y, -1) - np.roll(x, -1) * y).sum())) // 2


def full_area(shape: int, scale: int) -> int:
    """Return the nominal area of a whole (not occluded) object, in 1/1000 of a squared radius of one pixel; only ratios matter."""
    return _AREAS[shape][scale]


_AREAS = [[_unit_area(shape) * 1000 // (_UNIT * _UNIT) * d * d for d in DIAMETERS] for shape in SHAPES]


def _inside_polygon(points: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Even-odd rule, exact in int64."""
    inside = np.zeros(u.shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        crosses = (y0 > v) != (y1 > v)
        side = (u - x0) * (y1 - y0) - (v - y0) * (x1 - x0)
        inside ^= crosses & ((side < 0) == (y1 > y0))
    return inside


def _texture_marks(texture: str, u: np.ndarray, v: np.ndarray, diameter: int, small: bool) -> np.ndarray:
    """u, v: object frame in units of 1/4096 radius. Stripes cross the long side of a bar; marks keep a fixed size in pixels."""
    if texture == "plain":
        return np.zeros(u.shape, dtype=bool)
    pixel_u = u * diameter // (2 * (_UNIT // 16)) + 1600  # 1/16 pixel, positive
    pixel_v = v * diameter // (2 * (_UNIT // 16)) + 1600
    period = 64 if small else 96
    if texture == "striped":
        return pixel_u % period < period // 2
    dot = 34 if small else 50
    return (pixel_u % period < dot) & ((pixel_v + period // 2) % period < dot)


@cache
def template(shape: int, diameter: int, angle: int, texture: int, small: bool) -> Template:
    """Rasterise one object. diameter: pixels; angle: step of NUM_ANGLES; small: selects the finer texture."""
    side = diameter * 5 // 4 + 3
    sine, cosine = round(_UNIT * math.sin(2 * math.pi * angle / NUM_ANGLES)), round(_UNIT * math.cos(2 * math.pi * angle / NUM_ANGLES))
    position = 2 * np.arange(side, dtype=np.int64) + 1 - side  # half pixels from the centre
    x, y = position[None, :], position[:, None]
    u, v = (x * cosine + y * sine) // diameter, (y * cosine - x * sine) // diameter  # 1/4096 radius
    name = SHAPES[shape]
    if name in ("circle", "ring"):
        squared = u * u + v * v
        mask = squared <= _UNIT * _UNIT
        if name == "ring":
            mask &= squared >= _RING_HOLE * _RING_HOLE
    else:
        mask = _inside_polygon(_POLYGONS[name], u, v)
    padded = np.pad(mask, 1)
    interior = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    shade = _texture_marks(TEXTURES[texture], u, v, diameter, small).astype(np.intp)
    shade[mask & ~interior] = 2
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    crop = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    mask = np.ascontiguousarray(mask[crop])
    return Template(mask, np.ascontiguousarray(shade[crop]), int(mask.sum()))


def _from_hue(hue: int, saturation: int, value: int) -> tuple[int, int, int]:
    sector, rest = (hue % 1536) >> 8, hue & 255
    low = value * (255 - saturation) // 255
    falling = value * (255 * 255 - saturation * rest) // (255 * 255)
    rising = value * (255 * 255 - saturation * (255 - rest)) // (255 * 255)
    table = (
        (value, rising, low),
        (falling, value, low),
        (low, value, rising),
        (low, falling, value),
        (rising, low, value),
        (value, low, falling),
    )
    return table[sector]


def paint(colour: int, draws: tuple[float, float, float, float]) -> list[list[int]]:
    """Return the jittered palette of an object as rows R, G, B of columns fill, mark, edge; values in 14..241.

    draws: four numbers in [0, 1).
    """
    hue, jitter, low, high = _HUES[colour]
    fill = _from_hue(
        hue + int(draws[0] * (2 * jitter + 1)) - jitter + 1536, 195 + int(draws[1] * 50), low + int(draws[2] * (high - low + 1))
    )
    light = _LIGHT_TEXTURE[colour] and draws[3] < 0.6
    palette = []
    for value in fill:
        mark = value + (250 - value) * 3 // 4 if light else value * 5 // 16
        edge = value * 11 // 16
        palette.append([min(max(value, 14), 241), min(max(mark, 14), 241), min(max(edge, 14), 241)])
    return palette
