"""What a family of multimodal language models is: how it writes coordinates, and of which picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from grex_mllm.zeroshot.base import View

ANSWERS = ("boxes", "points", "polygons", "masks")
Write = Callable[[np.ndarray, View, str], str]
WriteMasks = Callable[[Sequence[np.ndarray], str], str]
WritePolygons = Callable[[Sequence[np.ndarray], View, str], str]


@dataclass(frozen=True)
class Limits:
    """What a server or checkpoint sets for the size of pictures; None = as the family's authors release it.

    min_pixels, max_pixels: area of the picture.  max_tiles: of families that cut tiles.  side: of families with one square, and the longest
    side of those that have one.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    max_tiles: int | None = None
    side: int | None = None


RELEASED = Limits()


def original_size(width: int, height: int, limits: Limits = RELEASED) -> tuple[int, int]:
    """Return the size unchanged: the family's numbers are fractions of the original, or its server does not resize."""
    return width, height


@dataclass(frozen=True)
class Family:
    """A family. Functions get boxes [N, 4] xyxy, points [N, 2] or polygons (a list of [P, 2]), in pixels of the original, and its View.

    frame, order: of `FRAMES` and `ORDERS` in `ops/frames.py`; of its answers and of coordinates in a prompt.
    patterns: regular expressions, found in lower-case names of models that belong to it; the longest match of all families wins.
    write: boxes, with a label, as the family answers them (few-shot examples, tests).  write_nothing: its answer where nothing matches.
    write_masks: masks bool [H, W] of the original, of families that answer with pictures of them.
    mention: boxes as text within a prompt.  formats: kind of answer -> sentence that asks for it, for prompts that serve every family.
    sent: size of the picture that the model sees, without padding; of an original (width, height) under `Limits`.
    model_types: of its models in transformers (`config.model_type`).
    lacks: task -> why its models cannot do it, of families that are asked by task words instead of chats; a server may know more.
    answer: what it answers with, of ANSWERS.  empty_answer: what an answer without text means: "unparsable" or "no_target".
    """

    name: str
    frame: str
    order: str
    patterns: tuple[str, ...]
    write: Write
    write_nothing: Callable[[], str]
    mention: Callable[[np.ndarray, View], str]
    formats: Mapping[str, str]
    sent: Callable[[int, int, Limits], tuple[int, int]] = original_size
    write_points: Write | None = None
    write_polygons: WritePolygons | None = None
    write_masks: WriteMasks | None = None
    answer: str = "boxes"
    empty_answer: str = "unparsable"
    limits: Limits = field(default=RELEASED)
    lacks: Mapping[str, str] = field(default_factory=dict)
    model_types: tuple[str, ...] = ()

    def view(self, width: int, height: int, sent: tuple[int, int] | None = None, limits: Limits | None = None) -> View:
        """Return the View of an original; sent: size that a backend reports, None = by the family's own rule."""
        return View(width, height, *(sent or self.sent(width, height, limits or self.limits)))
