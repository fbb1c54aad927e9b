"""Sets of objects from sets of objects: the best of those that fit, an order among them, neighbours. Positions and numbers, no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grex_mllm.dialogue.phrases import LARGEST, SMALLEST, Phrase
from grex_mllm.ops.nearness import NEAR, by_nearness, gaps, leads

FITS, MAY_FIT = 0.5, 0.15  # least probability of an object that fits, and of the best one where a stated number is wanted


def fitting(scores: np.ndarray, among: Sequence[int], number: int | None) -> list[int]:
    """Return those that fit, in the order given: all from FITS on, or the `number` best ones that may fit at all.

    scores: float [N] in [0, 1].  among: the positions to choose from.
    """
    if number is None:
        return [n for n in among if scores[n] >= FITS]
    best = sorted((n for n in among if scores[n] >= MAY_FIT), key=lambda n: -scores[n])[:number]
    return [n for n in among if n in best]


def chosen_by(phrase: Phrase, scores: np.ndarray, among: Sequence[int], boxes: np.ndarray, areas: np.ndarray) -> list[int]:
    """Return what a phrase means among some objects: those that fit, and of these the ones that its order names.

    boxes: float [N, 4] xyxy.  areas: float [N].
    """
    if phrase.order is None:
        return fitting(scores, among, phrase.number)
    name, rank = phrase.order
    members = fitting(scores, among, None) or fitting(scores, among, rank)
    keys = {
        LARGEST: -areas,
        SMALLEST: areas,
        "left": boxes[:, 0] + boxes[:, 2],
        "right": -(boxes[:, 0] + boxes[:, 2]),
        "top": boxes[:, 1] + boxes[:, 3],
        "bottom": -(boxes[:, 1] + boxes[:, 3]),
    }
    ranked = sorted(members, key=lambda n: keys[name][n])
    number = phrase.number or 1
    return sorted(ranked[rank - 1 : rank - 1 + number])


def neighbours(
    boxes: np.ndarray, selected: Sequence[int], candidates: Sequence[int], side: str, number: int | None, extent: float
) -> list[int]:
    """Return the nearest candidates beside the selected objects: `number` of them, or for None all within NEAR, at least one.

    side: left, right, top or bottom of all of them, "" for any; of a side, None is all that lie there.  extent: the image's longer side.
    """
    if not len(selected):
        return []
    if side:
        lead = leads(boxes, selected, side)
        candidates = [n for n in candidates if lead[n] > 0]
    ranked = by_nearness(boxes, selected, candidates)
    if number is not None:
        return sorted(ranked[:number])
    if side:
        return sorted(ranked)
    gap = gaps(boxes, selected)
    return sorted(ranked[: max(1, sum(bool(gap[n] <= NEAR * extent) for n in ranked))])
