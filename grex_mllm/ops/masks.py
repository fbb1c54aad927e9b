"""Masks: polygons and COCO run-length codes to pixels and back, at the original and at the network's input size.

Polygons are rasterised by pycocotools (as the released ReLA does), so that evaluation at the input size is reproduced bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from grex_mllm.errors import GrexError, fault

MAX_MASK_PIXELS = 64_000_000  # the same limit as for images: a mask belongs to an image
MAX_CHARACTERS_PER_RUN = 7  # 35 bits: far beyond the largest mask
MIN_POLYGON_NUMBERS = 6  # three points


def usable_polygons(segmentation: Any) -> list[list[float]]:
    """Return the polygons of at least three points with an even number of coordinates (the released loader drops the others)."""
    if not isinstance(segmentation, list):
        return []
    return [polygon for polygon in segmentation if len(polygon) % 2 == 0 and len(polygon) >= MIN_POLYGON_NUMBERS]


def segmentation_to_mask(
    segmentation: Any, height: int, width: int, out_height: int | None = None, out_width: int | None = None
) -> np.ndarray:
    """Return bool [out_height, out_width] (default: the original size) of a COCO segmentation of a [height, width] image.

    Polygons are scaled by coordinates (x * out_width / width, y * out_height / height) and rasterised at the output size, OR over polygons:
    the released preprocessing. A run-length code is decoded at its size and resized by nearest neighbour.

    Raises:
        GrexError: not a segmentation, a code of another size than the image, or a size beyond the limit.
    """
    out_height, out_width = out_height or height, out_width or width
    check_size(height, width)
    check_size(out_height, out_width)
    if isinstance(segmentation, list):
        polygons = scaled_polygons(segmentation, height, width, out_height, out_width)
        if not polygons:
            return np.zeros((out_height, out_width), bool)
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, out_height, out_width))).astype(bool)
    if isinstance(segmentation, dict):
        return resize_mask_nearest(decode_rle(segmentation, height, width), out_height, out_width)
    raise fault(
        f"segmentation of type {type(segmentation).__name__}",
        "a list of polygons or a COCO RLE dict",
        "fix the record or leave the mask out",
    )


def decode_rle(rle: dict[str, Any], height: int | None = None, width: int | None = None) -> np.ndarray:
    """Return bool [H, W] of a COCO RLE {"size": [H, W], "counts": str | bytes | list of run lengths}.

    Raises:
        GrexError: malformed, of another size than [height, width] where given, or runs that do not fill the mask.
    """
    code_height, code_width = _rle_size(rle)
    if height is not None and width is not None and (code_height, code_width) != (height, width):
        swapped = " (height and width look swapped)" if (code_width, code_height) == (height, width) else ""
        raise fault(
            f"RLE mask of size {code_height}x{code_width}{swapped}",
            f"{height}x{width}, the image's height x width",
            "fix the record's size",
        )
    check_size(code_height, code_width)
    counts = rle["counts"]
    runs = _checked_runs(counts if isinstance(counts, list) else _decompressed(counts), code_height * code_width)
    values = np.zeros(len(runs), bool)
    values[1::2] = True
    return np.repeat(values, runs).reshape(code_width, code_height).T.copy()  # COCO runs go down the columns


def rle_runs(counts: str) -> np.ndarray:
    """Return the run lengths int64 [R] of a compressed COCO code: background first, in turns.

    5 bits a character, little end first, bit 5 = more follows, bit 4 of the last = sign. pycocotools' own reader trusts its input and can
    read and write outside memory.

    Raises:
        GrexError: a character that no code has, or a code that is cut off.
    """
    try:
        code = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        code = np.array([-1])
    if len(code) == 0:
        return np.zeros(0, np.int64)
    last = np.flatnonzero((code & 0x20) == 0)
    if int(code.min()) < 0 or int(code.max()) > 63 or len(last) == 0 or last[-1] != len(code) - 1:
        raise fault(
            "RLE counts that are cut off or hold a character that no RLE has", "COCO's compressed form", "write masks with pycocotools"
        )
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if int(lengths.max()) > MAX_CHARACTERS_PER_RUN:
        raise fault("RLE counts with a run beyond 35 bits", "COCO's compressed form", "write masks with pycocotools")
    place = np.arange(len(code)) - np.repeat(first, lengths)
    runs = np.add.reduceat((code & 0x1F) << (5 * place), first)
    runs -= ((code[last] & 0x10) > 0) * (np.int64(1) << (5 * lengths))
    runs[1::2] = np.cumsum(runs[1::2])  # from the third run on, a code holds the difference to the run before the last
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """Return the compressed COCO RLE of a bool [H, W] mask, safe for JSON: {"size": [H, W], "counts": str}."""
    if mask.ndim != 2:
        raise fault(f"mask of shape {tuple(mask.shape)}", "[height, width]", "pass one mask at a time")
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(mask.shape[0]), int(mask.shape[1])], "counts": code["counts"].decode("ascii")}


def mask_to_box_xyxy(mask: np.ndarray) -> list[float]:
    """Return the extent [x1, y1, x2, y2] of a bool [H, W] mask in pixel edges (x2 - x1 = number of columns); zeros if the mask is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return [0.0, 0.0, 0.0, 0.0]
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


def resize_mask_nearest(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return bool [height, width]: each output pixel takes the input pixel that its centre falls on."""
    if mask.shape == (height, width):
        return mask.astype(bool)
    rows = ((np.arange(height) + 0.5) * mask.shape[0] / height).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * mask.shape[1] / width).astype(np.int64)
    return mask[rows[:, None], columns[None, :]].astype(bool)


def check_size(height: int, width: int) -> None:
    """Raise GrexError where a mask would be empty or larger than MAX_MASK_PIXELS."""
    if height <= 0 or width <= 0 or height * width > MAX_MASK_PIXELS:
        raise fault(
            f"mask size {height}x{width}", f"positive sides and at most {MAX_MASK_PIXELS:,} pixels", "fix height and width in the record"
        )


def scaled_polygons(segmentation: list[Any], height: int, width: int, out_height: int, out_width: int) -> list[list[float]]:
    """Return the usable polygons of a [height, width] image in pixels of [out_height, out_width], for pycocotools.

    Raises:
        GrexError: a coordinate that is no finite number.
    """
    scaled = []
    for polygon in usable_polygons(segmentation):
        points = np.asarray(polygon, np.float64)
        if not np.isfinite(points).all():
            raise fault("polygon with a coordinate that is no finite number", "pixels of the image", "fix or remove the polygon")
        # The factor first: it is exactly 1 at the original size. pycocotools walks along every edge: coordinates far outside would take
        # unbounded time and memory.
        points[0::2] = (points[0::2] * (out_width / width)).clip(-out_width, 2 * out_width)
        points[1::2] = (points[1::2] * (out_height / height)).clip(-out_height, 2 * out_height)
        scaled.append(points.tolist())
    return scaled


def _rle_size(rle: dict[str, Any]) -> tuple[int, int]:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise fault(f"RLE with size {size!r}", "[height, width]", "fix the record")
    if not isinstance(counts, str | bytes | list):
        raise fault(f"RLE with counts of type {type(counts).__name__}", "a string or a list of run lengths", "fix the record")
    return int(size[0]), int(size[1])


def _checked_runs(runs: list[int], total: int) -> list[int]:
    if not all(isinstance(run, int) and run >= 0 for run in runs):
        raise fault("RLE with a run that is no whole number of pixels", "run lengths >= 0", "fix the record")
    if sum(runs) != total:
        raise fault(f"RLE whose runs cover {sum(runs)} pixels", f"{total}, height x width", "fix the record's size or counts")
    return runs


def _decompressed(counts: str | bytes) -> list[int]:
    code = counts.encode("ascii", errors="replace") if isinstance(counts, str) else counts
    try:
        return rle_runs(code.decode("ascii", errors="replace")).tolist()
    except GrexError:
        raise fault("RLE counts are cut off or hold a character that no RLE has", "COCO's compressed form", "fix the record") from None
