"""What is true of a changed photograph of a templated dataset: its scene is read again, and what is said is judged in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np

from grex_mllm.data.templates.drawing import Shares, draw_statements
from grex_mllm.data.templates.judge import TemplateJudge, judge_text
from grex_mllm.data.templates.scene import Scene, read_scene
from grex_mllm.types import ExpressionRecord, ImageRecord

# Annotation id in the changed record -> (image id, annotation id) in the dataset, of the instances whose pixels are all there: what is
# known of their colours still holds.
Origins = Mapping[str, tuple[str, str]]


class ChangedScene(Protocol):
    """What can be asked about a changed image."""

    def holds(self, expression: ExpressionRecord) -> bool:
        """Tell whether an expression denotes exactly its targets here, in both its wordings."""

    def draw(self, num: int, rng: np.random.Generator, like: ExpressionRecord) -> list[ExpressionRecord]:
        """Draw up to `num` expressions that are true here, with ids, split and source made after another one's."""


class TemplateScene:
    """A changed image of a folder whose expressions come from templates."""

    def __init__(self, judge: TemplateJudge, record: ImageRecord, origins: Origins) -> None:
        labelled = judge.labelled.get(judge.source_of.get(record.image_id, ""))
        colours = {name: judge.colours.get(image, {}).get(there) for name, (image, there) in origins.items()}
        known = {name: names for name, names in colours.items() if names is not None}
        self.scene: Scene = read_scene(record, labelled, known)
        self.categories = judge.categories

    def holds(self, expression: ExpressionRecord) -> bool:
        """See `ChangedScene`."""
        texts = {expression.raw, expression.expression}
        return all(judge_text(text, self.scene, expression.targets, self.categories) == "exact" for text in texts)

    def draw(self, num: int, rng: np.random.Generator, like: ExpressionRecord) -> list[ExpressionRecord]:
        """See `ChangedScene`."""
        found = []
        for number, said in enumerate(draw_statements(self.scene, Counter(), num=num, shares=Shares(), rng=rng)[:num]):
            name, kinds = f"{like.expression_id}/drawn.{number}", [said.kind]
            changed = replace(like, expression_id=name, ref_id=name, targets=list(said.targets), tags=kinds)
            found.append(replace(changed, expression=said.expression, raw=said.text))
        return found
