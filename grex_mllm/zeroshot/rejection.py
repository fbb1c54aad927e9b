"""Ways to find out that nothing matches, each a named variant with calls of its own (they stand in the answer's `raw`).

- `none`: the prompt itself says how to answer with nothing.
- `twice`: first "is there ...?", and only after a yes the places.
- `consistency:K@T`: K samples at temperature T; they vote on whether there is a target, then on its objects (`voting`).
- `probability:P`: the probability of "no" as the first token of "is there ...?", against that of "yes"; from P on nothing matches, below it
  the places are asked for. The only variant that gives a `no_target_prob` between 0 and 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from grex_mllm.errors import fault
from grex_mllm.zeroshot.base import RawAnswer, View
from grex_mllm.zeroshot.parsing import Parsed, parse_expression, parse_grounding, parse_yes_no
from grex_mllm.zeroshot.prompts import Prompt
from grex_mllm.zeroshot.talk import Asked, Talk
from grex_mllm.zeroshot.voting import agreed

KINDS = ("none", "twice", "consistency:K@T", "probability:P")
YES, NO = "yes", "no"
SAMPLES, TEMPERATURE, THRESHOLD = 5, 0.7, 0.5
MAX_SAMPLES = 100


@dataclass(frozen=True)
class Rejection:
    """kind: none, twice, consistency or probability.  samples, temperature: of consistency.  threshold: of probability."""

    kind: str = "none"
    samples: int = SAMPLES
    temperature: float = TEMPERATURE
    threshold: float = THRESHOLD

    @property
    def name(self) -> str:
        """As it stands in a result's name; `parse_rejection` reads it."""
        ending = {"consistency": f":{self.samples}@{self.temperature:g}", "probability": f":{self.threshold:g}"}
        return self.kind + ending.get(self.kind, "")

    @property
    def calls(self) -> tuple[int, int]:
        """The least and the most calls of a model for one question."""
        return {"none": (1, 1), "consistency": (self.samples, self.samples)}.get(self.kind, (1, 2))

    @property
    def asks_existence(self) -> bool:
        """Whether a prompt of the task `exists` is needed."""
        return self.kind in ("twice", "probability")


@dataclass
class Outcome:
    """parsed: the answer.  no_target_prob: where it was asked as a probability."""

    parsed: Parsed
    no_target_prob: float | None = None


def parse_rejection(name: str) -> Rejection:
    """Return the variant of a name such as "twice", "consistency:5@0.7" or "probability:0.5"; numbers may be left out.

    Raises:
        GrexError: an unknown name, or a number out of its range.
    """
    kind, _, numbers = name.partition(":")
    wrong = fault(
        f'rejection "{name}"', f"one of {', '.join(KINDS)} (2 to {MAX_SAMPLES} samples, T above 0, P from 0 to 1)", "fix the name"
    )
    try:
        if kind in ("none", "twice") and not numbers:
            return Rejection(kind)
        if kind == "consistency":
            samples, _, temperature = numbers.partition("@")
            made = Rejection(kind, int(samples or SAMPLES), float(temperature or TEMPERATURE))
            if 2 <= made.samples <= MAX_SAMPLES and 0 < made.temperature <= 2:
                return made
        if kind == "probability":
            made = Rejection(kind, threshold=float(numbers or THRESHOLD))
            if 0 <= made.threshold <= 1:
                return made
    except ValueError:
        raise wrong from None
    raise wrong


def grounded(talk: Talk, prompt: Prompt, exists: Prompt | None, rejection: Rejection) -> Asked[Outcome]:
    """Ask where the targets are, in the way of a variant.

    Raises:
        GrexError: a variant that needs a prompt of the task `exists`, without one.
    """
    if rejection.kind == "consistency":
        return Outcome((yield from _consistent(talk, prompt, rejection)))
    probability = None
    if rejection.asks_existence:
        if exists is None:
            raise fault(f"rejection {rejection.name} without a prompt that asks whether there is a target", "one", "name it")
        if rejection.kind == "twice":
            absent = yield from _denied(talk, exists)
        else:
            absent, probability = yield from _improbable(talk, exists, rejection.threshold)
        if absent is not None:
            return Outcome(absent, probability)
    parsed = yield from located(talk, prompt)
    return Outcome(parsed[0], probability)


def located(talk: Talk, prompt: Prompt, samples: int = 1, temperature: float | None = None) -> Asked[list[Parsed]]:
    """Ask where the targets are, `samples` times in one round; return what each answer says."""
    answers = yield from talk.ask("locate", prompt, samples=samples, temperature=temperature)
    found = [_parsed(raw, prompt, view) for raw, view in answers]
    for parsed in found:
        talk.note(parsed.flags)
    return found


def _consistent(talk: Talk, prompt: Prompt, rejection: Rejection) -> Asked[Parsed]:
    samples = yield from located(talk, prompt, rejection.samples, rejection.temperature)
    return agreed(samples, prompt.answer, math.hypot(talk.view.width, talk.view.height))


def _denied(talk: Talk, exists: Prompt) -> Asked[Parsed | None]:
    """Ask whether there is a target; return the answer if that ends the question."""
    ((raw, _),) = yield from talk.ask("exists", exists)
    said = parse_yes_no(raw)
    if said is None:
        return _not_said(raw)
    return None if said else Parsed("ok", no_target=True)


def _improbable(talk: Talk, exists: Prompt, threshold: float) -> Asked[tuple[Parsed | None, float | None]]:
    """Ask for the probability that there is no target; return the answer, if that ends the question, and the probability."""
    ((raw, _),) = yield from talk.ask("exists", exists, choices=(YES, NO))
    given = raw.choice_probs or {}
    total = given.get(YES, 0.0) + given.get(NO, 0.0)
    if total <= 0:
        if raw.finish == "error":
            return Parsed("error", raw.error or "no answer"), None
        refused = _not_said(raw)
        return (refused if refused.status == "refused" else Parsed("error", "no probabilities of yes and no came back")), None
    probability = given.get(NO, 0.0) / total
    return (Parsed("ok", no_target=True) if probability >= threshold else None), probability


def _not_said(raw: RawAnswer) -> Parsed:
    """Return the status of an answer that is neither yes nor no."""
    read = parse_expression(raw)
    return Parsed("unparsable", "neither yes nor no") if read.status == "ok" else Parsed(read.status, read.reason, flags=read.flags)


def _parsed(raw: RawAnswer, prompt: Prompt, view: View) -> Parsed:
    return parse_grounding(raw, frame=prompt.frame, order=prompt.order, answer=prompt.answer, empty_answer=prompt.empty_answer, view=view)


def check_rejection(rejection: Rejection, prompt: Prompt) -> None:
    """Refuse a variant that has no meaning for a prompt.

    Raises:
        GrexError: any variant for counting.
    """
    if prompt.task == "count" and rejection.kind != "none":
        raise fault(f"rejection {rejection.name} for the task count", "none: a count of 0 says that nothing matches", "leave it out")
