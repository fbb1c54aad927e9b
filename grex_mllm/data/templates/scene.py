"""What can be said of an image: its instances by category, and what is known of the categories that are not there.

What a category's crowd region hides is unknown, so a category with one is never named in its image. An instance that is too small to see
(SPECK_SHARE) may be counted or not: an expression holds only where it means the same with and without such instances.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from grex_mllm.ops.masks import segmentation_to_mask
from grex_mllm.types import ImageRecord

SPECK_SHARE = 0.0002  # of the image's area: 22 pixels of 384 x 288, where neither category nor number can be seen
# Categories that annotators mix up or that contain each other: none is called absent where another one is present.
CONFUSABLE = (
    {"car", "truck", "bus", "train"},
    {"bicycle", "motorcycle"},
    {"chair", "couch", "bench", "bed"},
    {"handbag", "backpack", "suitcase"},
    {"cup", "wine glass", "bottle", "bowl", "vase"},
    {"fork", "knife", "spoon"},
    {"tv", "laptop", "cell phone", "remote", "keyboard", "mouse"},
    {"oven", "microwave", "toaster", "refrigerator"},
    {"cow", "horse", "sheep"},
    {"dog", "cat", "bear", "teddy bear"},
    {"cake", "donut", "sandwich", "hot dog", "pizza"},
    {"apple", "orange", "banana"},
    {"bird", "kite", "airplane"},
    {"skis", "snowboard", "skateboard", "surfboard"},
    {"baseball bat", "baseball glove", "sports ball", "tennis racket", "frisbee"},
    {"potted plant", "vase", "broccoli", "carrot"},
    {"dining table", "bench", "bed"},
    {"person", "teddy bear"},
    {"tie", "person"},
)
# Words for several categories at once, said only where all of them are labelled.
KINDS = {
    "vehicle": ("bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat"),
    "animal": ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"),
}


@dataclass(frozen=True)
class Thing:
    """One instance: corners and centroid (of the mask) as (x, y) in shares of the image's sides; area as a share of the image's.

    colours: the names that its pixels allow (`colours.py`), none where they were not looked at.
    """

    annotation_id: str
    category: str
    low: tuple[float, float]
    high: tuple[float, float]
    area: float
    centroid: tuple[float, float]
    colours: frozenset[str] | None = None

    def centre(self, axis: int) -> float:
        """Return the centre of the box along an axis (0 = x, 1 = y)."""
        return (self.low[axis] + self.high[axis]) / 2


@dataclass
class Scene:
    """What may be said of an image.

    things: all instances but crowd regions, in the record's order.  blocked: categories that are never named here.
    labelled: categories of which every instance is in the record; None = only those that have one.
    """

    things: tuple[Thing, ...]
    blocked: frozenset[str] = frozenset()
    labelled: frozenset[str] | None = None
    present: frozenset[str] = frozenset()
    aspect: float = 1.0  # width / height
    groups: dict[str, tuple[Thing, ...]] = field(init=False)

    def __post_init__(self) -> None:
        groups: dict[str, list[Thing]] = {}
        for thing in self.things:
            if thing.category not in self.blocked:
                groups.setdefault(thing.category, []).append(thing)
        self.groups = {name: tuple(things) for name, things in groups.items()}
        self.present = self.present | {thing.category for thing in self.things} | self.blocked

    def of(self, categories: Collection[str]) -> tuple[Thing, ...] | None:
        """Return all instances of some categories, none where it is sure that there are none, None where that is unknown."""
        several = len(categories) > 1
        if several and not (self.labelled and self.labelled.issuperset(categories)):
            return None
        found: list[Thing] = []
        for category in categories:
            if category in self.blocked or not (several or category in self.groups or self.is_absent(category)):
                return None
            found += self.groups.get(category, ())
        return tuple(found)

    def is_absent(self, category: str) -> bool:
        """Tell whether a category is provably not in the image: labelled, and no look-alike there."""
        if self.labelled is None or category not in self.labelled or category in self.present:
            return False
        return not any(category in group and group & self.present for group in CONFUSABLE)

    def ids_of(self, ids: Collection[str]) -> tuple[str, ...]:
        """Return annotation ids in the record's order."""
        return tuple(thing.annotation_id for thing in self.things if thing.annotation_id in ids)

    def without_specks(self) -> Scene | None:
        """Return the scene as somebody sees it who overlooks what is hardly visible, None where there is nothing of the kind."""
        seen = tuple(thing for thing in self.things if thing.area >= SPECK_SHARE)
        if len(seen) == len(self.things):
            return None
        return Scene(seen, self.blocked, self.labelled, self.present, self.aspect)


def read_scene(record: ImageRecord, labelled: Iterable[str] | None = None, colours: Mapping[str, Sequence[str]] | None = None) -> Scene:
    """Return the scene of an image record; areas and centroids come from the masks.

    labelled: categories that are exhaustively labelled in this image; None = those that are in it.
    colours: annotation id -> names of the colours that its pixels allow.
    """
    blocked = {instance.category for instance in record.instances if instance.iscrowd}
    things = []
    for instance in record.instances:
        if instance.iscrowd:
            continue
        w, h = record.width, record.height
        x1, y1, x2, y2 = instance.box_xyxy
        if instance.segmentation is None and instance.mask is None:
            area, centroid = (x2 - x1) * (y2 - y1), ((x1 + x2) / 2 / w, (y1 + y2) / 2 / h)
        else:
            mask = segmentation_to_mask(instance.segmentation, h, w) if instance.mask is None else instance.mask
            columns, rows = mask.sum(axis=0), mask.sum(axis=1)
            area = float(columns.sum())
            centroid = (float(np.arange(w) @ columns) / max(area, 1) / w, float(np.arange(h) @ rows) / max(area, 1) / h)
        names = (colours or {}).get(instance.annotation_id)
        low, high = (x1 / w, y1 / h), (x2 / w, y2 / h)
        known = None if names is None else frozenset(names)
        things.append(Thing(instance.annotation_id, instance.category, low, high, area / (w * h), centroid, known))
    return Scene(tuple(things), frozenset(blocked), None if labelled is None else frozenset(labelled), aspect=record.width / record.height)
