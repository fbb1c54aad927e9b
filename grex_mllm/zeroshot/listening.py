"""Re-ranking by a model's own grounding: which candidate leads the model itself back to the objects that it names.

Every candidate is asked about as in zero-shot GREC, by the prompt of the model's family, and the answer is read by that family's parser:
one call for each different candidate, and no second model. `--ask.rerank` of models that are asked without training; `own_grounding` for
the generator `mllm`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from grex_mllm.errors import fault
from grex_mllm.marks import Shown
from grex_mllm.ops.boxes import box_iou
from grex_mllm.zeroshot.base import RawAnswer, Request
from grex_mllm.zeroshot.families import Family
from grex_mllm.zeroshot.parsing import Parsed
from grex_mllm.zeroshot.prompts import Prompt, find_prompt
from grex_mllm.zeroshot.rejection import located
from grex_mllm.zeroshot.talk import Asked, Talk

KIND = "own_grounding"
SAMPLES, TEMPERATURE, MAX_SAMPLES = 4, 0.7, 64
MAX_TOKENS = 512  # of one answer: about fifteen boxes; a candidate that is answered with more names no set of objects


@dataclass(frozen=True)
class Reranking:
    """samples: candidates that are drawn beside the greedy one.  temperature: of them."""

    samples: int = SAMPLES
    temperature: float = TEMPERATURE

    @property
    def name(self) -> str:
        """As it stands in a result's name; `parse_reranking` reads it."""
        return f"{KIND}:{self.samples}@{self.temperature:g}"

    @property
    def calls(self) -> tuple[int, int]:
        """The least and the most calls of a model for one object set: the candidates, and a question about each different one."""
        return self.samples + 2, 2 * (self.samples + 1)


def parse_reranking(name: str) -> Reranking | None:
    """Return the re-ranking of "own_grounding:K@T" (numbers may be left out), None for "none".

    Raises:
        GrexError: an unknown name, or a number out of its range.
    """
    kind, _, numbers = name.partition(":")
    wrong = fault(f'ask.rerank "{name}"', f"none or {KIND}:K@T (1 to {MAX_SAMPLES} candidates, T above 0, at most 2)", "fix the name")
    if name == "none":
        return None
    samples, _, temperature = numbers.partition("@")
    try:
        made = Reranking(int(samples or SAMPLES), float(temperature or TEMPERATURE))
    except ValueError:
        raise wrong from None
    if kind != KIND or not 1 <= made.samples <= MAX_SAMPLES or not 0 < made.temperature <= 2:
        raise wrong
    return made


def agreement(parsed: Parsed, objects: Sequence[Shown]) -> float:
    """Return how well an answer picks out a set of objects, from 0 to 1: F1 with the overlaps of the matched ones in place of hits.

    Boxes overlap by their IoU; a point counts 1 for an object in which it lies. One that is not ok, or says that nothing matches: 0.
    """
    from scipy.optimize import linear_sum_assignment

    if parsed.status != "ok" or parsed.no_target or not objects:
        return 0.0
    if len(parsed.points):
        alike = np.array([[float(_lies_in(point, one.mask)) for one in objects] for point in parsed.points])
    else:
        alike = box_iou(parsed.boxes_xyxy, np.asarray([one.box_xyxy for one in objects], np.float64))
    rows, columns = linear_sum_assignment(-alike)
    return 2 * float(alike[rows, columns].sum()) / (len(alike) + len(objects))


def listen(talks: Sequence[Talk], prompt: Prompt, objects: Sequence[Shown]) -> Asked[list[float]]:
    """Ask where the objects of several expressions are, in one round; return the agreement of each with the objects.

    talks: one for each expression, with the original picture.
    """
    answers = yield from _together([located(talk, prompt) for talk in talks])
    return [agreement(parsed, objects) for (parsed,) in answers]


def best_of(texts: Sequence[str], scores: dict[str, float]) -> list[tuple[str, float]]:
    """Return the different texts with their scores, best first; of equals the one said more often, then the earlier one."""
    often = Counter(texts)
    return sorted(scores.items(), key=lambda pair: (-pair[1], -often[pair[0]], texts.index(pair[0])))


def listening_prompt(family: Family, prompt: Prompt | None = None) -> Prompt:
    """Return the prompt with which candidates are asked about: the family's own for GREC, or a given one of that task."""
    chosen = prompt if prompt is not None and prompt.task == "grec" else find_prompt("grec", family)
    return replace(chosen, max_tokens=min(chosen.max_tokens, MAX_TOKENS))


def _together(asked: Sequence[Asked[Any]]) -> Asked[list[Any]]:
    """Put questions of one round each into one round; return what each of them returns."""
    rounds = [next(one) for one in asked]
    answers = yield [request for made in rounds for request in made]
    found: list[Any] = []
    for one, made in zip(asked, rounds, strict=True):
        own, answers = answers[: len(made)], answers[len(made) :]
        found.append(_returned(one, own))
    return found


def _returned(one: Generator[list[Request], list[RawAnswer], Any], answers: list[RawAnswer]) -> Any:
    try:
        one.send(answers)
    except StopIteration as end:
        return end.value
    raise AssertionError("a question of one round asks for a second one")


def _lies_in(point: np.ndarray, mask: np.ndarray) -> bool:
    row, column = min(int(point[1]), mask.shape[0] - 1), min(int(point[0]), mask.shape[1] - 1)
    return bool(mask[row, column])
