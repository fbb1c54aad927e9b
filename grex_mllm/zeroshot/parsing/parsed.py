"""What comes out of a raw answer."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from grex_mllm.zeroshot.parsing.pictures import MaskPicture


def _empty(columns: int) -> np.ndarray:
    return np.zeros((0, columns))


@dataclass(eq=False)
class Parsed:
    """A grounding answer as it was understood.

    status: ok, unparsable, refused or error.  reason: why it is not ok.  no_target: the model says that nothing matches; only with ok.
    boxes_xyxy: float64 [N, 4], points: [N, 2], polygons: N arrays [P, 2]; pixels of the original, inside the image. Polygons come with
    their bounds in `boxes_xyxy`.  masks: one for each box where masks were asked for, None where it has none.
    flags: what was mended or noticed on the way, see `FLAGS`.
    """

    status: str
    reason: str = ""
    no_target: bool = False
    boxes_xyxy: np.ndarray = field(default_factory=lambda: _empty(4))
    points: np.ndarray = field(default_factory=lambda: _empty(2))
    polygons: list[np.ndarray] = field(default_factory=list)
    masks: list[MaskPicture | None] = field(default_factory=list)
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class ParsedExpression:
    """A generated expression. text: "" unless status is ok.  status, reason, flags: as in `Parsed`."""

    text: str
    status: str
    reason: str = ""
    flags: tuple[str, ...] = ()
