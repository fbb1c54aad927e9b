"""Questions as conversations: where the targets of an expression are (GREC, GRES), how many there are, how a set is called (GREG).

Nothing here knows the ground truth but for the objects of a set to describe, and nothing is dropped: every raw answer stands in the line,
and every status is the parser's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grex_mllm.errors import fault
from grex_mllm.predictors.protocol import Answer, Item, ObjectSet, set_key
from grex_mllm.types import MORE_THAN_FIVE, ExpressionRecord, Grounding
from grex_mllm.zeroshot.base import Conversation, Picture, Turn, View
from grex_mllm.zeroshot.families import Family
from grex_mllm.zeroshot.listening import Reranking, best_of, listen, listening_prompt
from grex_mllm.zeroshot.marks import Shown, crops, mark_picture, mark_words, parse_ways, shown_objects
from grex_mllm.zeroshot.parsing import Parsed, ParsedExpression, parse_count, parse_expression
from grex_mllm.zeroshot.prompts import Prompt
from grex_mllm.zeroshot.rejection import Outcome, Rejection, check_rejection, grounded
from grex_mllm.zeroshot.segmenters import Segmenter, check_segmenter
from grex_mllm.zeroshot.talk import Talk

ViewOf = Callable[[int, int], tuple[int, int] | None]
ONCE = Rejection()


def _unknown(width: int, height: int) -> None:
    return None


@dataclass(frozen=True)
class Asking:
    """All that decides how questions are put and answers are read.

    family: of the model.  locate: prompt of the task grec, gres or count.  describe: of greg.  exists: for the rejections that need it.
    segmenter: None = boxes alone.  rejection: see `rejection`.  view: of the backend: size of the picture that the model sees.
    shots: turns of examples by "task/name" of a prompt (`shots.shot_turns`).  shown: ids of their images; no question about one is asked.
    seed: of all sampling.  structured: ask for JSON by schema.
    rerank: how an expression is chosen among candidates; None = the greedy one is taken.

    Raises:
        GrexError: prompts, segmenter and rejection that do not go together.
    """

    family: Family
    locate: Prompt | None = None
    describe: Prompt | None = None
    exists: Prompt | None = None
    segmenter: Segmenter | None = None
    rejection: Rejection = ONCE
    view: ViewOf = _unknown
    shots: dict[str, tuple[Turn, ...]] = field(default_factory=dict)
    shown: set[str] = field(default_factory=set)
    seed: int = 0
    structured: bool = False
    rerank: Reranking | None = None

    def __post_init__(self) -> None:
        if self.locate is not None:
            if self.locate.task != "count":
                check_segmenter(self.segmenter, self.locate.answer)
            check_rejection(self.rejection, self.locate)
        if self.rejection.asks_existence and self.exists is None:
            raise fault(f"rejection {self.rejection.name} without a prompt of the task exists", "one", "name it")
        if self.describe is not None:
            parse_ways(self.describe.marking)

    @property
    def name(self) -> str:
        """As it stands in a result's name: prompts, segmenter, rejection and examples."""
        parts = [f"{p.task}/{p.name}" for p in (self.locate, self.describe) if p is not None]
        if self.segmenter is not None:
            parts.append(self.segmenter.name)
        parts += [self.rejection.name] * (self.rejection.kind != "none") + ["structured"] * self.structured
        parts += [] if self.rerank is None else [self.rerank.name]
        shown = max((sum(turn.role == "assistant" for turn in turns) for turns in self.shots.values()), default=0)
        return "+".join(parts + [f"{shown}-shot"] * (shown > 0))

    def fingerprint(self) -> str:
        """Return a hash of all of it but the backend."""
        prompts = [None if p is None else [p.task, p.name, p.sha256] for p in (self.locate, self.describe, self.exists)]
        shots = {
            name: [[t.role, [p if isinstance(p, str) else p.digest for p in t.parts]] for t in turns] for name, turns in self.shots.items()
        }
        segmenter = None if self.segmenter is None else self.segmenter.fingerprint()
        known = [self.family.name, prompts, segmenter, self.rejection.name, shots, self.seed, self.structured]
        known += [] if self.rerank is None else [self.rerank.name, self._heard_by.sha256]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def ground(self, item: Item, record: ExpressionRecord) -> Conversation:
        """Ask for the targets of an expression, or for their count; the answer's key is the expression's id."""
        prompt = _needed(self.locate, "grec, gres or count")
        self._refuse_examples(item)
        picture = Picture(item.image)
        talk = self._talk(record.expression_id, (picture,), {"expression": record.raw})
        if prompt.task == "count":
            return (yield from _counted(talk, prompt, record))
        outcome = yield from grounded(talk, prompt, self.exists, self.rejection)
        talk.note(outcome.parsed.flags)
        return self._grounding(talk, picture, record, outcome)

    def describe_set(self, item: Item, targets: ObjectSet) -> Conversation:
        """Ask for one expression that fits all objects of a set and nothing else; the answer's key is the set's."""
        prompt = _needed(self.describe, "greg")
        self._refuse_examples(item)
        height, width = item.image.shape[:2]
        pictures, words = show_set(item, targets, prompt, self.family, self.view_of(width, height))
        talk = self._talk(set_key(item.record.image_id, targets), pictures, words)
        ((raw, _),) = yield from talk.ask("describe", prompt)
        read = parse_expression(raw)
        talk.note(read.flags)
        if self.rerank is not None and read.status != "error":
            return (yield from self._chosen(talk, read, prompt, shown_objects(item, targets), Picture(item.image)))
        text = read.text if read.status == "ok" else ""
        return Answer(talk.key, expression=text, status=read.status, reason=read.reason, fields=talk.fields())

    @property
    def _heard_by(self) -> Prompt:
        return listening_prompt(self.family, self.locate)

    def _chosen(self, talk: Talk, greedy: ParsedExpression, prompt: Prompt, objects: Sequence[Shown], picture: Picture) -> Conversation:
        """Draw candidates beside the greedy expression; take the one that leads the model back to the objects best."""
        assert self.rerank is not None
        drawn = yield from talk.ask("candidates", prompt, samples=self.rerank.samples, temperature=self.rerank.temperature)
        read = [greedy, *(parse_expression(raw) for raw, _ in drawn)]
        texts = [one.text for one in read if one.status == "ok"]
        if not texts:
            return Answer(talk.key, expression="", status=greedy.status, reason=greedy.reason, fields=talk.fields())
        options = list(dict.fromkeys(texts))
        heard = [
            Talk(f"{talk.key}#listen.{n}", (picture,), talk.view, {"expression": text}, {}, self.seed, self.structured, talk.raw)
            for n, text in enumerate(options)
        ]
        scores = yield from listen(heard, self._heard_by, objects)
        ranked = best_of(texts, dict(zip(options, scores, strict=True)))
        fields = talk.fields() | {"candidates": [text for text, _ in ranked], "scores": [round(score, 4) for _, score in ranked]}
        return Answer(talk.key, expression=ranked[0][0], fields=fields)

    def view_of(self, width: int, height: int) -> View:
        """Return the view of an original of this size: the backend's, where it knows it, else by the family's rule."""
        return self.family.view(width, height, self.view(width, height))

    def _refuse_examples(self, item: Item) -> None:
        if item.record.image_id in self.shown:
            given = f"image {item.record.image_id}, which is one of the examples, with their true answers"
            raise fault(given, "examples from another split than the questions", "choose another split for the examples")

    def _talk(self, key: str, pictures: tuple[Picture, ...], words: dict[str, Any]) -> Talk:
        height, width = pictures[0].pixels.shape[:2]
        return Talk(key, pictures, self.view_of(width, height), words, self.shots, self.seed, self.structured)

    def _grounding(self, talk: Talk, picture: Picture, record: ExpressionRecord, outcome: Outcome) -> Answer:
        parsed = outcome.parsed
        if parsed.status != "ok":
            return Answer(talk.key, status=parsed.status, reason=parsed.reason, masks=self.segmenter is not None, fields=talk.fields())
        mask, boxes = np.zeros(picture.pixels.shape[:2], bool), parsed.boxes_xyxy
        if self.segmenter is not None and not parsed.no_target:
            mask, boxes, flags = self.segmenter.segment(picture, parsed)
            talk.note(flags)
        count = max(len(parsed.boxes_xyxy), len(parsed.points))
        probability = float(parsed.no_target) if outcome.no_target_prob is None else outcome.no_target_prob
        return Answer(
            talk.key,
            _answered(record, mask, boxes, min(count, MORE_THAN_FIVE), parsed, probability),
            masks=self.segmenter is not None,
            fields=talk.fields(),
        )


def show_set(item: Item, targets: ObjectSet, prompt: Prompt, family: Family, view: View) -> tuple[tuple[Picture, ...], dict[str, Any]]:
    """Return the pictures that show a set of objects as a prompt's marking says, and what the prompt's places are filled with.

    Raises:
        GrexError: an unknown marking, or objects that the image lacks.
    """
    ways, objects = parse_ways(prompt.marking), shown_objects(item, targets)
    pictures = [mark_picture(item.image, objects, ways)] + (crops(item.image, objects) if "crops" in ways else [])
    boxes = np.asarray([shown.box_xyxy for shown in objects], np.float64)
    words = {"objects": family.mention(boxes, view), "count": len(objects)} | mark_words(len(objects), ways)
    return tuple(map(Picture, pictures)), words


def _answered(
    record: ExpressionRecord, mask: np.ndarray, boxes: np.ndarray | None, count: int, parsed: Parsed, probability: float
) -> Grounding:
    scores = None if boxes is None else np.ones(len(boxes), np.float32)
    return Grounding(
        expression=record.raw,
        mask=mask,
        mask_input=None,
        boxes_xyxy=None if boxes is None else boxes.astype(np.float32),
        box_scores=scores,
        count=count,
        no_target=parsed.no_target,
        no_target_prob=probability,
        head_no_target=parsed.no_target,
    )


def _counted(talk: Talk, prompt: Prompt, record: ExpressionRecord) -> Conversation:
    """Ask how many objects there are; the answer has neither boxes nor masks."""
    ((raw, view),) = yield from talk.ask("count", prompt)
    read = parse_count(raw)
    talk.note(read.flags)
    if read.status != "ok":
        return Answer(talk.key, status=read.status, reason=read.reason, masks=False, fields=talk.fields())
    parsed = Parsed("ok", no_target=read.count == 0)
    nothing = np.zeros((view.height, view.width), bool)
    return Answer(
        talk.key,
        _answered(record, nothing, None, min(read.count, MORE_THAN_FIVE), parsed, float(read.count == 0)),
        masks=False,
        fields=talk.fields(),
    )


def _needed(prompt: Prompt | None, task: str) -> Prompt:
    if prompt is None:
        raise fault(f"a question without a prompt of the task {task}", "one", "name it")
    return prompt
