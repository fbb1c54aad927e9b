"""The canonical speaker: one expression for a set of objects, the same for the same set, chosen so that saying it takes little thought.

It says everything that the objects share ("the small red striped circle"), and looks for more only where that fits other objects, too.
Objects that share too little are listed, each named in full, from left to right. Least is left to comparing, most to seeing, and what is
said twice over is easier to find again.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator

from grex_mllm.data.synthetic.descriptions import SIDES, keep
from grex_mllm.data.synthetic.expressions import word_expression
from grex_mllm.data.synthetic.grammar import ALL, ORDINALS, THE, Description, Expression, Extreme, Ordinal, Part, Reference, Union
from grex_mllm.data.synthetic.meaning import denoted, matching, resolve
from grex_mllm.data.synthetic.references import MAX_TREES, common_attributes, splits, trees
from grex_mllm.data.synthetic.scenes import Scene, bits
from grex_mllm.data.synthetic.shapes import SIZE
from grex_mllm.types import ImageRecord, Sample


class _Habit(random.Random):
    """Take the same one of several wordings each time: "all", "large", size before colour before texture, no clause after the noun."""

    def random(self) -> float:
        return 0.28


def canonical_expression(scene: Scene | Sample | ImageRecord, targets: Iterable[int | str]) -> str | None:
    """Return the canonical speaker's expression, which denotes exactly `targets`, or None where the grammar has no short one.

    targets: positions or annotation ids.  Always worded alike: a generator learns one habit faster than the whole variety of the grammar.
    """
    known, mask = resolve(scene, targets)
    if not mask:
        return None
    for tree in itertools.chain(_canonical_trees(known, mask), itertools.islice(trees(known, mask), MAX_TREES)):
        if denoted(tree, known) == mask:
            text = word_expression(tree, _Habit())
            if text is not None:
                return text
    return None


def _canonical_trees(scene: Scene, targets: int) -> Iterator[Expression]:
    number = targets.bit_count()
    if number == 1:
        yield from _names(scene, targets)
        return
    full = _in_full(scene, targets)
    if full is not None:
        yield Reference(ALL, full)
    groupings = [sorted(groups, key=lambda group: min(scene.centre_x[item] for item in bits(group))) for groups in splits(scene, targets)]
    yield from _lists(scene, [groups for groups in groupings if len(groups) == 2])
    if full is not None:
        yield from (Reference(ALL, full, side) for side in SIDES)
    yield from _lists(scene, [groups for groups in groupings if len(groups) > 2])


def _names(scene: Scene, target: int) -> Iterator[Part]:
    """Name one object: all that it is, then an order among those that are like it, the clearest first."""
    item = bits(target)[0]
    values = scene.objects[item].values
    full = Description(values)
    yield Reference(THE, full)
    rivals = matching(full, scene) & ~target
    if rivals:
        for side in sorted(SIDES, key=lambda side: -_lead(scene, item, bits(rivals), side)):
            yield Ordinal(1, side, full)
    unsized = full.having(SIZE, None)
    yield from (Extreme(largest, unsized) for largest in (True, False))
    yield from (Ordinal(rank, side, full) for rank in range(2, len(ORDINALS) + 1) for side in SIDES)


def _in_full(scene: Scene, targets: int) -> Description | None:
    """Describe objects by everything that they share, or return None where they share nothing."""
    common = common_attributes(scene, targets)
    return keep(scene, bits(targets)[0], common) if common else None


def _lead(scene: Scene, item: int, rivals: list[int], side: str) -> float:
    """How far, in pixels, an object lies nearer to a side than its nearest rival."""
    centres, _ = scene.axis(side)
    sign = 1.0 if side in ("left", "top") else -1.0
    return min(sign * (centres[rival] - centres[item]) for rival in rivals)


def _lists(scene: Scene, groupings: list[list[int]]) -> Iterator[Expression]:
    for groups in groupings:
        parts = []
        for group in groups:
            full = _in_full(scene, group)
            options: Iterator[Part] = _names(scene, group) if group.bit_count() == 1 else iter([Reference(ALL, full)] if full else [])
            part = next((option for option in options if denoted(option, scene) == group), None)
            if part is not None:
                parts.append(part)
        if len(parts) == len(groups):
            yield Union(tuple(parts))
