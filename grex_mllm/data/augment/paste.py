"""Objects of one photograph put into another (simple copy-paste, Ghiasi et al. 2021, with whole objects in free places)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from grex_mllm.data.augment.truth import Origins
from grex_mllm.data.transforms import instance_mask
from grex_mllm.ops.masks import encode_rle, mask_to_box_xyxy
from grex_mllm.types import Geometry, ImageRecord, Instance, Sample

MOST = 3  # objects that are pasted into an image
LEAST_SHARE, LARGEST_SHARE = 0.003, 0.15  # of the image's area that a pasted object's box takes
RESIZE = (0.6, 1.25)  # of an object, against its share of the photograph that it comes from
PLACES = 8  # tried for an object; the one that hides least is taken
HEIGHT_CHANGE = 0.15  # of the image's height, by which an object is moved up or down at most
MOST_HIDDEN = 0.5  # share of an instance that a pasted object may hide
BORDER_PX = 2.0  # an object that touches the border of its photograph is probably cut by it


def paste_objects(sample: Sample, donor: Sample, rng: np.random.Generator) -> tuple[Sample, Origins] | None:
    """Return the sample with one to three objects of the donor in it, and the origins of all instances of which nothing is hidden.

    None where nothing fits. Expressions are left as they are. Pasted objects come last in the record, under their annotation ids, with a
    mark where the image has the id already. What they hide is taken from the other instances' masks and boxes.
    """
    origins = {instance.annotation_id: (sample.record.image_id, instance.annotation_id) for instance in sample.record.instances}
    candidates = [instance for instance in donor.record.instances if _is_whole(instance, donor.record)]
    wanted = int(rng.integers(1, MOST + 1))
    chosen = [candidates[place] for place in rng.permutation(len(candidates))[:wanted]]
    image, record = sample.image, sample.record
    areas: dict[str, int] = {}
    for instance in chosen:
        cutout = _cut_out(instance, donor, record, rng)
        places = rng.random((PLACES, 2))
        stands = instance.box_xyxy[3] / donor.record.height  # its lower edge stays about as high, so that few float in the sky
        places[:, 1] = stands + HEIGHT_CHANGE * (2 * places[:, 1] - 1)
        spot = None if cutout is None else _free_place(cutout[1], record, areas, places)
        if cutout is None or spot is None:
            continue
        pixels, mask = cutout
        image = np.array(image) if image is sample.image else image
        (x, y), (h, w) = spot, mask.shape
        image[y : y + h, x : x + w][mask] = pixels[mask]
        full = np.zeros((record.height, record.width), bool)
        full[y : y + h, x : x + w] = mask
        name = instance.annotation_id
        while any(name == other.annotation_id for other in record.instances):
            name += "+"
        new = replace(instance, annotation_id=name, box_xyxy=mask_to_box_xyxy(full), segmentation=encode_rle(full), mask=None)
        seen = [_behind(other, full, new, record) for other in record.instances]
        for was, now in zip(record.instances, seen, strict=True):
            if was is not now:
                origins.pop(was.annotation_id, None)
        origins[name] = (donor.record.image_id, instance.annotation_id)
        record = replace(record, instances=[*seen, new])
    return None if image is sample.image else (replace(sample, image=image, record=record, view=None), origins)


def _is_whole(instance: Instance, record: ImageRecord) -> bool:
    x1, y1, x2, y2 = instance.box_xyxy
    inside = min(x1, y1) >= BORDER_PX and x2 <= record.width - BORDER_PX and y2 <= record.height - BORDER_PX
    has_mask = instance.mask is not None or instance.segmentation is not None
    return inside and has_mask and not instance.iscrowd


def _cut_out(instance: Instance, donor: Sample, record: ImageRecord, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray] | None:
    """Return pixels uint8 [h, w, 3] and mask bool [h, w] of an object resized, maybe mirrored; None where that is too small or large."""
    factor = RESIZE[0] * (RESIZE[1] / RESIZE[0]) ** rng.random() * max(record.height, record.width) / max(donor.image.shape[:2])
    mirror = rng.random() < 0.5
    x1, y1, x2, y2 = instance.box_xyxy
    left, top, right, bottom = int(x1), int(y1), int(np.ceil(x2)), int(np.ceil(y2))
    width, height = round((right - left) * factor), round((bottom - top) * factor)
    share = width * height / (record.height * record.width)
    if not LEAST_SHARE <= share <= LARGEST_SHARE or width >= record.width or height >= record.height:
        return None
    h, w = donor.image.shape[:2]
    mask = instance_mask(instance, Geometry(h, w, h, w))[top:bottom, left:right]
    size = (width, height)
    small = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    part = Image.fromarray(np.ascontiguousarray(donor.image[top:bottom, left:right])).resize(size, Image.Resampling.BILINEAR)
    pixels, shape = np.asarray(part), np.asarray(small) > 127
    if not shape.any():
        return None
    return (pixels[:, ::-1], shape[:, ::-1]) if mirror else (pixels, shape)


def _free_place(mask: np.ndarray, record: ImageRecord, areas: dict[str, int], places: np.ndarray) -> tuple[int, int] | None:
    """Return the column and row, among those drawn, where an object hides the smallest part of any other; None where it hides too much.

    areas: of the instances before the first paste, as far as they were asked for.  places: float [P, 2], of the left edge as a share of the
    room across, and of the lower edge as a share of the image's height.
    """
    h, w = mask.shape
    best: tuple[float, tuple[int, int]] | None = None
    boxes = np.array([instance.box_xyxy for instance in record.instances], np.float64).reshape(-1, 4)
    for across, low in places:
        x, y = int(across * (record.width - w + 1)), min(max(round(low * record.height) - h, 0), record.height - h)
        met = (boxes[:, 0] < x + w) & (boxes[:, 2] > x) & (boxes[:, 1] < y + h) & (boxes[:, 3] > y)
        hidden = max((_hidden_share(record.instances[i], mask, (x, y), record, areas) for i in np.flatnonzero(met)), default=0.0)
        if best is None or hidden < best[0]:
            best = hidden, (x, y)
        if hidden == 0:
            break
    return best[1] if best is not None and best[0] <= MOST_HIDDEN else None


def _hidden_share(instance: Instance, mask: np.ndarray, spot: tuple[int, int], record: ImageRecord, areas: dict[str, int]) -> float:
    """Return which share of an instance would be hidden by all that was pasted, with a mask at this spot."""
    (x, y), (h, w) = spot, mask.shape
    other = _full_mask(instance, record)
    area = int(np.count_nonzero(other))
    whole = areas.setdefault(instance.annotation_id, area)
    if instance.iscrowd or whole == 0:
        return 0.0
    return 1 - (area - int(np.count_nonzero(other[y : y + h, x : x + w] & mask))) / whole


def _behind(instance: Instance, front: np.ndarray, new: Instance, record: ImageRecord) -> Instance:
    """Return an instance without the pixels that a new one hides; one without a mask of its own stays a box."""
    a, b = instance.box_xyxy, new.box_xyxy
    apart = a[0] >= b[2] or a[2] <= b[0] or a[1] >= b[3] or a[3] <= b[1]
    if apart or (instance.mask is None and instance.segmentation is None):
        return instance
    mask = _full_mask(instance, record)
    if not (mask & front).any():
        return instance
    seen = mask & ~front
    if instance.mask is not None:
        return replace(instance, mask=seen, box_xyxy=mask_to_box_xyxy(seen))
    return replace(instance, segmentation=encode_rle(seen), box_xyxy=mask_to_box_xyxy(seen))


def _full_mask(instance: Instance, record: ImageRecord) -> np.ndarray:
    return instance_mask(instance, Geometry(record.height, record.width, record.height, record.width))
