"""Write references to a given set of objects: every expression returned denotes exactly that set.

All short trees are tried in turn: descriptions by what the targets share, then whatever takes away the other objects that fit (a place, an
order, a relation, a negation, an exclusion), then lists of up to three groups.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator

from grex_mllm.data.synthetic.descriptions import SIDES, keep
from grex_mllm.data.synthetic.expressions import word_expression
from grex_mllm.data.synthetic.grammar import (
    ALL,
    NUMBERS,
    ORDINALS,
    THE,
    Condition,
    Description,
    Exclusion,
    Expression,
    Extreme,
    Ordinal,
    Part,
    Reference,
    Relation,
    Shared,
    Union,
)
from grex_mllm.data.synthetic.meaning import denoted, matching, resolve
from grex_mllm.data.synthetic.scenes import Scene, bits
from grex_mllm.data.synthetic.shapes import COLOUR, SHAPE, SIZE, TEXTURE
from grex_mllm.types import ImageRecord, Sample

ATTRIBUTES = (SHAPE, COLOUR, SIZE, TEXTURE)
MAX_PARTS = 3
MAX_TREES = 400  # that are tried for one set


def references_for(scene: Scene | Sample | ImageRecord, targets: Iterable[int | str], rng: random.Random, number: int) -> list[str]:
    """Return up to `number` different expressions that each denote exactly `targets`; simple ones are likelier.

    Raises:
        GrexError: a target that the scene does not have, or a record that is no synthetic scene.
    """
    known, mask = resolve(scene, targets)
    if not mask:
        return []
    found = list(itertools.islice((tree for tree in trees(known, mask) if denoted(tree, known) == mask), MAX_TREES))
    texts: list[str] = []
    while found and len(texts) < number:
        place = int(len(found) * rng.random() ** 3)  # early trees are simple
        text = word_expression(found.pop(place), rng)
        if text is not None and text not in texts:
            texts.append(text)
    return texts


def trees(scene: Scene, targets: int) -> Iterator[Expression]:
    """Yield short trees that may denote the targets (a bit mask), simple ones first."""
    descriptions = _descriptions(scene, targets)
    yield from _parts(scene, targets, descriptions, closed=False)
    for description in descriptions:
        rest = matching(description, scene) & ~targets
        if rest:
            yield from _conditions(scene, targets, description, rest)
            yield from _related(scene, targets, description)
            yield from _exclusions(scene, targets, description, rest)
    yield from _shared(scene, targets)
    yield from _unions(scene, targets)


def common_attributes(scene: Scene, targets: int) -> list[int]:
    """Return the attributes in which all objects of a bit mask are alike."""
    values = [scene.objects[item].values for item in bits(targets)]
    return [k for k in ATTRIBUTES if len({value[k] for value in values}) == 1]


def _descriptions(scene: Scene, targets: int) -> list[Description]:
    """Return what the targets share, from one stated value to all of them; the bare "shape" last."""
    common = common_attributes(scene, targets)
    subsets = [list(subset) for size in range(1, len(common) + 1) for subset in itertools.combinations(common, size)]
    subsets.sort(key=lambda subset: (len(subset) + (SHAPE not in subset), subset))
    return [keep(scene, bits(targets)[0], subset) for subset in [*subsets, []]]


def _quantifiers(number: int) -> list[int]:
    if number == 1:
        return [THE]
    return [ALL, number] if number - 2 < len(NUMBERS) else [ALL]


def _parts(scene: Scene, targets: int, descriptions: list[Description], closed: bool) -> Iterator[Part]:
    """Yield references, ordinals and extremes that may denote the targets. closed: only what may stand anywhere in a list."""
    number = targets.bit_count()
    for description in descriptions:
        fitting = matching(description, scene)
        if fitting == targets:
            yield from (Reference(quantifier, description) for quantifier in _quantifiers(number))
            continue
        if not closed or number == 1:
            for side in SIDES:
                if not (scene.beside(side, None)[0] & fitting) ^ targets:
                    yield from (Reference(quantifier, description, side) for quantifier in _quantifiers(number))
        if number == 1:
            if description.values[SIZE] is None:
                yield from (Extreme(largest, description) for largest in (True, False))
            ranks = range(1, min(fitting.bit_count(), len(ORDINALS)) + 1)
            yield from (
                Ordinal(rank, side, description) for side in SIDES for rank in ranks if scene.ranked(fitting, side, rank) == targets
            )


def _conditions(scene: Scene, targets: int, description: Description, rest: int) -> Iterator[Expression]:
    quantifier = _quantifiers(targets.bit_count())[0]
    fitting = {(k, value): scene.masks[k][value] for k in description.free for value in scene.present[k]}
    outside = [term for term, mask in fitting.items() if mask & rest and not mask & targets]
    inside = [term for term, mask in fitting.items() if mask & targets and not mask & rest]
    for term in outside:
        if not rest & ~fitting[term]:
            yield Reference(quantifier, Description(description.values, Condition("not", (term,))))
    for kind, options, wanted in (("neither", outside, rest), ("either", inside, targets)):
        for pair in itertools.combinations(options, 2):
            if not wanted & ~(fitting[pair[0]] | fitting[pair[1]]):
                yield Reference(quantifier, Description(description.values, Condition(kind, pair)))


def _related(scene: Scene, targets: int, description: Description) -> Iterator[Expression]:
    fitting = matching(description, scene)
    for item in range(len(scene.objects)):
        others = fitting & ~(1 << item)
        for side in SIDES:
            if scene.beside(side, item)[0] & others == targets and others != targets:
                anchor = next(_parts(scene, 1 << item, _descriptions(scene, 1 << item)[:-1], closed=True), None)
                if isinstance(anchor, Reference) and anchor.place is None:
                    for quantifier in _quantifiers(targets.bit_count()):
                        yield Reference(quantifier, description, None, Relation(side, anchor))


def _exclusions(scene: Scene, targets: int, description: Description, rest: int) -> Iterator[Expression]:
    if targets.bit_count() < 2:  # "all squares except ..." says that several are left
        return
    base = Reference(ALL, description)
    for minus in _parts(scene, rest, _descriptions(scene, rest)[:-1], closed=True):
        if minus != base:
            yield Exclusion(base, minus)


def _shared(scene: Scene, targets: int) -> Iterator[Expression]:
    shapes = sorted({scene.objects[item].values[SHAPE] for item in bits(targets)})
    if len(shapes) == 2:
        for description in _descriptions(scene, targets)[:-1]:
            for quantifier in (THE, ALL):
                yield Shared(quantifier, description, (shapes[0], shapes[1]))


def splits(scene: Scene, targets: int) -> list[list[int]]:
    """Split the objects of a bit mask by each attribute, then one by one; only into two groups up to MAX_PARTS."""
    found = [[scene.masks[k][value] & targets for value in scene.present[k]] for k in ATTRIBUTES]
    found.append([1 << item for item in bits(targets)])
    groupings = [[group for group in groups if group] for groups in found]
    return [groups for groups in groupings if 2 <= len(groups) <= MAX_PARTS]


def _unions(scene: Scene, targets: int) -> Iterator[Expression]:
    """Split the targets into two or three groups that each have a description of their own, by an attribute or one by one."""
    groupings = splits(scene, targets)
    if targets.bit_count() <= 6:
        lowest = targets & -targets
        groupings.extend([group, targets ^ group] for group in _subsets(targets) if group & lowest)
    for groups in groupings:
        options = []
        for group in groups:
            parts = _parts(scene, group, _descriptions(scene, group)[:-1], closed=True)
            options.append(list(itertools.islice((part for part in parts if denoted(part, scene) == group), 3)))
        for choice in itertools.product(*options):
            yield Union(tuple(choice))


def _subsets(mask: int) -> Iterator[int]:
    """Yield every proper, non-empty subset of the bits."""
    subset = (mask - 1) & mask
    while subset:
        yield subset
        subset = (subset - 1) & mask
