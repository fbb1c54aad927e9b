"""What an expression denotes in a scene. The semantics of the grammar, in one place:

- A definite singular ("the red circle") denotes its only match, nothing where there is none, and is undetermined where there are several.
- A stated number denotes the matches where they are that many, nothing where there are fewer, and is undetermined where there are more.
- Places, relations, order and size hold only by clear margins (`scenes.Scene`); whatever lies within a margin makes the expression
undetermined.
- A relation to an anchor that does not exist denotes nothing; to several possible anchors, it is undetermined.
- "A and B" denotes the union, nothing where neither part denotes anything, and is undetermined where one part does and another does not.
- "A except B" denotes nothing where A does; it is undetermined where B removes nothing from A.
- In "the red circles and stars" the adjective holds for both nouns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from grex_mllm.data.synthetic.grammar import ALL, THE, Description, Exclusion, Expression, Extreme, Ordinal, Reference, Shared, Union
from grex_mllm.data.synthetic.parser import parse
from grex_mllm.data.synthetic.scenes import Scene, SceneObject, bits
from grex_mllm.errors import fault
from grex_mllm.types import ImageRecord, Sample


def evaluate(tree: Expression, scene: Scene) -> frozenset[int] | None:
    """Return the positions of the objects that the expression denotes, empty for none, None where the scene does not determine it."""
    mask = denoted(tree, scene)
    return None if mask is None else frozenset(bits(mask))


def denoted(tree: Expression, scene: Scene) -> int | None:
    """Do as `evaluate`, with the set as a bit mask."""
    if isinstance(tree, Reference):
        return _reference(tree, scene)
    if isinstance(tree, Ordinal):
        return scene.ranked(matching(tree.description, scene), tree.side, tree.rank)
    if isinstance(tree, Extreme):
        return scene.extreme(matching(tree.description, scene), tree.largest)
    if isinstance(tree, Exclusion):
        return _exclusion(tree, scene)
    if isinstance(tree, Union):
        return _together([denoted(part, scene) for part in tree.parts])
    return _shared(tree, scene)


def matching(description: Description, scene: Scene) -> int:
    """Return the bit mask of the objects that fit a description."""
    mask = scene.everything
    for table, value in zip(scene.masks, description.values, strict=True):
        if value is not None:
            mask &= table[value]
    condition = description.condition
    if condition is not None:
        named = 0
        for attribute, value in condition.terms:
            named |= scene.masks[attribute][value]
        mask &= named if condition.kind == "either" else ~named
    return mask


def _reference(tree: Reference, scene: Scene) -> int | None:
    mask = matching(tree.description, scene)
    if mask and tree.place is not None:
        inside, unsure = scene.beside(tree.place, None)
        if mask & unsure:
            return None
        mask &= inside
    if mask and tree.relation is not None:
        anchor = denoted(tree.relation.anchor, scene)
        if not anchor:
            return anchor
        inside, unsure = scene.beside(tree.relation.side, anchor.bit_length() - 1)
        mask &= ~anchor
        if mask & unsure:
            return None
        mask &= inside
    return mask if tree.quantifier == ALL else _counted(mask, tree.quantifier)


def _counted(mask: int, number: int) -> int | None:
    found = mask.bit_count()
    if found == number:
        return mask
    return 0 if found < number else None


def _together(parts: list[int | None]) -> int | None:
    union = 0
    for part in parts:
        if part is None:
            return None
        union |= part
    return None if union and not all(parts) else union


def _shared(tree: Shared, scene: Scene) -> int | None:
    both = matching(tree.description, scene)
    groups: list[int | None] = [both & scene.masks[0][shape] for shape in tree.shapes]
    if tree.quantifier == THE:
        groups = [_counted(group or 0, 1) for group in groups]
    return _together(groups)


def _exclusion(tree: Exclusion, scene: Scene) -> int | None:
    base = _reference(tree.base, scene)
    if not base:
        return base
    minus = denoted(tree.minus, scene)
    return base & ~minus if minus and minus & base else None


def scene_from_record(record: ImageRecord) -> Scene:
    """Rebuild the scene from an image record, as drawn or as read from an exported folder, by its boxes and attributes.

    Raises:
        GrexError: an instance without scene attributes, so the record is no synthetic scene.
    """
    objects = []
    for instance in record.instances:
        given = instance.attributes or {}
        try:
            values = (given["shape"], given["colour"], given["size"], given["texture"])
            scale = given["scale"]
        except KeyError as missing:
            raise fault(
                f"instance {instance.annotation_id} of image {record.image_id} has no attribute {missing}",
                "a synthetic scene, whose instances carry shape, colour, size, texture and scale",
                "judge expressions on synthetic data only",
            ) from None
        x1, y1, x2, y2 = (round(edge) for edge in instance.box_xyxy)
        objects.append(SceneObject(values, scale, (x1, y1, x2, y2)))
    return Scene(record.width, record.height, objects)


def resolve(scene: Scene | Sample | ImageRecord, targets: Iterable[int | str]) -> tuple[Scene, int]:
    """Return the scene and the bit mask of the targets: positions, or annotation ids where a Sample or ImageRecord is given.

    Raises:
        GrexError: a target that the scene does not have, or a record that is no synthetic scene.
    """
    record = scene.record if isinstance(scene, Sample) else scene
    names: dict[str, int] = {}
    if isinstance(record, ImageRecord):
        names = {instance.annotation_id: k for k, instance in enumerate(record.instances)}
        record = scene_from_record(record)
    mask = 0
    for target in targets:
        position = names.get(target, -1) if isinstance(target, str) else target
        if not 0 <= position < len(record.objects):
            raise fault(
                f'target "{target}"', f"one of the {len(record.objects)} objects of the scene", "give its position or annotation id"
            )
        mask |= 1 << position
    return record, mask


def check_expression(text: str, scene: Scene | Sample | ImageRecord, targets: Iterable[int | str]) -> str:
    """Judge a text as a reference to an object set: "exact", "wrong" (denotes another set or nothing), "ambiguous" or "unparsable".

    targets: as in `resolve`.
    """
    known, wanted = resolve(scene, targets)
    tree = parse(text)
    if tree is None:
        return "unparsable"
    found = denoted(tree, known)
    if found is None:
        return "ambiguous"
    return "exact" if found == wanted else "wrong"


def judge_of(folder: Path, info: Mapping[str, Any]) -> Callable[[str, Scene | Sample | ImageRecord, Iterable[int | str]], str]:
    """Return the judge of a folder of scenes; all that it needs is in the records."""
    return check_expression
