"""From a raw answer to boxes, points or polygons, with a status for every answer; no rule looks at the ground truth.

The rules, in order, with their letters. A: a refusal by the protocol. B: reasoning and end tokens are taken out. C: an empty answer. D:
where the objects stand (`payload`). E: repairs (`values`). F: of a truncated answer the complete objects count. G: keys and lists
(`items`). H to L: frame, corners, edges, the same box twice, at most 100 (`geometry`). M: good objects count beside faulty ones; faulty
ones alone make an answer unparsable. N: ways to say that there is nothing. O: JSON, tags and tokens beat prose; a denial in prose beats
loose numbers. P: a refusal in words. Q: points where boxes were asked are unparsable, of a polygon the bounds count. R: scores are not
read. S: numbers in prose are boxes in groups of exactly four only.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from grex_mllm.zeroshot.base import RawAnswer, View
from grex_mllm.zeroshot.parsing.clean import Cleaned, clean
from grex_mllm.zeroshot.parsing.geometry import all_zero, bounds, boxes_in, frame_of, points_in, polygons_in
from grex_mllm.zeroshot.parsing.items import Found, Item
from grex_mllm.zeroshot.parsing.parsed import Parsed
from grex_mllm.zeroshot.parsing.payload import Payload, read_payload
from grex_mllm.zeroshot.parsing.pictures import MaskPicture, read_mask, take_out
from grex_mllm.zeroshot.parsing.values import Number
from grex_mllm.zeroshot.parsing.words import denies, refuses, says_none

FLAGS = {
    "thinking": "reasoning was dropped",
    "truncated": "the answer was cut off; its complete objects count",
    "faulty": "objects that could not be read stood beside good ones",
    "unit": "fractions where the frame has none",
    "percent": "per cent where the frame has none",
    "swapped": "corners in the wrong order",
    "clipped": "a box or polygon went over the edge",
    "duplicates": "the same object again",
    "many": "more than 100 objects",
    "closest": "numbers beside a denial were not read",
    "bounds": "bounds of polygons taken as boxes",
    "rectangles": "boxes taken as polygons",
    "no_mask": "a box without a mask that can be read, where masks were asked for",
    "empty": "an answer without text was declared to mean no target",
}


def parse_grounding(
    raw: RawAnswer, *, frame: str, order: str, answer: str = "boxes", empty_answer: str = "unparsable", view: View
) -> Parsed:
    """Return what a raw answer says; every kind of bad answer gets a status, never an exception.

    frame, order: as the prompt declares them.  answer: what was asked for, of ANSWERS.  empty_answer: what no text at all means,
    "unparsable" or "no_target".  view: of the picture; a sent size in the raw answer replaces its own.
    """
    refused = refusal_of(raw)
    if refused is not None:
        return refused
    if raw.sent is not None and min(raw.sent) > 0:
        view = replace(view, sent_width=raw.sent[0], sent_height=raw.sent[1])
    told, pictures = take_out(raw.text or "") if answer == "masks" else (raw.text or "", [])
    text = clean(told)
    flags = ("thinking",) if text.thinking else ()
    if text.unclosed:
        return Parsed("unparsable", "the answer's reasoning never ends", flags=flags)
    if not text.strip():
        if empty_answer == "no_target" and raw.finish == "stop":
            return Parsed("ok", no_target=True, flags=(*flags, "empty"))
        return Parsed("unparsable", "an empty answer", flags=flags)
    payload = read_payload(text, "boxes" if answer == "masks" else answer, frame)
    parsed = _decide(payload, text, answer, frame, order, view)
    if answer == "masks" and parsed.status == "ok":
        parsed = _with_masks(parsed, pictures)
    cut = raw.finish == "length" or text.cut or (parsed.status == "ok" and payload.found.cut > 0)
    return replace(parsed, flags=(*flags, *(("truncated",) if cut else ()), *parsed.flags))


def refusal_of(raw: RawAnswer) -> Parsed | None:
    """Return the parse of an answer that did not come, or that the protocol marks as refused (rule A); None for all others."""
    if raw.finish == "error" or raw.error:
        return Parsed("error", raw.error or "the model gave no answer")
    if raw.refusal or raw.finish in ("content_filter", "refusal"):
        return Parsed("refused", f"refused by the protocol: {(raw.refusal or raw.finish)[:200]}")
    return None


def _decide(payload: Payload, text: Cleaned, answer: str, frame: str, order: str, view: View) -> Parsed:
    found = payload.found
    if payload.loose and denies(payload.prose if found.boxes else text, loose=bool(found.boxes)):
        return Parsed("ok", no_target=True, flags=("closest",) if found.objects else ())
    if found.objects:
        return _objects(found, answer, frame, order, view)
    if found.nothing and not found.faulty and not found.cut:
        return Parsed("ok", no_target=True)
    if payload.loose or not (found.faulty or found.cut):
        if says_none(text) or denies(text):
            return Parsed("ok", no_target=True)
        if refuses(text):
            return Parsed("refused", "refused in words")
    if found.cut:
        return Parsed("unparsable", "cut off before its first object was complete")
    return Parsed("unparsable", "no object could be read" if found.faulty else "neither objects nor a denial")


def _objects(found: Found, answer: str, frame: str, order: str, view: View) -> Parsed:
    """Return the objects of the asked kind that are good."""
    frame, flags = frame_of(found, frame)
    if all_zero(found.boxes) and not found.polygons:
        return Parsed("ok", no_target=True)
    faulty = found.faulty
    boxes, points = np.zeros((0, 4)), np.zeros((0, 2))
    polygons: list[np.ndarray] = []
    numbers: list[tuple[int | None, np.ndarray]] = []
    if answer == "points":
        if not found.points:
            return Parsed("unparsable", f"{'boxes' if found.boxes else 'polygons'} where points were asked for")
        points, wrong, more = points_in(found.points, frame, order, view)
    elif answer == "polygons" or (found.polygons and not found.boxes):
        items = found.polygons or [_outline(item) for item in found.boxes]
        if not items:
            return Parsed("unparsable", "points where polygons were asked for")
        polygons, wrong, more = polygons_in(items, frame, order, view)
        boxes = bounds(polygons)
        more = (*more, "bounds") if answer in ("boxes", "masks") else (*more, *(() if found.polygons else ("rectangles",)))
    else:
        if not found.boxes:
            return Parsed("unparsable", "points where boxes were asked for")
        boxes, wrong, more, whole = boxes_in(found.boxes, frame, order, view)
        numbers = [(item.picture, box) for item, box in whole]
    if not len(boxes) + len(points):
        return Parsed("unparsable", "no object lies inside the picture and has an area" if wrong else "no object could be read")
    flags = (*flags, *more, *(("faulty",) if faulty + wrong else ()))
    return _Numbered("ok", boxes_xyxy=boxes, points=points, polygons=polygons, flags=flags, numbers=numbers)


@dataclass(eq=False)
class _Numbered(Parsed):
    """numbers: for each box the number of its picture, and the whole box, as it was answered."""

    numbers: list[tuple[int | None, np.ndarray]] = field(default_factory=list)


def _with_masks(parsed: Parsed, pictures: list[str]) -> Parsed:
    """Return the answer with the mask of each box that has one; those without are flagged."""
    numbers = parsed.numbers if isinstance(parsed, _Numbered) else []
    values = [read_mask(pictures[n]) if n is not None and n < len(pictures) else None for n, _ in numbers]
    masks = [None if one is None else MaskPicture(box, one) for one, (_, box) in zip(values, numbers, strict=True)]
    masks += [None] * (len(parsed.boxes_xyxy) - len(masks))
    flags = (*parsed.flags, *(("no_mask",) if None in masks else ()))
    return Parsed("ok", no_target=parsed.no_target, boxes_xyxy=parsed.boxes_xyxy, polygons=parsed.polygons, masks=masks, flags=flags)


def _outline(item: Item) -> Item:
    """Return the four corners of a box as a polygon, in the order and frame of the box."""
    a, b, c, d = item.numbers
    if item.order in ("xywh", "cxcywh"):
        x, y, w, h = (n.value for n in item.numbers)
        left, top = (x - w / 2, y - h / 2) if item.order == "cxcywh" else (x, y)
        a, b, c, d = (Number(value, n.fraction, n.percent) for n, value in zip(item.numbers, (left, top, left + w, top + h)))
        return Item([a, b, c, b, c, d, a, d], "xyxy", item.frame)
    return Item([a, b, c, b, c, d, a, d], item.order, item.frame)
