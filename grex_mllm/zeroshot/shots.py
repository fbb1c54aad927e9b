"""Examples from the train split, as earlier turns of a chat: the question as it will be asked, the answer as the family writes it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from grex_mllm.data.dataset import read_once
from grex_mllm.data.images import load_image, resolve_image
from grex_mllm.data.records import Dataset
from grex_mllm.errors import fault
from grex_mllm.predictors.protocol import Item
from grex_mllm.types import ExpressionRecord
from grex_mllm.zeroshot.asking import show_set
from grex_mllm.zeroshot.base import Picture, Turn, View
from grex_mllm.zeroshot.families import Family
from grex_mllm.zeroshot.marks import Shown, shown_objects
from grex_mllm.zeroshot.prompts import Prompt

NOTHING, SEVERAL, SINGLE = "nothing", "several", "single"


@dataclass(frozen=True, eq=False)
class Shot:
    """item: an image of the train split.  record: one of its expressions."""

    item: Item
    record: ExpressionRecord


def choose_shots(
    folder: str | Path,
    count: int,
    seed: int,
    *,
    split: str = "train",
    image_root: str | Path | None = None,
    avoid: Collection[str] = (),
    targeted: bool = False,
) -> list[Shot]:
    """Return `count` expressions of different images, the same ones for the same seed and records.

    Of two or more, one has several targets and one has none, where the split holds such; all others have one; the order is drawn.
    avoid: ids of images that are not to be taken.  targeted: none without targets (for generation).

    Raises:
        GrexError: no such folder or split, or too few images.
    """
    dataset = read_once(folder, image_root)
    rng = np.random.default_rng([seed, count])
    records = sorted(dataset.expressions_of(split), key=lambda record: record.expression_id)
    records = [records[n] for n in rng.permutation(len(records)) if records[n].image_id not in avoid]
    kinds = {kind: [record for record in records if _kind(record) == kind] for kind in (SEVERAL, NOTHING, SINGLE)}
    wanted = ([SEVERAL] if count > 1 else []) + ([NOTHING] if count > 1 and not targeted else [])
    chosen: list[Shot] = []
    for kind in wanted + [SINGLE] * (count - len(wanted)):
        others = [
            record for name in (SINGLE, SEVERAL, NOTHING) if name != kind and not (targeted and name == NOTHING) for record in kinds[name]
        ]
        taken = {shot.record.image_id for shot in chosen}
        made = (_shot(dataset, record) for record in kinds[kind] + others if record.image_id not in taken)
        found = next((shot for shot in made if shot is not None), None)
        if found is None:
            raise fault(
                f'{count} examples of split "{split}" of {folder}', f"at most {len(chosen)}, each of another image", "ask for fewer"
            )
        chosen.append(found)
    return [chosen[n] for n in rng.permutation(count)]


def shot_turns(shots: Sequence[Shot], prompt: Prompt, family: Family, view_of: Callable[[int, int], View]) -> tuple[Turn, ...]:
    """Return the turns of examples for a prompt: user and assistant in turn.

    view_of: of an original (width, height), see `Asking.view_of`.

    Raises:
        GrexError: a prompt that wants answers of another form than the family writes, or an example that cannot be shown.
    """
    if prompt.answer and (prompt.frame, prompt.order) != (family.frame, family.order):
        given = f"examples for prompt {prompt.name} in {prompt.frame} {prompt.order}"
        raise fault(given, f"{family.frame} {family.order}, as {family.name} writes", "choose another prompt, or no examples")
    turns: list[Turn] = []
    for shot in shots:
        view = view_of(shot.item.record.width, shot.item.record.height)
        pictures: tuple[Picture, ...] = (Picture(shot.item.image),)
        targets = tuple(sorted(shot.record.targets))
        if prompt.task == "greg":
            pictures, words = show_set(shot.item, targets, prompt, family, view)
        else:
            words = {"expression": shot.record.raw}
        turns.append(Turn("user", (*pictures, prompt.render(view, **words)[1])))
        turns.append(Turn("assistant", (_answer(shot, targets, prompt, family, view),)))
    return tuple(turns)


def _answer(shot: Shot, targets: tuple[str, ...], prompt: Prompt, family: Family, view: View) -> str:
    if prompt.task == "greg":
        return shot.record.raw
    if prompt.task == "count":
        return str(len(targets))
    if prompt.task == "exists":
        return "Yes" if targets else "No"
    if not targets:
        return family.write_nothing()
    objects = shown_objects(shot.item, targets)
    if prompt.answer == "points" and family.write_points is not None:
        return family.write_points(np.asarray([_deepest(shown) for shown in objects], np.float64), view, shot.record.raw)
    if prompt.answer == "polygons" and family.write_polygons is not None:
        return family.write_polygons([_outline(shown, shot.item, target) for shown, target in zip(objects, targets)], view, shot.record.raw)
    if prompt.answer == "masks" and family.write_masks is not None:
        return family.write_masks([shown.mask for shown in objects], shot.record.raw)
    if prompt.answer == "boxes":
        return family.write(np.asarray([shown.box_xyxy for shown in objects], np.float64), view, shot.record.raw)
    raise fault(f"examples with {prompt.answer} for {family.name}", "a kind of answer that the family writes", "choose another prompt")


def _kind(record: ExpressionRecord) -> str:
    return (NOTHING, SINGLE, SEVERAL)[min(len(record.targets), 2)]


def _shot(dataset: Dataset, record: ExpressionRecord) -> Shot | None:
    """Return an example; None where a target is a crowd region, which no one can select."""
    image = dataset.images[record.image_id]
    if not set(record.targets) <= {instance.annotation_id for instance in image.instances if not instance.iscrowd}:
        return None
    file = resolve_image(dataset.image_root, image.file)
    return Shot(Item(image, file, partial(load_image, file)), record)


def _deepest(shown: Shown) -> tuple[float, float]:
    """Return the point of an object that lies farthest from its edge."""
    from scipy.ndimage import distance_transform_edt

    depth = distance_transform_edt(np.pad(shown.mask, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(int(depth.argmax()), depth.shape)
    return float(x) + 0.5, float(y) + 0.5


def _outline(shown: Shown, item: Item, target: str) -> np.ndarray:
    """Return the largest polygon [P, 2] of an object, or its box where it has none."""
    instance = next(instance for instance in item.instances if instance.annotation_id == target)
    if isinstance(instance.segmentation, list) and instance.segmentation:
        parts = [np.asarray(part, np.float64).reshape(-1, 2) for part in instance.segmentation if len(part) >= 6 and len(part) % 2 == 0]
        if parts:
            return max(parts, key=lambda part: float(np.prod(part.max(axis=0) - part.min(axis=0))))
    x1, y1, x2, y2 = shown.box_xyxy
    return np.asarray([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], np.float64)
