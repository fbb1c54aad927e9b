"""Fixed rules, to set results beside: what is reached without looking at the image."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from grex_mllm.errors import fault
from grex_mllm.predictors.protocol import Abilities, Answer, Item, Options, set_key
from grex_mllm.types import ExpressionRecord, Grounding

MANY = 6  # the count that stands for ">5"


def _targets(item: Item, expression: ExpressionRecord, _: str) -> list[int]:
    place = {instance.annotation_id: n for n, instance in enumerate(item.instances)}
    unknown = [target for target in expression.targets if target not in place]
    if unknown:
        given = f'expression {expression.expression_id}: target "{unknown[0]}" of field targets'
        raise fault(given, "the id of an instance of the image, no crowd region", "fix expressions.jsonl")
    return [place[target] for target in expression.targets]


def _largest(item: Item, _: ExpressionRecord, __: str) -> list[int]:
    areas = item.masks.sum((1, 2))
    return [int(areas.argmax())] if len(areas) else []


def _random(item: Item, expression: ExpressionRecord, seed: str) -> list[int]:
    """Return any number of objects, none included; the same ones for an expression whatever else is asked."""
    source, num = random.Random(f"{seed}:{expression.expression_id}"), len(item.instances)
    return sorted(source.sample(range(num), source.randint(0, num)))


Rule = Callable[[Item, ExpressionRecord, str], list[int]]
RULES: dict[str, tuple[str, Rule]] = {  # name -> what of the truth it reads, and positions among the item's instances
    "always_empty": ("", lambda *_: []),
    "oracle": ("targets", _targets),
    "largest": ("objects", _largest),
    "all": ("objects", lambda item, *_: list(range(len(item.instances)))),
    "random": ("objects", _random),
}


class Fixed:
    """Answers by one of RULES; the oracle also describes, with the first reference of each object set."""

    def __init__(self, name: str, seed: str) -> None:
        self.name, self.seed = name, seed
        truth, self.rule = RULES[name]
        how = f"by the fixed rule {name}" + (f", which reads the ground truth's {truth}" if truth else "")
        self.can = Abilities(("ground", "generate") if name == "oracle" else ("ground",), truth, how)

    def fingerprint(self) -> str:
        """Return rule and seed."""
        return f"fixed:{self.name}:{self.seed}"

    def ground(self, items: Iterable[Item]) -> Iterator[Answer]:
        """Answer with the rule's objects: the union of their masks, and their boxes."""
        for item in items:
            for expression in item.open_expressions:
                yield Answer(expression.expression_id, _grounding(item, expression.raw, self.rule(item, expression, self.seed)))

    def describe(self, items: Iterable[Item]) -> Iterator[Answer]:
        """Answer with the first expression of the split that refers to the object set."""
        for item in items:
            first = {tuple(sorted(e.targets)): e.expression for e in reversed(item.expressions)}
            for targets in item.open_sets:
                yield Answer(set_key(item.record.image_id, targets), expression=first[targets])


def _grounding(item: Item, text: str, chosen: list[int]) -> Grounding:
    size = (item.record.height, item.record.width)
    mask: np.ndarray = np.any(item.masks[chosen], axis=0) if chosen else np.zeros(size, bool)
    boxes = np.asarray([item.instances[n].box_xyxy for n in chosen], np.float64).reshape(-1, 4)
    none = not chosen
    return Grounding(text, mask, mask, boxes, np.ones(len(chosen)), min(len(chosen), MANY), none, float(none), None, none)


def build(argument: str, options: Options) -> Fixed:
    """Return the predictor of "RULE" or "RULE:SEED".

    Raises:
        GrexError: no such rule, or a seed for one that draws nothing.
    """
    name, _, seed = argument.partition(":")
    if name not in RULES:
        raise fault(f'rule "{name}"', f"one of {', '.join(RULES)}", "fix --model")
    if seed and name != "random":
        raise fault(f"{name}:{seed}", f"{name} alone: it takes no argument", f"use --model {name}")
    return Fixed(name, seed or "0")
