"""What the page asks of a model: open a picture, ground expressions in it, describe a set of its objects. Runs in the worker's thread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from grex_mllm.dialogue.session import SAME, Dialogue
from grex_mllm.errors import fault
from grex_mllm.models.describe import SURE, UNSURE, masks_in_boxes, other_objects
from grex_mllm.models.grex import GrexModel
from grex_mllm.ops.masks import encode_rle, mask_to_box_xyxy
from grex_mllm.ops.selection import selection_masks
from grex_mllm.serve.held import Held, Pictures, new_name
from grex_mllm.serve.pictures import Picture, read_picture
from grex_mllm.types import MORE_THAN_FIVE, Grounding
from grex_mllm.zeroshot.base import Picture as Shown
from grex_mllm.zeroshot.segmenters import Prompted

DIALOGUES = 4  # of a picture; another history is said again


@dataclass(frozen=True)
class Selection:
    """objects: positions among the picture's proposed objects.  boxes_xyxy, points_xy: drawn and clicked ones, in pixels."""

    objects: tuple[int, ...]
    boxes_xyxy: tuple[tuple[float, float, float, float], ...] = ()
    points_xy: tuple[tuple[float, float], ...] = ()

    @property
    def drawn(self) -> bool:
        return bool(self.boxes_xyxy or self.points_xy)


class Engine:
    """One model and the pictures that it has encoded. segmenter: finds the object under a click, and in a box, where the model does not."""

    def __init__(self, model: GrexModel, held: Pictures, segmenter: Prompted | None = None) -> None:
        self.model, self.held, self.segmenter = model, held, segmenter

    @property
    def describes(self) -> bool:
        return self.model.generator is not None

    def open_upload(self, data: bytes) -> Held:
        """Read, encode and hold an uploaded picture."""
        return self.open(read_picture(data), new_name())

    @torch.inference_mode()
    def open(self, picture: Picture, name: str) -> Held:
        """Encode a picture, find its objects, and hold it under a name."""
        encoded = self.model.encode(picture.pixels)
        talk = Dialogue(self.model, encoded)
        # those of a conversation, so that what it selects can be clicked; then less sure ones
        objects = np.concatenate([talk.objects, other_objects(self.model, encoded, talk.objects, UNSURE, below=SURE)])
        boxes = [mask_to_box_xyxy(mask) for mask in objects]
        held = Held(name, encoded, talk, picture.pixels, objects, boxes, picture.given, talk.proposes)
        self.held.add(held)
        return held

    def ground(self, picture: Held, asked: list[list[str]], threshold: float | None) -> list[list[dict[str, Any]]]:
        """Ground the expressions of one or several requests about a picture in one pass; equal ones are grounded once."""
        texts = list(dict.fromkeys(text for expressions in asked for text in expressions))
        answers = self.model.ground(picture.encoded, texts, threshold=threshold)
        found = {result.expression: {**shown(result), "objects": self._members(picture, result, threshold)} for result in answers}
        return [[found[text] for text in expressions] for expressions in asked]

    @torch.inference_mode()
    def follow(
        self, picture: Held, asked: list[tuple[list[str], list[str]]], threshold: float | None, selected: Selection | None = None
    ) -> list[list[dict[str, Any]]]:
        """Answer requests that are pairs of a history and expressions: each expression comes next after what was said in its history.

        selected: the objects that were selected before anything was said.

        Raises:
            GrexError: a wrong selection, as for `describe`.
        """
        answers = []
        for history, expressions in asked:
            before = self._after(picture, selected, tuple(history), threshold)
            rows = []
            for text in expressions:
                turn = before.fork()
                result = turn.say(text)
                rows.append({**shown(result), "operation": turn.operation, "objects": positions(picture, turn.selected)})
            answers.append(rows)
        return answers

    def _members(self, picture: Held, result: Grounding, threshold: float | None) -> list[int]:
        """Return the positions of the picture's objects that a follow-up of an answer would refer to."""
        if not len(picture.objects):
            return []
        turn = self._after(picture, None, (), threshold).fork()
        turn.take(result)
        return positions(picture, turn.selected)

    def _after(self, picture: Held, selected: Selection | None, history: tuple[str, ...], threshold: float | None) -> Dialogue:
        """Return the session after a selection and a history, going on from what is held; it must be forked before anything is said."""
        held, key = picture.dialogues, (threshold, selected, history)
        found = held.get(key)
        if found is None:
            if history:
                found = self._after(picture, selected, history[:-1], threshold).fork()
                found.say(history[-1])
            elif selected is not None:
                found = self._after(picture, None, (), threshold).fork()
                found.select(self._chosen_masks(picture, selected))
            else:
                found = picture.talk.fork()
                found.threshold = threshold
            held[key] = found
            if selected is not None and selected.drawn:  # it has masks of its own, as large as the picture: of one such set alone
                for other in [at for at in held if at[1] is not None and at[1].drawn and at[1] != selected]:
                    del held[other]
        held.move_to_end(key)
        while len(held) > DIALOGUES:
            held.popitem(last=False)
        return found

    @torch.inference_mode()
    def describe(self, picture: Held, chosen: Selection, candidates: int) -> dict[str, Any]:
        """Write one expression for a set of objects, with so many candidates and how well each leads back to the set.

        Raises:
            GrexError: nothing chosen, an object that is not there, a box or point outside the picture, a point without an object, or a
                model without a generator.
        """
        if not self.describes:
            raise fault("a model without a generator", "one trained with model.generator", "serve another model, or only ground")
        masks = self._chosen_masks(picture, chosen)
        options = {"candidates": candidates, "rerank": self.model.config.predict.rerank} if candidates > 1 else {}
        written = self.model.describe(picture.encoded, masks=masks, details=True, **options)
        texts = [text for text, _ in written.candidates] or [written.expression]
        texts = [text for text in texts if text.strip()]
        union = np.any(masks, axis=0)
        back = self.model.ground(picture.encoded, texts) if texts else []
        lines = [
            {"expression": text, "score": _rounded(dict(written.candidates).get(text)), "iou": round(overlap(result.mask, union), 4)}
            for text, result in zip(texts, back, strict=True)
        ]
        return {
            "expression": written.expression,
            "candidates": lines,
            "masks_rle": [encode_rle(mask) for mask in masks],
            "boxes_xyxy": [mask_to_box_xyxy(mask) for mask in masks],
        }

    def _chosen_masks(self, picture: Held, chosen: Selection) -> np.ndarray:
        height, width = picture.pixels.shape[:2]
        wrong = [n for n in chosen.objects if not 0 <= n < len(picture.objects)]
        if wrong:
            raise fault(f"object {wrong[0]}", f"one of the {len(picture.objects)} proposed objects", "choose from the picture's objects")
        if not chosen.objects and not chosen.boxes_xyxy and not chosen.points_xy:
            raise fault("no object", "at least one object, box or point", "click an object, or draw a box")
        parts = [picture.objects[list(dict.fromkeys(chosen.objects))]]
        if chosen.boxes_xyxy:
            full = selection_masks(height, width, None, [list(box) for box in chosen.boxes_xyxy]).numpy()
            parts.append(self._in_boxes(picture, full, np.asarray(chosen.boxes_xyxy, np.float64)))
        parts += [self._at_point(picture, point)[None] for point in dict.fromkeys(chosen.points_xy)]
        return np.concatenate(parts)

    def _in_boxes(self, picture: Held, full: np.ndarray, boxes_xyxy: np.ndarray) -> np.ndarray:
        """Return the object in each box: one that the model proposes, else the segmenter's, else the box itself."""
        found = masks_in_boxes(self.model, picture.encoded, full)
        open_ones = [n for n in range(len(full)) if (found[n] == full[n]).all()]
        if self.segmenter is not None and open_ones:
            for n, mask in zip(open_ones, self.segmenter.masks(Shown(picture.pixels), boxes_xyxy[open_ones]), strict=True):
                found[n] = mask if mask.any() else full[n]
        return found

    def _at_point(self, picture: Held, point: tuple[float, float]) -> np.ndarray:
        """Return the object under a point: the smallest that the model proposes there, else the segmenter's."""
        (x, y), (height, width) = point, picture.pixels.shape[:2]
        if not (0 <= x < width and 0 <= y < height):
            raise fault(f"point {x:g}, {y:g}", f"0 <= x < {width} and 0 <= y < {height}", "click into the picture")
        proposed = [mask for mask in picture.objects if mask[int(y), int(x)]]
        if proposed:
            return np.asarray(min(proposed, key=lambda mask: int(mask.sum())))
        if self.segmenter is None:
            given = f"point {x:g}, {y:g}, where the model proposes no object"
            raise fault(given, "one on an object, or a server with --segmenter", "draw a box around the object")
        mask = self.segmenter.masks(Shown(picture.pixels), np.asarray([[x, y]], np.float64))[0]
        if not mask.any():
            raise fault(f"point {x:g}, {y:g}, where the segmenter finds nothing", "one on an object", "click elsewhere, or draw a box")
        return np.asarray(mask)


def shown(result: Grounding) -> dict[str, Any]:
    """Return a grounding as JSON holds it."""
    several = result.count is not None and result.count >= MORE_THAN_FIVE
    return {
        "expression": result.expression,
        "no_target": result.no_target,
        "no_target_prob": round(result.no_target_prob, 4),
        "count": "more than 5" if several else result.count,
        "boxes_xyxy": None if result.boxes_xyxy is None else np.round(result.boxes_xyxy.astype(float), 1).tolist(),
        "box_scores": None if result.box_scores is None else np.round(result.box_scores.astype(float), 4).tolist(),
        "mask_pixels": int(result.mask.sum()),
        "mask_rle": encode_rle(result.mask),
    }


def positions(picture: Held, masks: np.ndarray) -> list[int]:
    """Return the positions of the picture's objects that masks bool [n, H, W] show; what is none of them is left out."""
    found = set()
    for mask in masks:
        x1, y1, x2, y2 = mask_to_box_xyxy(mask)
        near = [n for n, box in enumerate(picture.boxes_xyxy) if box[0] < x2 and x1 < box[2] and box[1] < y2 and y1 < box[3]]
        overlaps = {n: overlap(mask, picture.objects[n]) for n in near}
        best = max(overlaps, key=lambda n: overlaps[n], default=None)
        if best is not None and overlaps[best] >= SAME:
            found.add(best)
    return sorted(found)


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Return the intersection over union of two masks; 1 where both are empty."""
    union = np.count_nonzero(first | second)
    return np.count_nonzero(first & second) / union if union else 1.0


def _rounded(value: float | None) -> float | None:
    return None if value is None or value != value else round(float(value), 4)
