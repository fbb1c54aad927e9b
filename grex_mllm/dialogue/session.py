"""A session about one image: it keeps the selected objects, and follow-ups refer to them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np

from grex_mllm.data.history import has_history, joined
from grex_mllm.data.images import load_image
from grex_mllm.dialogue.composition import chosen_by, fitting, neighbours
from grex_mllm.dialogue.follow_ups import COMPLEMENT, DIFFERENCE, NEIGHBOUR, NEW, RESTRICTION, UNION, FollowUp, parse_follow_up
from grex_mllm.dialogue.objects import ask, overlaps, pieces, proposed
from grex_mllm.dialogue.phrases import LARGEST, SMALLEST, Phrase, addressed, kind_of, read_phrase
from grex_mllm.errors import fault
from grex_mllm.models.answer import EncodedImage, check_rules
from grex_mllm.models.grex import GrexModel, check_expression
from grex_mllm.ops.masks import mask_to_box_xyxy
from grex_mllm.ops.selection import selection_masks
from grex_mllm.types import MORE_THAN_FIVE, Grounding

COMPOSE, MODEL = RESOLVERS = ("compose", "model")
SAME = 0.5  # mask IoU from which two masks are one object
LEAST_LEFT = 0.15  # of a mask that is cut: less is its edge
EVERYTHING = ("all objects", "everything")


class Dialogue:
    """Say expressions and follow-ups about one image: `.say("the two people")`, `.say("and the dog too")`, `.selected`, `.clear()`.

    image: path, PIL image, numpy uint8 [H, W, 3], tensor, or an `EncodedImage`.  threshold: as in `GrexModel.ground`.
    resolve: "compose" puts follow-ups together from sets of objects; "model" gives the text encoder the earlier expressions, for models
    that were trained so (`data.train: dialogue`).
    An answer to a new expression is the model's own. Its instances, of which follow-ups are composed, are the decoder's proposals; of a
    decoder without any, connected pieces of masks, and then sets are cut pixel by pixel.

    Raises:
        GrexError: an unreadable image, a threshold outside [0, 1], or `resolve="model"` with a model that never saw a history.
    """

    def __init__(self, model: GrexModel, image: Any, *, threshold: float | None = None, resolve: str = COMPOSE) -> None:
        if resolve not in RESOLVERS:
            raise fault(f'resolve "{resolve}"', f"one of {', '.join(RESOLVERS)}", "choose one of them")
        if resolve == MODEL and not has_history(model.config.data):
            raise fault('resolve "model" with a model that was not trained on dialogues', "data.train: dialogue", 'use resolve="compose"')
        if threshold is not None:
            check_rules(replace(model.config.predict, no_target_threshold=threshold))
        self.model, self.threshold, self.resolve = model, threshold, resolve
        self.encoded = image if isinstance(image, EncodedImage) else model.encode(load_image(image))
        found = proposed(model, self.encoded)
        self._size = (self.encoded.geometry.height, self.encoded.geometry.width)
        self.proposes = found is not None
        self._objects = np.zeros((0, *self._size), bool) if found is None else found
        self._own = len(self._objects)  # those after the first `_own` came with a selection
        self.clear()

    def clear(self) -> None:
        """Forget what was selected and said."""
        self._chosen: list[int] = []
        self._kind: str | None = None
        self.history: list[str] = []
        self.operation = NEW
        self._objects = self._objects[: self._own]

    def fork(self) -> Dialogue:
        """Return a session that goes on from here by itself; the image and the model are shared."""
        other = copy(self)
        other._chosen, other.history = list(self._chosen), list(self.history)
        return other

    @property
    def objects(self) -> np.ndarray:
        """The objects that the session knows, bool [N, H0, W0]: the decoder's proposals, and others that were selected."""
        return self._objects

    @property
    def selected(self) -> np.ndarray:
        """The selected objects, bool [n, H0, W0]."""
        return self._objects[self._chosen]

    def select(self, masks: Any = None, boxes_xyxy: Any = None, kind: str | None = None) -> None:
        """Take a set of objects as selected, as if clicked: masks or boxes at the image's size. kind: what they are ("circles").

        Raises:
            GrexError: nothing given, both given, a mask of another size, or a box outside the image.
        """
        given = selection_masks(*self._size, masks, boxes_xyxy).numpy()
        self._chosen, self._kind = self._known(given), kind

    def say(self, text: str) -> Grounding:
        """Answer an expression or a follow-up, and select what it means. `.operation` then tells how it was understood.

        Raises:
            GrexError: an empty text, or one over 1,000 characters.
        """
        check_expression(text)
        asked = parse_follow_up(text) if len(self._chosen) or self.history else FollowUp(NEW, text)
        if asked.operation == NEW:
            result = self._new(text)
        elif self.resolve == MODEL:
            result = self._by_history(text)
        else:
            self._chosen = self._follow(asked)
            result = self._grounding(text, self._chosen)
        self.operation = asked.operation
        self.history = [text] if asked.operation == NEW else [*self.history, text]
        return result

    def take(self, result: Grounding) -> None:
        """Select what the model's own answer to an expression means, as `say` does with a new one."""
        self._kind = kind_of(result.expression)
        self._chosen = self._instances(result)
        self.history, self.operation = [result.expression], NEW

    def _new(self, text: str) -> Grounding:
        result = self._ask([text])[0][0]
        self.take(result)
        return result

    def _by_history(self, text: str) -> Grounding:
        limit = self.model.config.model.text.max_tokens
        asked = joined([*self.history, text], lambda turns: bool(self.model.text_tokenizer.too_long([turns], limit)))
        result = self._ask([asked])[0][0]
        result.expression = text
        self._chosen = self._instances(result)
        return result

    def _follow(self, asked: FollowUp) -> list[int]:
        """Return the positions of the objects that a follow-up means, and keep what kind they are."""
        if asked.operation == UNION:
            before, kind = self._chosen, self._kind
            added = self._follow(asked.inner) if asked.inner is not None else self._addition(asked.rest)
            self._kind = kind if asked.inner is None and kind_of(addressed(asked.rest, kind)) == kind else None
            return sorted({*before, *added})
        phrase = read_phrase(asked.rest, self._kind) if asked.rest else Phrase(())
        named = kind_of(asked.rest) if asked.rest else None
        if asked.operation in (DIFFERENCE, RESTRICTION):
            if asked.operation == RESTRICTION:
                self._kind = named or self._kind
            return self._part_of(phrase, keep=asked.operation == RESTRICTION)
        others = self._others(phrase)
        scores = self._scores(phrase)
        if asked.operation == COMPLEMENT:
            self._kind = named
            return chosen_by(phrase, scores, others, self._boxes(), self._areas())
        assert asked.operation == NEIGHBOUR
        self._kind = named or (self._kind if phrase.texts else None)
        candidates = fitting(scores, others, None)
        if phrase.number == 1 and not candidates:
            candidates = fitting(scores, others, 1)
        return neighbours(self._boxes(), self._chosen, candidates, asked.side, phrase.number, max(self._size))

    def _addition(self, rest: str) -> list[int]:
        """Return what "and the dog too" adds: an expression of its own, of which as many objects are taken as it says."""
        phrase, text = read_phrase(rest, self._kind), addressed(rest, self._kind)
        found, scores = self._ask([text, *phrase.texts])
        if np.mean([result.no_target for result in found]) > SAME:
            return []
        if not self.proposes:
            return self._known(pieces(found[0].mask & ~np.any(self.selected, axis=0)))
        everything = range(len(self._objects))
        if phrase.order is None:
            return fitting(scores.mean(0), everything, phrase.number) or self._instances(found[0])
        if phrase.order[0] in (LARGEST, SMALLEST):  # what lies behind another object looks smaller: left to the model
            return fitting(scores[0], everything, phrase.number)
        members = scores[1:].mean(0) if phrase.texts else np.ones(len(self._objects))
        return chosen_by(phrase, members, everything, self._boxes(), self._areas())

    def _part_of(self, phrase: Phrase, keep: bool) -> list[int]:
        """Return the selected objects that a phrase means, or the others of them."""
        if not self.proposes and phrase.order is None and phrase.texts:
            return self._cut(phrase, keep)
        meant = chosen_by(phrase, self._scores(phrase), self._chosen, self._boxes(), self._areas())
        return [n for n in self._chosen if (n in meant) == keep]

    def _cut(self, phrase: Phrase, keep: bool) -> list[int]:
        """Cut the selected masks by the answer for a phrase, pixel by pixel, and return the pieces."""
        fits = np.mean([result.mask for result in self._ask(phrase.texts)[0]], axis=0) >= SAME
        parts = [pieces(mask & (fits if keep else ~fits)) for mask in self.selected]
        left = [part for own, mask in zip(parts, self.selected, strict=True) for part in own if part.sum() >= LEAST_LEFT * mask.sum()]
        return self._known(np.stack(left)) if left else []

    def _others(self, phrase: Phrase) -> list[int]:
        """Return the positions of the objects beside the selected ones; a decoder without proposals is asked for them."""
        if self.proposes:
            return [n for n in range(len(self._objects)) if n not in self._chosen]
        answers = np.stack([result.mask for result in self._ask(phrase.texts or EVERYTHING)[0]])
        return self._known(pieces((np.mean(answers, axis=0) >= SAME) & ~np.any(self.selected, axis=0)))

    def _scores(self, phrase: Phrase) -> np.ndarray:
        """Return float [N]: how surely each known object fits a phrase; 1 where it says nothing of its own."""
        return self._ask(phrase.texts)[1].mean(0) if phrase.texts and len(self._objects) else np.ones(len(self._objects))

    def _boxes(self) -> np.ndarray:
        return np.array([mask_to_box_xyxy(mask) for mask in self._objects]).reshape(-1, 4)

    def _areas(self) -> np.ndarray:
        return np.array([np.count_nonzero(mask) for mask in self._objects], float)  # far faster than sum((1, 2))

    def _grounding(self, text: str, chosen: list[int]) -> Grounding:
        """Return a composed set as an answer. It has no doubt of its own: the probability of "no target" is 0 or 1."""
        boxes = self._boxes()[chosen].astype(np.float32)
        count = min(len(chosen), MORE_THAN_FIVE)
        mask = np.any(self._objects[chosen], axis=0)
        nothing = not chosen
        found = Grounding(text, mask, None, boxes, np.ones(len(chosen), np.float32), count, nothing, float(nothing))
        found.image = self.encoded.original
        return found

    def _ask(self, texts: Sequence[str]) -> tuple[list[Grounding], np.ndarray]:
        return ask(self.model, self.encoded, texts, self._objects, self.threshold)

    def _instances(self, result: Grounding) -> list[int]:
        """Return the positions of the objects that make up an answer."""
        if not result.mask.any():
            return []
        if not self.proposes:
            return self._known(pieces(result.mask))
        chosen = [n for n, area in enumerate(self._areas()) if np.count_nonzero(self._objects[n] & result.mask) > SAME * area]
        return chosen or self._known(pieces(result.mask))

    def _known(self, masks: np.ndarray) -> list[int]:
        """Return the positions of the objects that masks show; unknown ones join the known. Without proposals none is known."""
        if not self.proposes:
            self._objects = np.concatenate([self._objects, masks])
            return list(range(len(self._objects) - len(masks), len(self._objects)))
        chosen = []
        for mask in masks:
            overlap = overlaps(mask[None], self._objects)[0] if len(self._objects) else np.zeros(0)
            if len(overlap) and overlap.max() >= SAME:
                chosen.append(int(overlap.argmax()))
            else:
                self._objects = np.concatenate([self._objects, mask[None]])
                chosen.append(len(self._objects) - 1)
        return sorted(set(chosen))
