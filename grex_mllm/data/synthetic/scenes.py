"""Synthetic scenes: what stands where, and the pixels.

A scene is a function of (seed, split, index): numpy's SeedSequence spreads these, PCG64's raw stream and Python's `random.random()` (both
frozen by their documentation) supply the numbers, and all pixels are integer arithmetic. So every machine, order and worker count makes
the same bytes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from grex_mllm.data.synthetic import shapes
from grex_mllm.data.synthetic.shapes import COLOUR, COLOURS, DIAMETERS, FIRST_LARGE, NUM_ANGLES, SHAPE, SHAPES, SIZE, TEXTURE, TEXTURES
from grex_mllm.errors import fault

if TYPE_CHECKING:
    from grex_mllm.data.synthetic.settings import SyntheticConfig

SPLITS = ("train", "val", "test", "compositional")
MIN_VISIBLE_PIXELS = 22
_PLACE_MARGIN, _RELATION_MARGIN, _ORDER_MARGIN = 0.06, 0.05, 0.04  # of the image's side
_AREA_RATIO = (13, 10)
_TRIES = 12
_RING = SHAPES.index("ring")


@dataclass(frozen=True, slots=True)
class SceneObject:
    """values: (shape, colour, size, texture) class indices.  scale: index into DIAMETERS.

    box: visible extent x1, y1, x2, y2 in pixels (x2, y2 exclusive).
    """

    values: tuple[int, int, int, int]
    scale: int
    box: tuple[int, int, int, int]


@dataclass(slots=True)
class Scene:
    """The objects, and bit masks over them (object k is bit k) from which the evaluator computes.

    masks[attribute][value]: objects that have the value.  focus: objects with a held-out attribute pair.
    """

    width: int
    height: int
    objects: list[SceneObject]
    focus: int = 0
    everything: int = 0
    masks: list[list[int]] = field(default_factory=list)
    present: list[list[int]] = field(default_factory=list)
    centre_x: list[float] = field(default_factory=list)
    centre_y: list[float] = field(default_factory=list)
    areas: list[int] = field(default_factory=list)
    _sides: dict[object, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.everything = (1 << len(self.objects)) - 1
        self.masks = [[0] * n for n in shapes.NUM_VALUES]
        for k, item in enumerate(self.objects):
            bit = 1 << k
            for table, value in zip(self.masks, item.values, strict=True):
                table[value] |= bit
            x1, y1, x2, y2 = item.box
            self.centre_x.append((x1 + x2) / 2)
            self.centre_y.append((y1 + y2) / 2)
            self.areas.append(shapes.full_area(item.values[SHAPE], item.scale))
        self.present = [[value for value, mask in enumerate(table) if mask] for table in self.masks]

    def axis(self, side: str) -> tuple[list[float], int]:
        """Return the objects' centres and the image's extent along the axis of a side."""
        return (self.centre_x, self.width) if side in ("left", "right") else (self.centre_y, self.height)

    def beside(self, side: str, anchor: int | None) -> tuple[int, int]:
        """Return (objects clearly on that side, objects too near the line) of an object, or of the image's middle for None.

        side: left, right, top, bottom. "Clearly" is 5 % of the image's side for objects and 6 % for the middle.
        """
        found = self._sides.get((side, anchor))
        if found is None:
            centres, extent = self.axis(side)
            line, margin = (extent / 2, _PLACE_MARGIN * extent) if anchor is None else (centres[anchor], _RELATION_MARGIN * extent)
            before, after, bit = 0, 0, 1
            for centre in centres:
                if centre <= line - margin:
                    before |= bit
                elif centre >= line + margin:
                    after |= bit
                bit <<= 1
            unsure = self.everything & ~(before | after)
            if anchor is not None:
                unsure &= ~(1 << anchor)
            found = (before if side in ("left", "top") else after, unsure)
            self._sides[side, anchor] = found
        return found

    def ranked(self, mask: int, side: str, rank: int) -> int | None:
        """Return the bit of the object of `mask` at that rank from a side; 0 where there are fewer; None with neighbours within 4 %."""
        if mask.bit_count() < rank:
            return 0
        centres, extent = self.axis(side)
        members = sorted(((centres[k], k) for k in bits(mask)), reverse=side in ("right", "bottom"))
        place = members[rank - 1][0]
        for neighbour in members[max(rank - 2, 0) : rank + 1]:
            if neighbour is not members[rank - 1] and abs(neighbour[0] - place) < _ORDER_MARGIN * extent:
                return None
        return 1 << members[rank - 1][1]

    def extreme(self, mask: int, largest: bool) -> int | None:
        """Return the bit of the largest or smallest object of `mask` by whole area; 0 for none; None unless 1.3 times the next."""
        if not mask:
            return 0
        members = sorted(((self.areas[k], k) for k in bits(mask)), reverse=largest)
        if len(members) > 1:
            below, above = sorted((members[0][0], members[1][0]))
            if above * _AREA_RATIO[1] < below * _AREA_RATIO[0]:
                return None
        return 1 << members[0][1]


def bits(mask: int) -> list[int]:
    """Return the positions of the ones, ascending."""
    return [k for k in range(mask.bit_length()) if mask >> k & 1]


@dataclass(frozen=True)
class HeldOut:
    """Attribute pairs that only the compositional split shows: (shape, colour) and (shape, texture) class indices."""

    colours: frozenset[tuple[int, int]]
    textures: frozenset[tuple[int, int]]

    def contains(self, values: tuple[int, ...]) -> bool:
        return (values[SHAPE], values[COLOUR]) in self.colours or (values[SHAPE], values[TEXTURE]) in self.textures


@lru_cache(maxsize=16)
def _held_out(pairs: tuple[str, ...]) -> HeldOut:
    colours, textures = set(), set()
    for pair in pairs:
        attribute, _, shape = pair.partition(" ")
        if shape not in SHAPES or attribute not in COLOURS + TEXTURES:
            raise fault(
                f'data.sources.synthetic.held_out has "{pair}"',
                f"a colour ({', '.join(COLOURS)}) or texture ({', '.join(TEXTURES)}) and a shape ({', '.join(SHAPES)})",
                'write for example "red star"',
            )
        if attribute in COLOURS:
            colours.add((SHAPES.index(shape), COLOURS.index(attribute)))
        else:
            textures.add((SHAPES.index(shape), TEXTURES.index(attribute)))
    if len(colours) > len(SHAPES) * len(COLOURS) // 3 or len(textures) > len(SHAPES):
        raise fault(f"data.sources.synthetic.held_out names {len(pairs)} pairs", "at most a third of all pairs", "shorten the list")
    return HeldOut(frozenset(colours), frozenset(textures))


def held_out_pairs(config: SyntheticConfig) -> HeldOut:
    """Return the configured held-out pairs.

    Raises:
        GrexError: an unknown word, or so many pairs that training scenes would be poor.
    """
    return _held_out(tuple(config.held_out))


@dataclass(slots=True)
class DrawnScene:
    """scene, image: uint8 [H, W, 3], masks: bool [N, H, W] visible pixels, one per object."""

    scene: Scene
    image: np.ndarray
    masks: np.ndarray


def scene_seed(config: SyntheticConfig, split: str, index: int) -> np.ndarray:
    """Return 4 random 64-bit words for a scene: 0-1 its content, 2-3 its expressions."""
    if split not in SPLITS:
        raise fault(f'split "{split}"', f"one of {', '.join(SPLITS)}", "name a split of the synthetic scenes")
    return np.random.SeedSequence((config.seed, SPLITS.index(split), index)).generate_state(4, np.uint64)


def _choose_values(r: Callable[[], float], number: int, held: HeldOut, compositional: bool) -> list[tuple[int, int, int, int]]:
    """Draw (shape, colour, size, texture) of every object from a small palette, so that groups with shared values exist."""
    palette_shapes = _subset(r, len(SHAPES), 2 + int(r() * 3))
    palette_colours = _subset(r, len(COLOURS), 2 + int(r() * 3))
    quiet = r() < 0.25  # a scene with few textures
    chosen: list[tuple[int, int, int, int]] = []
    if compositional:
        pairs = sorted(held.colours)
        for shape, colour in [pairs[int(r() * len(pairs))] for _ in range(1 + int(r() * 2))] if pairs else []:
            chosen.append((shape, colour, int(r() * 2), int(r() * 3)))
            palette_shapes[0], palette_colours[0] = shape, colour
        if held.textures and (not pairs or r() < 0.3):
            shape, texture = sorted(held.textures)[int(r() * len(held.textures))]
            size = 1 if shape == _RING else int(r() * 2)  # small rings are plain, see below
            chosen.append((shape, palette_colours[int(r() * len(palette_colours))], size, texture))
        chosen = [(v[0], v[1], v[2], 0) if v[SHAPE] == _RING and v[SIZE] == 0 else v for v in chosen[: number - 1] or chosen]
    while len(chosen) < number:
        for _ in range(40):
            values = (
                palette_shapes[int(r() * len(palette_shapes))],
                palette_colours[int(r() * len(palette_colours))],
                int(r() * 2),
                int(r() * 3) if r() < (0.35 if quiet else 0.75) else 0,
            )
            if chosen and r() < 0.2:  # a near twin: an earlier object with one value changed
                twin = list(chosen[int(r() * len(chosen))])
                which = int(r() * 4)
                twin[which] = values[which]
                values = (twin[0], twin[1], twin[2], twin[3])
            if values[SHAPE] == _RING and values[SIZE] == 0:  # too thin for a texture that can be told
                values = (values[0], values[1], values[2], 0)
            if compositional or not held.contains(values):
                break
            palette_shapes[int(r() * len(palette_shapes))] = int(r() * len(SHAPES))
        else:
            raise AssertionError("held-out pairs leave no object to draw")
        chosen.append(values)
    return chosen


def _subset(r: Callable[[], float], size: int, count: int) -> list[int]:
    rest = list(range(size))
    return [rest.pop(int(r() * len(rest))) for _ in range(count)]


@lru_cache(maxsize=1)
def _banks() -> tuple[np.ndarray, np.ndarray]:
    """Return raw noise bytes [2^18] and a periodic low-frequency map int8 [256, 256] in -30..30, both fixed for all scenes."""
    stream = np.random.PCG64(np.random.SeedSequence(20260722))
    noise = stream.random_raw(1 << 15).astype("<u8").view(np.uint8)
    grid = (stream.random_raw(16 * 16).astype("<u8").view(np.uint8)[::8].astype(np.int64) - 128).reshape(16, 16)
    step = np.arange(256)
    cell, part = step // 16, step % 16
    rows = grid[cell] * (16 - part)[:, None] + grid[(cell + 1) % 16] * part[:, None]
    smooth = rows[:, cell] * (16 - part)[None] + rows[:, (cell + 1) % 16] * part[None]
    return noise, (smooth * 30 // (256 * 128)).astype(np.int8)


@lru_cache(maxsize=16)
def _noise(amplitude: int) -> np.ndarray:
    """Return the bank as differences -amplitude..amplitude, stored modulo 256 so that adding them in uint8 is exact."""
    return ((_banks()[0].astype(np.int32) * (2 * amplitude + 1) >> 8) - amplitude).astype(np.int8).view(np.uint8)


def _background(r: Callable[[], float], size: int) -> np.ndarray:
    """Return uint8 [3, H, W]: a greyish tint (54..186) plus a pattern (-40..40): plain, gradient, checker or low-frequency texture."""
    kind, strength = int(r() * 4), 12 + int(r() * 28)
    grey = 70 + int(r() * 100)
    tint = [grey + int(r() * 33) - 16 for _ in range(3)]
    canvas = np.empty((3, size, size), dtype=np.uint8)
    step = np.arange(size)
    if kind == 0:
        pattern = np.zeros((1, 1), dtype=np.uint8)
    elif kind == 1:
        across, down = int(r() * 513) - 256, int(r() * 513) - 256
        total = (2 * step - size)[None, :] * across + (2 * step - size)[:, None] * down
        pattern = (total * strength // (512 * size)).astype(np.uint8)
    elif kind == 2:
        period, shift_x, shift_y = 6 + int(r() * 14), int(r() * 40), int(r() * 40)
        pattern = (((((step + shift_x) // period)[None, :] ^ ((step + shift_y) // period)[:, None]) & 1) * (strength // 2)).astype(np.uint8)
    else:
        x, y = int(r() * (257 - size)), int(r() * (257 - size))
        pattern = _banks()[1][y : y + size, x : x + size].view(np.uint8)
    for plane, value in zip(canvas, tint, strict=True):
        np.add(pattern, np.uint8(value), out=plane)
    return canvas


def draw_scene(config: SyntheticConfig, split: str, index: int) -> DrawnScene:
    """Draw scene `index` of a split: image_size x image_size pixels, with exact visible masks.

    Raises:
        GrexError: unknown split or settings out of range.
    """
    words = scene_seed(config, split, index)
    r = random.Random((int(words[0]) << 64) | int(words[1])).random
    held, size = held_out_pairs(config), config.image_size
    number = config.min_objects + int(r() * (config.max_objects - config.min_objects + 1))
    canvas = _background(r, size)
    labels = np.zeros((size, size), dtype=np.uint8)
    placed: list[tuple[tuple[int, int, int, int], int, list[int]]] = []
    visible: list[int] = [0]
    least: list[float] = [0.0]
    touched: set[int] = set()
    for values in _choose_values(r, number, held, split == "compositional"):
        scale = int(r() * FIRST_LARGE) + (FIRST_LARGE if values[SIZE] else 0)
        diameter = (DIAMETERS[scale] * size + 48) // 96
        form = shapes.template(values[SHAPE], diameter, int(r() * NUM_ANGLES), values[TEXTURE], values[SIZE] == 0)
        palette = np.array(shapes.paint(values[COLOUR], (r(), r(), r(), r())), dtype=np.uint8)
        height, width = form.mask.shape
        for _ in range(_TRIES if len(placed) >= 2 else 100):
            x, y = 1 + int(r() * (size - width - 1)), 1 + int(r() * (size - height - 1))
            under = labels[y : y + height, x : x + width]
            hidden = _hidden(under, form.mask, len(visible))
            if hidden is None or all(seen - lost >= need for seen, lost, need in zip(visible, hidden, least, strict=True)):
                break
        else:
            continue
        if hidden is not None:
            touched.update(k - 1 for k, lost in enumerate(hidden) if lost and k)
            visible = [seen - lost for seen, lost in zip(visible, hidden, strict=True)]
            visible[0] = 0
        placed.append((values, scale, [x, y, x + width, y + height]))
        np.copyto(under, len(placed), where=form.mask)
        np.copyto(canvas[:, y : y + height, x : x + width], palette.take(form.shade, axis=1), where=form.mask)
        visible.append(form.num_pixels)
        least.append(max(form.num_pixels * config.min_visible, MIN_VISIBLE_PIXELS))
    for k in touched:
        _tighten(labels, k + 1, placed[k][2])
    scene = Scene(size, size, [SceneObject(values, scale, (b[0], b[1], b[2], b[3])) for values, scale, b in placed])
    scene.focus = sum(1 << k for k, item in enumerate(scene.objects) if held.contains(item.values))
    masks = labels[None] == np.arange(1, len(placed) + 1, dtype=np.uint8)[:, None, None]
    return DrawnScene(scene, _finish(r, canvas, config.noise), masks)


def _hidden(under: np.ndarray, mask: np.ndarray, number: int) -> list[int] | None:
    """Return how many pixels of every label the mask would cover (label 0 counted as 0), or None where it covers no object."""
    if not under.any():
        return None
    if not under.any():
        return None
    covered = under[mask]
    if not covered.any():
        return None
    hidden: list[int] = np.bincount(covered, minlength=number).tolist()
    hidden[0] = 0
    return hidden


def _tighten(labels: np.ndarray, label: int, box: list[int]) -> None:
    """Shrink the box in place to the visible pixels of an object that others cover."""
    x, y = box[0], box[1]
    seen = labels[y : box[3], x : box[2]] == label
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    box[:] = [x + int(columns[0]), y + int(rows[0]), x + int(columns[-1]) + 1, y + int(rows[-1]) + 1]


def _finish(r: Callable[[], float], canvas: np.ndarray, noise: int) -> np.ndarray:
    """Add noise of a random strength and return uint8 [H, W, 3]. Colours stay in 14..241, so noise up to 14 cannot wrap."""
    bank = _noise(int(r() * (noise + 1)))
    start = int(r() * (bank.size - canvas.size))
    np.add(canvas, bank[start : start + canvas.size].reshape(canvas.shape), out=canvas)
    image = np.empty((*canvas.shape[1:], 3), dtype=np.uint8)
    for k in range(3):
        image[:, :, k] = canvas[k]
    return image
