"""Deceptive no-target expressions mined from other scenes: they name things that are there, and things that are not."""

from __future__ import annotations

import random
from collections.abc import Sequence

from grex_mllm.data.synthetic.grammar import Expression, descriptions
from grex_mllm.data.synthetic.meaning import denoted, scene_from_record
from grex_mllm.data.synthetic.parser import parse
from grex_mllm.data.synthetic.scenes import Scene
from grex_mllm.types import ExpressionRecord, Sample

MINED = "mined"  # their tag


def mine(sample: Sample, others: Sequence[ExpressionRecord], share: float, seed: int) -> None:
    """Replace a share of a sample's no-target expressions by those of other scenes that denote nothing here, the most deceptive first.

    An expression deceives as far as its descriptions fit objects of the scene (`deception`). Which ones are replaced depends on the seed.
    """
    draw = random.Random(seed)
    replaced = [record for record in sample.expressions if not record.targets and draw.random() < share]
    if not replaced:
        return
    scene = scene_from_record(sample.record)
    found: dict[str, tuple[float, float, ExpressionRecord]] = {}
    known = {record.raw for record in sample.expressions}
    for other in others:
        if not other.targets or other.raw in known or other.raw in found:
            continue
        tree = parse(other.raw)
        if tree is not None and denoted(tree, scene) == 0:
            found[other.raw] = (-deception(tree, scene), draw.random(), other)
    for record, (_, _, other) in zip(replaced, sorted(found.values(), key=lambda item: item[:2]), strict=False):
        record.expression = record.raw = other.raw
        record.tags = [other.tags[0], "no_target", MINED]


def deception(tree: Expression, scene: Scene) -> float:
    """Return the mean over an expression's descriptions of the largest share of stated attribute values that one object has, in [0, 1]."""
    parts = [description.stated for description in descriptions(tree)]
    shares = [
        max(sum(item.values[attribute] == value for attribute, value in stated) for item in scene.objects) / len(stated)
        for stated in parts
        if stated
    ]
    return sum(shares) / len(shares) if shares else 1.0
