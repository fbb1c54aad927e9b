"""Sizes of the picture that a model sees, re-derived from the families' released image processors; padding is never counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from grex_mllm.errors import fault
from grex_mllm.zeroshot.families.base import Limits

SizeRule = Callable[[int, int, Limits], tuple[int, int]]
MAX_ASPECT = 200  # Qwen's processors refuse narrower pictures


def smart_resize(width: int, height: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Return the nearest size whose sides are multiples of `factor` and whose area lies within the limits (Qwen2-VL and its successors).

    Raises:
        GrexError: a side more than 200 times as long as the other, or none.
    """
    if min(width, height) < 1 or max(width, height) / min(width, height) > MAX_ASPECT:
        raise fault(f"image of {width}x{height} pixels", f"sides that differ by at most {MAX_ASPECT} times", "leave the image out")
    new_width, new_height = round(width / factor) * factor, round(height / factor) * factor
    if new_width * new_height > max_pixels:
        scale = math.sqrt(width * height / max_pixels)
        return tuple(max(factor, math.floor(side / scale / factor) * factor) for side in (width, height))  # type: ignore[return-value]
    if new_width * new_height < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        return tuple(math.ceil(side * scale / factor) * factor for side in (width, height))  # type: ignore[return-value]
    return new_width, new_height


def smart(factor: int, min_pixels: int, max_pixels: int) -> SizeRule:
    """Return Qwen's rule with its released limits, which `Limits.min_pixels` and `max_pixels` replace."""
    return lambda width, height, limits: smart_resize(
        width, height, factor, limits.min_pixels or min_pixels, limits.max_pixels or max_pixels
    )


def square(side: int) -> SizeRule:
    """Return the rule of families that squash every picture to one square; `Limits.side` replaces it."""
    return lambda width, height, limits: (limits.side or side, limits.side or side)


def padded_square(side: int) -> SizeRule:
    """Return the rule of LLaVA-1.5: the longer side becomes `side`, the rest is padding."""

    def rule(width: int, height: int, limits: Limits) -> tuple[int, int]:
        scale = (limits.side or side) / max(width, height)
        return max(1, round(width * scale)), max(1, round(height * scale))

    return rule


def tiles(side: int, max_tiles: int) -> SizeRule:
    """Return the rule of InternVL: the grid of at most `max_tiles` tiles whose aspect is nearest; of two alike, the greater while it fits.

    The picture is squashed to the grid. A thumbnail comes beside, which moves no coordinate.
    """

    def rule(width: int, height: int, limits: Limits) -> tuple[int, int]:
        most = limits.max_tiles or max_tiles
        grids = sorted(((w, h) for w in range(1, most + 1) for h in range(1, most // w + 1)), key=lambda grid: grid[0] * grid[1])
        best, least = (1, 1), math.inf
        for grid in grids:
            off = abs(width / height - grid[0] / grid[1])
            if off < least or (off == least and width * height > 0.5 * side * side * grid[0] * grid[1]):
                best, least = grid, off
        return best[0] * side, best[1] * side

    return rule


def fitted(canvases: Iterable[tuple[int, int]]) -> SizeRule:
    """Return the rule of AnyRes (LLaVA-OneVision, DeepSeek-VL2): the canvas that keeps most pixels and wastes least; aspect kept."""
    choices = tuple(canvases)

    def rule(width: int, height: int, limits: Limits) -> tuple[int, int]:
        def worth(canvas: tuple[int, int]) -> tuple[int, int]:
            scale = min(canvas[0] / width, canvas[1] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - canvas[0] * canvas[1]

        across, down = max(choices, key=worth)
        if across / width < down / height:
            return across, min(math.ceil(height * across / width), down)
        return min(math.ceil(width * down / height), across), down

    return rule


def longest_then_tiles(side: int, tile: int, bound: int = 4096) -> SizeRule:
    """Return the rule of Idefics3 and SmolVLM: the longer side becomes `side`, then both are squashed up to whole tiles."""

    def rule(width: int, height: int, limits: Limits) -> tuple[int, int]:
        long, short = max(width, height), min(width, height)
        aspect = long / short
        new_long = limits.side or side
        new_short = int(new_long / aspect)
        new_short += new_short % 2
        if new_long > bound:
            new_long, new_short = bound, int(bound / aspect)
        new_aspect = new_long / max(1, new_short)
        whole_long = math.ceil(new_long / tile) * tile
        whole_short = max(1, math.ceil(int(whole_long / new_aspect) / tile)) * tile
        return (whole_long, whole_short) if width >= height else (whole_short, whole_long)

    return rule


def patch_budget(patch: int, pool: int, tokens: int) -> SizeRule:
    """Return the rule of Gemma 4: the largest size of about the same aspect whose pooled patches fit a budget of tokens.

    `Limits.max_pixels` replaces the budget.
    """
    unit = patch * pool

    def rule(width: int, height: int, limits: Limits) -> tuple[int, int]:
        area = limits.max_pixels or tokens * unit * unit
        scale, most = math.sqrt(area / (width * height)), area // unit**2
        across, down = math.floor(width * scale / unit), math.floor(height * scale / unit)
        if down == 0:
            across, down = min(width // height, most), 1
        elif across == 0:
            across, down = 1, min(height // width, most)
        return across * unit, down * unit

    return rule


def short_side(box: int, short: int) -> SizeRule:
    """Return the rule of GPT-4o: fitted in a square of `box`, then the shorter side brought down to `short`; never enlarged."""

    def rule(width: int, height: int, limits: Limits) -> tuple[int, int]:
        scale = min(1.0, (limits.side or box) / max(width, height))
        scale = min(scale, short / min(width, height))
        return max(1, round(width * scale)), max(1, round(height * scale))

    return rule


def token_budget(side: int, patch: int, tokens: int) -> SizeRule:
    """Return the rule of Claude: aspect kept, at most `side` long and `tokens` patches; never enlarged.

    `Limits.side` and `Limits.max_pixels` replace the two limits.
    """

    def rule(width: int, height: int, limits: Limits) -> tuple[int, int]:
        most = (limits.max_pixels or tokens * patch * patch) // (patch * patch)
        scale = min(1.0, (limits.side or side) / max(width, height))

        def size() -> tuple[int, int]:
            return max(1, round(width * scale)), max(1, round(height * scale))

        while math.ceil(size()[0] / patch) * math.ceil(size()[1] / patch) > most and max(size()) > 1:
            scale *= 0.999
        return size()

    return rule
