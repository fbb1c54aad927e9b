"""From the original image to the network's input, with everything that lies on it, and the way back.

Three ways to resize: `squash` (exactly S x S, aspect ignored: the released ReLA), `pad` (longest side to S, padded right and bottom) and
`letterbox` (longest side to S, centred on grey, which the network sees: the systems with Darknet).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from grex_mllm.errors import GrexError, fault
from grex_mllm.ops.boxes import clip_boxes, cxcywh_to_xyxy, xyxy_to_cxcywh
from grex_mllm.ops.masks import resize_mask_nearest, segmentation_to_mask
from grex_mllm.types import Geometry, ImageRecord, Instance, Sample

if TYPE_CHECKING:
    from torch import Tensor

GREY = 128  # of letterbox: 0.5, rounded to a byte


@dataclass
class Prepared:
    """One sample at network input size S x S (the padding of `pad` is zero).

    image: uint8 [S, S, 3].  instances: the N selectable ones (no crowd regions), in the record's order.
    instance_masks: bool [N, S, S]; the filled box where an instance has no mask.  has_mask: bool [N].
    instance_boxes_norm: float32 [N, 4] cxcywh in [0, 1] of S x S.
    """

    image: np.ndarray
    geometry: Geometry
    instances: list[Instance]
    instance_masks: np.ndarray
    has_mask: np.ndarray
    instance_boxes_norm: np.ndarray


def selectable_instances(record: ImageRecord) -> list[Instance]:
    """Return the instances that can be targets: all but crowd regions, in the record's order (`Batch.target_index` counts these)."""
    return [instance for instance in record.instances if not instance.iscrowd]


def prepare(sample: Sample, image_size: int, resize: str = "squash") -> Prepared:
    """Resize image, masks and boxes of a sample to S = image_size.

    `squash` equals the released preprocessing bit for bit: PIL BILINEAR on uint8; polygons scaled by coordinates and rasterised at S x S.

    Raises:
        GrexError: unknown `resize`, or a segmentation that does not fit the image.
    """
    height, width = sample.image.shape[:2]
    image, geometry = resize_image(sample.image, image_size, resize, sample.scale)
    instances = selectable_instances(sample.record)
    masks = np.zeros((len(instances), image_size, image_size), bool)
    for position, instance in enumerate(instances):
        try:
            masks[(position, *geometry.inner)] = instance_mask(instance, geometry)
        except GrexError as error:
            raise GrexError(f"image {sample.record.image_id}, annotation {instance.annotation_id}: {error}") from None
    boxes = np.asarray([instance.box_xyxy for instance in instances], np.float64).reshape(-1, 4)
    boxes = clip_boxes(boxes, height, width) * [geometry.scale_x, geometry.scale_y, geometry.scale_x, geometry.scale_y]
    boxes = (boxes + [geometry.left, geometry.top, geometry.left, geometry.top]) / image_size
    has_mask = np.asarray([instance.mask is not None or instance.segmentation is not None for instance in instances], bool)
    return Prepared(image, geometry, instances, masks, has_mask, xyxy_to_cxcywh(boxes).astype(np.float32))


def fit(height: int, width: int, image_size: int, resize: str, scale: float = 1.0) -> Geometry:
    """Return how an image of this size lies in the S x S input. scale: share of S that its longest side takes, in (0, 1].

    Raises:
        GrexError: unknown `resize`.
    """
    if resize == "squash":
        side = max(1, round(image_size * scale))
        return Geometry(height, width, side, side)
    if resize in ("pad", "letterbox"):
        factor = image_size * scale / max(height, width)
        rows, columns = max(1, round(height * factor)), max(1, round(width * factor))
        if resize == "pad":
            return Geometry(height, width, rows, columns)
        top, left = (image_size - rows) // 2, (image_size - columns) // 2
        return Geometry(height, width, rows, columns, top, left, image_size - rows - top, image_size - columns - left)
    raise fault(f'resize "{resize}"', "squash, pad or letterbox", "fix data.resize in the configuration")


def resize_image(image: np.ndarray, image_size: int, resize: str = "squash", scale: float = 1.0) -> tuple[np.ndarray, Geometry]:
    """Return an image uint8 [H0, W0, 3] at network input size, uint8 [S, S, 3], and how it lies there.

    PIL BILINEAR on uint8, zeros right and below the image, or grey all around it. scale: see `fit`.

    Raises:
        GrexError: unknown `resize`.
    """
    geometry = fit(image.shape[0], image.shape[1], image_size, resize, scale)
    inner = (geometry.input_height, geometry.input_width)
    if image.shape[:2] != inner:
        image = np.asarray(Image.fromarray(image).resize(inner[::-1], Image.Resampling.BILINEAR))
    if inner == (image_size, image_size):
        return image, geometry
    padded = np.full((image_size, image_size, 3), GREY if resize == "letterbox" else 0, np.uint8)
    padded[geometry.inner] = image
    return padded, geometry


def instance_mask(instance: Instance, geometry: Geometry) -> np.ndarray:
    """Return bool [input_height, input_width]: polygons rasterised there, codes and pixel masks by nearest neighbour, else the filled box.

    Raises:
        GrexError: a mask of another size than the image, or a malformed segmentation.
    """
    height, width = geometry.input_height, geometry.input_width
    if instance.mask is not None:
        if instance.mask.shape != (geometry.height, geometry.width):
            raise fault(f"mask of shape {instance.mask.shape}", f"{(geometry.height, geometry.width)}, as the image", "fix the mask")
        return resize_mask_nearest(instance.mask, height, width)
    if instance.segmentation is not None:
        return segmentation_to_mask(instance.segmentation, geometry.height, geometry.width, height, width)
    x1, y1, x2, y2 = (float(edge) for edge in instance.box_xyxy)
    columns, rows = (np.arange(width) + 0.5) / geometry.scale_x, (np.arange(height) + 0.5) / geometry.scale_y
    return ((rows >= y1) & (rows <= y2))[:, None] & ((columns >= x1) & (columns <= x2))[None]


def values_to_original(values: Tensor, geometry: Geometry, input_size: tuple[int, int] | None = None) -> Tensor:
    """Resample maps [..., h, w] over the network input to the original size [..., H0, W0], bilinear, in one step.

    input_size: (height, width) in pixels that h x w covers, padding included; default: the resized image without padding. Cells that lie in
    padding or margins alone are never read. Without them this equals `interpolate(align_corners=False)`.
    """
    height, width = input_size or geometry.seen_size
    rows = _cells(geometry.height, geometry.input_height, height, values.shape[-2], values, geometry.top)
    columns = _cells(geometry.width, geometry.input_width, width, values.shape[-1], values, geometry.left)
    low, high, weight = rows
    values = values[..., low, :] * (1 - weight)[:, None] + values[..., high, :] * weight[:, None]
    low, high, weight = columns
    return values[..., low] * (1 - weight) + values[..., high] * weight


def mask_to_original(values: Tensor, geometry: Geometry, input_size: tuple[int, int] | None = None) -> Tensor:
    """Return bool [..., H0, W0]: True where the resampled logits exceed 0.

    For two-channel logits pass target minus background: upsampling is linear, so this is the argmax. Sizes as in `values_to_original`.
    """
    return values_to_original(values, geometry, input_size) > 0


def boxes_to_original(boxes_norm: Tensor, geometry: Geometry, input_size: tuple[int, int] | None = None) -> Tensor:
    """Return xyxy [..., 4] in pixels of the original image, clipped to it, of cxcywh boxes in [0, 1] of the network input.

    input_size: (height, width) of the network input, padding included; default: no padding. Takes numpy arrays and tensors.
    """
    height, width = input_size or geometry.seen_size
    factor_x, factor_y = width / geometry.scale_x, height / geometry.scale_y
    boxes = cxcywh_to_xyxy(boxes_norm)
    boxes[..., 0::2] = boxes[..., 0::2] * factor_x - geometry.left / geometry.scale_x
    boxes[..., 1::2] = boxes[..., 1::2] * factor_y - geometry.top / geometry.scale_y
    return clip_boxes(boxes, geometry.height, geometry.width)


def _cells(original: int, valid: int, total: int, cells: int, like: Tensor, margin: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for each original pixel, its two neighbouring cells and the weight of the second (half-pixel centres, valid cells only)."""
    import torch

    first, last = margin * cells // total, max(0, -(-(margin + valid) * cells // total) - 1)
    place = (torch.arange(original, device=like.device, dtype=torch.float64) + 0.5) * (valid / original * cells / total) - 0.5
    place = (place + margin * cells / total).clamp(first, last)
    low = place.floor().long()
    return low, (low + 1).clamp(max=last), (place - low).to(like.dtype if like.is_floating_point() else torch.float32)


def input_masks(masks: np.ndarray, geometry: Geometry, input_size: tuple[int, int]) -> Tensor:
    """Bring bool masks [N, H0, W0] to the network input [N, H, W]; a mask that vanishes there keeps the pixel nearest to its middle."""
    import torch

    placed = np.zeros((len(masks), *input_size), bool)
    for i, mask in enumerate(masks):
        small = resize_mask_nearest(mask, geometry.input_height, geometry.input_width)
        if not small.any():
            y, x = (int(np.median(v)) for v in np.nonzero(mask))
            small[min(int(y * geometry.scale_y), small.shape[0] - 1), min(int(x * geometry.scale_x), small.shape[1] - 1)] = True
        placed[(i, *geometry.inner)] = small
    return torch.from_numpy(placed)
