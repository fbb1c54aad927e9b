"""Expressions without a model: the categories of the selected objects, and the third of the picture that they lie in.

What a generator has to be better than. It says nothing of what is beside the selected objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from grex_mllm.data.plurals import plural_phrase, singular_phrase
from grex_mllm.errors import fault
from grex_mllm.predictors.protocol import Abilities, Answer, Item, Options, set_key
from grex_mllm.types import Instance

LEFT, RIGHT = 0.4, 0.6  # of the width: centres before, between and after are on the left, in the middle and on the right


class CategorySide:
    """Writes "the cats on the left and the dog on the right"."""

    can = Abilities(("generate",), "objects", "by category and side, without a model")

    def fingerprint(self) -> str:
        """Name the rule and its version."""
        return "category and side, version 1"

    def describe(self, items: Iterable[Item]) -> Iterator[Answer]:
        """Write an expression for every open object set."""
        for item in items:
            by_id = {instance.annotation_id: instance for instance in item.record.instances}
            for targets in item.open_sets:
                text = say([by_id[target] for target in targets], item.record.width)
                yield Answer(set_key(item.record.image_id, targets), expression=text)


def say(chosen: Iterable[Instance], width: int) -> str:
    """Return "the CATEGORY on the left", or one such part for each category. width: of the image, in pixels."""
    groups: dict[str, list[Instance]] = {}
    for instance in chosen:
        groups.setdefault(instance.category, []).append(instance)
    parts = []
    for category, group in sorted(groups.items()):
        centre = sum(instance.box_xyxy[0] + instance.box_xyxy[2] for instance in group) / (2 * len(group) * width)
        side = "on the left" if centre < LEFT else "on the right" if centre > RIGHT else "in the middle"
        parts.append(f"the {singular_phrase(category) if len(group) == 1 else plural_phrase(category)} {side}")
    return " and ".join(parts)


def build(argument: str, options: Options) -> CategorySide:
    """Return the predictor.

    Raises:
        GrexError: an argument; it takes none.
    """
    if argument:
        raise fault(f"category_side:{argument}", "category_side alone: it takes no argument", "use --model category_side")
    return CategorySide()
