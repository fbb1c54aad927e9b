"""A predictor in one file: it takes the half of the picture that the expression names.

grex predict --model tests.examples.predictor_example --data FOLDER --split SPLIT --out runs/halves.jsonl
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from grex_mllm.predictors.protocol import Abilities, Answer, Item, Options
from grex_mllm.types import Grounding


class Halves:
    """Says where "left" and "right" are; what names no side is not understood."""

    can = Abilities(tasks=("ground",), how="by the words left and right")

    def fingerprint(self) -> str:
        """Name everything that decides the answers."""
        return "halves, version 1"

    def ground(self, items: Iterable[Item]) -> Iterator[Answer]:
        """Answer every open expression of every image."""
        for item in items:
            height, width = item.record.height, item.record.width
            for expression in item.open_expressions:
                words = expression.expression.lower().split()
                if ("left" in words) == ("right" in words):
                    yield Answer(expression.expression_id, status="unparsable", reason="it names no side")
                    continue
                x1, x2 = (0, width // 2) if "left" in words else (width // 2, width)
                mask = np.zeros((height, width), bool)
                mask[:, x1:x2] = True
                box = np.asarray([[x1, 0, x2, height]], np.float64)
                yield Answer(expression.expression_id, Grounding(expression.raw, mask, mask, box, np.ones(1), 1, False, 0.0))


def build(argument: str, options: Options) -> Halves:
    """Return the predictor. argument: what stands behind the colon of `--model MODULE:ARGUMENT`; here nothing."""
    return Halves()
