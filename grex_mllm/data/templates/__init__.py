"""Templated expressions over any image with instances: true or false by the annotations alone, with margins where a person would hesitate.

What a category's crowd region hides is unknown, so a category with one is never named in its image. The same holds for categories
with an instance too small to see. Margins: MARGIN_POSITION of the image's side between the last that is meant and the first that is not,
MARGIN_SIZE as a ratio of areas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from operator import attrgetter

import numpy as np

from grex_mllm.data.plurals import number_word, plural_phrase, singular_phrase
from grex_mllm.ops.masks import segmentation_to_mask
from grex_mllm.types import ImageRecord

MARGIN_POSITION = 0.05
MARGIN_SIZE = 1.4
SMALLEST_SHARE = 0.0006  # of the image's area
MOST_ABSENT = 6
MOST_NAMED = 8  # larger groups are neither counted nor compared
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
SUPERCATEGORIES = {"animal": "animals", "vehicle": "vehicles"}  # those whose members everybody calls so


@dataclass(frozen=True)
class Statement:
    """An expression with its truth. kind: the phenomenon; targets: annotation ids in the record's order."""

    expression: str
    targets: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class Thing:
    """One instance as the templates see it: corners and centroid (of the mask) as (x, y) in shares of the image's sides; area in pixels."""

    annotation_id: str
    low: tuple[float, float]
    high: tuple[float, float]
    area: int
    centroid: tuple[float, float]

    def centre(self, axis: int) -> float:
        return (self.low[axis] + self.high[axis]) / 2


@dataclass
class Scene:
    """What may be said of an image.

    groups: category -> all its instances, for the categories that can be named.  present: all categories.  order: annotation ids.
    """

    groups: dict[str, list[Thing]]
    present: set[str]
    order: list[str]

    def ids(self, things: Iterable[Thing]) -> tuple[str, ...]:
        chosen = {thing.annotation_id for thing in things}
        return tuple(name for name in self.order if name in chosen)


def read_scene(record: ImageRecord) -> Scene:
    """Return the scene of an image record; areas come from the masks."""
    blocked: set[str] = set()
    groups: dict[str, list[Thing]] = {}
    for instance in record.instances:
        if instance.iscrowd:
            blocked.add(instance.category)
            continue
        mask = segmentation_to_mask(instance.segmentation, record.height, record.width)
        area = int(np.count_nonzero(mask))
        if area < SMALLEST_SHARE * record.height * record.width:
            blocked.add(instance.category)
        x1, y1, x2, y2 = instance.box_xyxy
        w, h = record.width, record.height
        centroid = (float(np.arange(w) @ mask.sum(axis=0)) / max(area, 1) / w, float(np.arange(h) @ mask.sum(axis=1)) / max(area, 1) / h)
        thing = Thing(instance.annotation_id, (x1 / w, y1 / h), (x2 / w, y2 / h), area, centroid)
        groups.setdefault(instance.category, []).append(thing)
    present = {instance.category for instance in record.instances}
    order = [instance.annotation_id for instance in record.instances]
    return Scene({name: things for name, things in groups.items() if name not in blocked}, present, order)


def true_statements(scene: Scene, supercategory: dict[str, str]) -> dict[str, list[Statement]]:
    """Return statements with at least one target, by kind. supercategory: of each category, {} where unknown."""
    builders: list[Callable[[Scene], Iterable[Statement]]] = [_category, _count, _position, _side, _size, _exclusion, _conjunction]
    found = [statement for builder in builders for statement in builder(scene)]
    return _by_kind([*found, *_super_exclusion(scene, supercategory)])


def false_statements(scene: Scene, cooccurrence: Counter[tuple[str, str]]) -> dict[str, list[Statement]]:
    """Return deceptive no-target statements by kind: absent categories that often come with what is there, and too high counts.

    cooccurrence: (category, category) -> number of images that hold both.
    """
    absent = absent_categories(scene, cooccurrence)
    texts = []
    for one, many in ((singular_phrase(name), plural_phrase(name)) for name in absent):
        texts += [
            f"the {one}",
            f"all the {many}",
            f"the two {many}",
            f"the leftmost {one}",
            f"the largest {one}",
            f"the {many} on the right",
        ]
    texts += [f"the {plural_phrase(first)} and the {plural_phrase(second)}" for first, second in combinations(absent, 2)]
    found = [Statement(text, (), "absent_category") for text in texts]
    for name, things in scene.groups.items():
        for wrong in range(len(things) + 1, len(things) + 4):  # a lower count would hold of some of them
            if len(things) <= MOST_NAMED and wrong > 1:
                found.append(Statement(f"the {number_word(wrong)} {plural_phrase(name)}", (), "wrong_count"))
    return _by_kind(found)


def _by_kind(statements: Iterable[Statement]) -> dict[str, list[Statement]]:
    found: dict[str, list[Statement]] = {}
    for statement in statements:
        found.setdefault(statement.kind, []).append(statement)
    return found


def absent_categories(scene: Scene, cooccurrence: Counter[tuple[str, str]]) -> list[str]:
    """Return up to MOST_ABSENT absent categories that share most images with the present ones, none that looks like a present one."""
    excluded = scene.present.union(*(group for group in CONFUSABLE if group & scene.present))
    score: Counter[str] = Counter()
    for (here, other), number in cooccurrence.items():
        if here in scene.present and other not in excluded:
            score[other] += number
    return [name for name, _ in sorted(score.items(), key=lambda item: (-item[1], item[0]))[:MOST_ABSENT]]


def count_cooccurrence(records: Iterable[ImageRecord]) -> Counter[tuple[str, str]]:
    """Return, for ordered pairs of categories, in how many images both stand."""
    pairs: Counter[tuple[str, str]] = Counter()
    for record in records:
        names = sorted({instance.category for instance in record.instances})
        pairs.update((a, b) for a in names for b in names if a != b)
    return pairs


def _category(scene: Scene) -> Iterable[Statement]:
    for name, things in scene.groups.items():
        many = plural_phrase(name)
        texts = (
            [f"the {singular_phrase(name)}"] if len(things) == 1 else [f"all the {many}", f"the {many}", f"every {singular_phrase(name)}"]
        )
        yield from (Statement(text, scene.ids(things), "category") for text in texts)


def _count(scene: Scene) -> Iterable[Statement]:
    for name, things in scene.groups.items():
        if 2 <= len(things) <= MOST_NAMED:
            yield Statement(f"the {number_word(len(things))} {plural_phrase(name)}", scene.ids(things), "count")


def _extremes(things: list[Thing]) -> Iterable[tuple[str, str, list[Thing]]]:
    """Yield (adjective, other wording, the first k in that direction) where centres, centroids and outer edges agree, with the margin."""
    words = {
        (0, True): ("leftmost", "furthest to the left"),
        (0, False): ("rightmost", "furthest to the right"),
        (1, True): ("topmost", "highest up in the picture"),
        (1, False): ("bottommost", "lowest in the picture"),
    }
    for (axis, low), (adjective, wording) in words.items():
        sign, edge = (1, attrgetter("low")) if low else (-1, attrgetter("high"))
        ranked = sorted(things, key=lambda thing: sign * thing.centre(axis))
        for k in (1, 2, 3):
            if len(ranked) < k + (1 if k == 1 else 2) or len(ranked) > MOST_NAMED:
                continue
            inside, outside = ranked[:k], ranked[k:]
            centres = min(sign * thing.centre(axis) for thing in outside) - max(sign * thing.centre(axis) for thing in inside)
            centroids = min(sign * thing.centroid[axis] for thing in outside) - max(sign * thing.centroid[axis] for thing in inside)
            edges = min(sign * edge(thing)[axis] for thing in outside) - max(sign * edge(thing)[axis] for thing in inside)
            if min(centres, centroids) >= MARGIN_POSITION and edges >= 0:
                yield adjective, wording, inside


def _position(scene: Scene) -> Iterable[Statement]:
    for name, things in scene.groups.items():
        for adjective, wording, chosen in _extremes(things):
            if len(chosen) == 1:
                texts = [f"the {adjective} {singular_phrase(name)}", f"the {singular_phrase(name)} {wording}"]
            else:
                texts = [f"the {number_word(len(chosen))} {adjective} {plural_phrase(name)}"]
            yield from (Statement(text, scene.ids(chosen), "position") for text in texts)


def _side(scene: Scene) -> Iterable[Statement]:
    """Speak of a half of the picture only if every instance of the category lies clearly in one of the halves."""
    for name, things in scene.groups.items():
        for axis, words in ((0, ("on the left", "on the right")), (1, ("at the top", "at the bottom"))):
            low = [thing for thing in things if thing.high[axis] <= 0.5]
            high = [thing for thing in things if thing.low[axis] >= 0.5]
            if len(low) + len(high) != len(things) or not low or not high:
                continue
            for chosen, word in zip((low, high), words, strict=True):
                noun = singular_phrase(name) if len(chosen) == 1 else plural_phrase(name)
                yield Statement(f"the {noun} {word}", scene.ids(chosen), "side")


def _largest_and_smallest(things: list[Thing]) -> Iterable[tuple[str, Thing]]:
    if 2 <= len(things) <= MOST_NAMED:
        ranked = sorted(things, key=lambda thing: thing.area)
        if ranked[-1].area >= MARGIN_SIZE * ranked[-2].area:
            yield "largest", ranked[-1]
        if ranked[1].area >= MARGIN_SIZE * ranked[0].area:
            yield "smallest", ranked[0]


def _size(scene: Scene) -> Iterable[Statement]:
    for name, things in scene.groups.items():
        for adjective, thing in _largest_and_smallest(things):
            yield Statement(f"the {adjective} {singular_phrase(name)}", scene.ids([thing]), "size")


def _exclusion(scene: Scene) -> Iterable[Statement]:
    for name, things in scene.groups.items():
        if len(things) < 3:
            continue
        left_out = [(adjective, chosen) for adjective, _, chosen in _extremes(things) if len(chosen) == 1]
        left_out += [(adjective, [thing]) for adjective, thing in _largest_and_smallest(things)]
        for adjective, chosen in left_out:
            rest = [thing for thing in things if thing not in chosen]
            yield Statement(f"all the {plural_phrase(name)} except the {adjective} one", scene.ids(rest), "exclusion")
            yield Statement(f"every {singular_phrase(name)} but the {adjective} one", scene.ids(rest), "exclusion")


def _super_exclusion(scene: Scene, supercategory: dict[str, str]) -> Iterable[Statement]:
    for word, plural in SUPERCATEGORIES.items():
        members = {name for name in scene.present if supercategory.get(name) == word}
        if len(members) < 2 or not members <= scene.groups.keys():
            continue
        for name in sorted(members):
            rest = [thing for other in members - {name} for thing in scene.groups[other]]
            if len(rest) < 2:
                continue
            noun = singular_phrase(name) if len(scene.groups[name]) == 1 else plural_phrase(name)
            yield Statement(f"all the {plural} except the {noun}", scene.ids(rest), "exclusion")


def _conjunction(scene: Scene) -> Iterable[Statement]:
    single = [
        statement for builder in (_category, _position, _size) for statement in builder(scene) if statement.expression.startswith("the ")
    ]
    category_of = {thing.annotation_id: name for name, things in scene.groups.items() for thing in things}
    for first, second in combinations(single, 2):
        if category_of[first.targets[0]] != category_of[second.targets[0]]:
            targets = tuple(name for name in scene.order if name in first.targets or name in second.targets)
            yield Statement(f"{first.expression} and {second.expression}", targets, "conjunction")


def draw_statements(
    scene: Scene,
    cooccurrence: Counter[tuple[str, str]],
    supercategory: dict[str, str],
    *,
    num: int,
    no_target_share: float,
    rng: np.random.Generator,
) -> list[Statement]:
    """Draw up to `num` different statements: first whether there is a target, then the kind among those possible here, then the words."""
    pools = {True: true_statements(scene, supercategory), False: false_statements(scene, cooccurrence)}
    drawn: list[Statement] = []
    for _ in range(num):
        has_target = bool(rng.random() >= no_target_share)
        pool = pools[has_target]
        if not pool or not pools[True]:
            continue
        kind = sorted(pool)[int(rng.integers(len(pool)))]
        drawn.append(pool[kind].pop(int(rng.integers(len(pool[kind])))))
        if not pool[kind]:
            del pool[kind]
    return drawn
