"""Training samples varied so that every expression stays true of what is seen: a pure function of the sample and the numbers drawn.

What is true after a cut or a paste is decided where expressions come from templates (`truth.py`). Elsewhere a cut takes all instances
whole and leaves out expressions that speak of places in the picture, and nothing is pasted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from grex_mllm.augmentation import AugmentConfig
from grex_mllm.data.augment.geometry import Window, crop_record, instance_area, mirror_record
from grex_mllm.data.augment.paste import paste_objects
from grex_mllm.data.augment.pixels import change_colours
from grex_mllm.data.augment.truth import ChangedScene, Origins
from grex_mllm.data.augment.words import has_colour_word, has_place_word, mirrored_expression
from grex_mllm.types import ImageRecord, Instance, Sample

KEPT_SHARE = 0.75  # a cut after which fewer of a sample's expressions are true is not made
ASPECT = 4 / 3  # a window is at most so much wider, or higher, than the image is
WINDOWS = 4  # drawn for a cut; the one that leaves the fewest slivers of other instances is taken
SLIVER = 0.3  # share of a box below which what is left of an instance is hard to recognise
LEAST_PIXELS = 32.0  # of a target, at network size, that shrinking leaves


@dataclass(frozen=True)
class Surroundings:
    """What is known about a sample beside itself.

    scene: reads a changed image, to judge what is said of it; None where what expressions mean cannot be computed.  donor: draws another
    sample of the same source, to take objects from; None where there is none.  image_size: S of the network's input; 0 = unknown.
    """

    scene: Callable[[ImageRecord, Origins], ChangedScene] | None = None
    donor: Callable[[Sample, np.random.Generator], Sample | None] | None = None
    image_size: int = 0


def augment(sample: Sample, config: AugmentConfig, rng: np.random.Generator, surroundings: Surroundings | None = None) -> Sample:
    """Return a sample varied as the configuration says, with at least one expression; the sample given stays as it is.

    Paste or else cut, then flip, colours, size. An expression that a cut makes untrue is left out of this sample; after a paste others are
    drawn in its place. A sample with an expression that cannot be mirrored is not flipped.
    """
    around = surroundings or Surroundings()
    paste, cut, flip, colour = rng.random(4) < [config.paste, config.crop, config.flip, config.colour]
    numbers, zoom, fit = rng.uniform(-1, 1, 4), rng.random(), rng.random()
    low, high = min(config.scale[0], 1.0), max(config.scale[1], 1.0)
    pasted = _pasted(sample, around, rng) if paste else None
    if pasted is not None:
        sample = pasted
    elif cut:
        sample = _cut(sample, around, high**zoom, rng)
    if flip:
        sample = flipped(sample)
    if colour:
        keep_hues = any(has_colour_word(text) for e in sample.expressions for text in (e.raw, e.expression))
        sample = replace(sample, image=change_colours(sample.image, numbers, keep_hues=keep_hues), view=None)
    if low == 1:
        return sample
    return replace(sample, scale=max(low**fit, _least_scale(sample, around.image_size)), view=None)


def flipped(sample: Sample) -> Sample:
    """Return the sample mirrored, picture and words; as it is where one of its expressions cannot be mirrored."""
    expressions = [mirrored_expression(expression) for expression in sample.expressions]
    kept = [expression for expression in expressions if expression is not None]
    if len(kept) < len(expressions):
        return sample
    view = sample.view and f"{sample.view}/flip"
    return replace(sample, image=sample.image[:, ::-1], record=mirror_record(sample.record), expressions=kept, view=view)


def cropped(sample: Sample, window: Window, around: Surroundings) -> Sample:
    """Return a window of the sample with those of its expressions that are still true, maybe none.

    Where nothing judges them, the window must hold all instances whole, and expressions that speak of places in the picture are left out.
    """
    record = crop_record(sample.record, window)
    image = sample.image[window.top : window.bottom, window.left : window.right]
    if around.scene is None:
        kept = [e for e in sample.expressions if not (has_place_word(e.raw) or has_place_word(e.expression))]
    else:
        scene = around.scene(record, _untouched(sample.record, record))
        kept = [expression for expression in sample.expressions if scene.holds(expression)]
    return replace(sample, image=image, record=record, expressions=kept, view=None)


def _untouched(before: ImageRecord, after: ImageRecord) -> dict[str, tuple[str, str]]:
    """Return the origins of the instances that are as large as before: what is cut or hidden loses a side of its box, or pixels."""
    known = {instance.annotation_id: instance for instance in before.instances}
    found = {}
    for now in after.instances:
        was = known.get(now.annotation_id)
        if was is not None and np.abs(np.subtract(_size(now.box_xyxy), _size(was.box_xyxy))).max() < 1e-6:
            found[now.annotation_id] = (before.image_id, now.annotation_id)
    return found


def _size(box: list[float]) -> tuple[float, float]:
    return box[2] - box[0], box[3] - box[1]


def draw_window(sample: Sample, around: Iterable[Instance], zoom: float, rng: np.random.Generator) -> Window | None:
    """Draw a window that holds the instances `around` whole and enlarges the image up to `zoom`; None where that is the whole image."""
    height, width = sample.record.height, sample.record.width
    boxes = np.array([instance.box_xyxy for instance in around], np.float64).reshape(-1, 4)
    drawn = rng.random((WINDOWS, 3))
    best: tuple[int, Window] | None = None
    for aspect, across, down in drawn:
        stretch = ASPECT ** (aspect - 0.5)
        ends = []
        for axis, (side, factor, place) in enumerate(((width, stretch, across), (height, 1 / stretch, down))):
            low = max(int(np.floor(boxes[:, axis].min())), 0) if len(boxes) else side
            high = min(int(np.ceil(boxes[:, axis + 2].max())), side) if len(boxes) else 0
            length = max(min(round(side / zoom * factor), side), high - low, 1)
            first, last = max(high - length, 0), min(low, side - length)
            start = first + int(place * (last - first + 1))
            ends.append((start, start + length))
        window = Window(ends[0][0], ends[1][0], ends[0][1], ends[1][1])
        slivers = _num_slivers(sample.record, window)
        if best is None or slivers < best[0]:
            best = slivers, window
    assert best is not None
    return None if best[1] == (0, 0, width, height) else best[1]


def _num_slivers(record: ImageRecord, window: Window) -> int:
    boxes = np.array([instance.box_xyxy for instance in record.instances if not instance.iscrowd], np.float64).reshape(-1, 4)
    size = np.maximum(boxes[:, 2:] - boxes[:, :2], 1e-6)
    inside = np.maximum(np.minimum(boxes[:, 2:], window[2:]) - np.maximum(boxes[:, :2], window[:2]), 0)
    share = inside.prod(axis=1) / size.prod(axis=1)
    return int(((share > 0) & (share < SLIVER)).sum())


def _cut(sample: Sample, around: Surroundings, zoom: float, rng: np.random.Generator) -> Sample:
    """Return a window of the sample, or the sample where no such window keeps enough of its expressions."""
    wanted = {target for expression in sample.expressions for target in expression.targets}
    instances = [i for i in sample.record.instances if (not i.iscrowd if around.scene is None else i.annotation_id in wanted)]
    window = draw_window(sample, instances, zoom, rng)
    if window is None:
        return sample
    cut = cropped(sample, window, around)
    return cut if len(cut.expressions) >= max(1.0, KEPT_SHARE * len(sample.expressions)) else sample


def _pasted(sample: Sample, around: Surroundings, rng: np.random.Generator) -> Sample | None:
    """Return the sample with objects of another one; None where that cannot be judged, or nothing finds a place or a word."""
    donor = around.donor(sample, rng) if around.scene is not None and around.donor is not None else None
    pasted = None if donor is None else paste_objects(sample, donor, rng)
    if pasted is None or around.scene is None:
        return None
    changed, origins = pasted
    scene = around.scene(changed.record, origins)
    kept = [expression for expression in sample.expressions if scene.holds(expression)]
    kept += scene.draw(len(sample.expressions) - len(kept), rng, sample.expressions[0])
    return replace(changed, expressions=kept) if kept else None


def _least_scale(sample: Sample, image_size: int) -> float:
    """Return the share of the network's side below which the smallest target would have fewer than LEAST_PIXELS."""
    wanted = {target for expression in sample.expressions for target in expression.targets}
    areas = [instance_area(instance) for instance in sample.record.instances if instance.annotation_id in wanted]
    if not areas or image_size == 0:
        return 0.0
    full = image_size / max(sample.record.height, sample.record.width)
    return min(1.0, float(np.sqrt(LEAST_PIXELS / max(min(areas), 1e-6))) / full)
