"""Run-length algebra: areas, unions and overlaps of COCO masks without decoding them.

pycocotools' C code trusts its input (a malformed code reads and writes outside memory); what comes from a file passes `check_rle` first.
"""

from __future__ import annotations

from typing import Any

from pycocotools import mask as coco_mask

from grex_mllm.errors import fault
from grex_mllm.ops.masks import check_size, decode_rle, encode_rle, resize_mask_nearest, rle_runs, scaled_polygons

Rle = dict[str, Any]


def check_rle(rle: Any, height: int | None = None, width: int | None = None) -> Rle:
    """Return a COCO RLE with a compressed text code, proven to cover its size exactly.

    rle: {"size": [H, W], "counts": str | bytes | list of run lengths}. height, width: the size that it must have.

    Raises:
        GrexError: no RLE, wrong size, or runs that do not fill the mask.
    """
    size, counts = (rle.get("size"), rle.get("counts")) if isinstance(rle, dict) else (None, None)
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(isinstance(n, int) for n in size):
        raise fault(f"mask {str(rle)[:60]!r}", 'an RLE {"size": [height, width], "counts": ...}', "write masks with pycocotools")
    if height is not None and width is not None and tuple(size) != (height, width):
        hint = " (height and width look swapped)" if tuple(size) == (width, height) else ""
        raise fault(
            f"mask of size {size[0]}x{size[1]}{hint}",
            f"the image's height x width, {height}x{width}",
            "write masks at the original image size",
        )
    check_size(*size)
    if isinstance(counts, list):
        counts = _compress(counts, size)
    if isinstance(counts, bytes):
        counts = counts.decode("ascii", errors="replace")
    if not isinstance(counts, str):
        raise fault(f"RLE counts of type {type(counts).__name__}", "a string or a list of run lengths", "write masks with pycocotools")
    runs = rle_runs(counts)
    covered = int(runs.sum())
    if covered != size[0] * size[1] or (len(runs) and int(runs.min()) < 0):
        raise fault(
            f"RLE whose runs cover {covered} pixels", f"{size[0] * size[1]}, height x width", "fix the size or write the mask again"
        )
    return {"size": [size[0], size[1]], "counts": counts}


def empty_rle(height: int, width: int) -> Rle:
    """Return the code of a mask without a pixel."""
    return _compress_runs([height * width], [height, width])


def segmentation_to_rle(segmentation: Any, height: int, width: int, out_height: int | None = None, out_width: int | None = None) -> Rle:
    """Return the RLE of a published segmentation (polygons or RLE) of a [height, width] image, at the output size (default: the same).

    Equal to `ops.masks.segmentation_to_mask` pixel for pixel, without going through pixels where polygons allow it.

    Raises:
        GrexError: not a segmentation, or of another size than the image.
    """
    out_height, out_width = out_height or height, out_width or width
    if isinstance(segmentation, list):
        check_size(height, width)
        check_size(out_height, out_width)
        polygons = scaled_polygons(segmentation, height, width, out_height, out_width)
        if not polygons:
            return empty_rle(out_height, out_width)
        return union(coco_mask.frPyObjects(polygons, out_height, out_width))
    if (out_height, out_width) == (height, width):
        return check_rle(segmentation, height, width)
    return encode_rle(resize_mask_nearest(decode_rle(check_rle(segmentation, height, width)), out_height, out_width))


def union(rles: list[Rle]) -> Rle:
    """Return the union of at least one checked RLE of one size."""
    return rles[0] if len(rles) == 1 else coco_mask.merge(rles)


def overlap_counts(pred: Rle, gt: Rle) -> tuple[int, int, int]:
    """Return (pixels in both, pixels of pred, pixels of gt) of two checked RLEs of one size."""
    areas = coco_mask.area([coco_mask.merge([pred, gt], True), pred, gt])
    return int(areas[0]), int(areas[1]), int(areas[2])


def area(rle: Rle) -> int:
    """Return the number of pixels of a checked RLE."""
    return int(coco_mask.area(rle))


def _compress(runs: list[Any], size: Any) -> str:
    if not all(isinstance(run, int) and run >= 0 for run in runs) or sum(runs) != size[0] * size[1]:
        raise fault(
            f"RLE whose runs cover {sum(run for run in runs if isinstance(run, int))} pixels",
            f"{size[0] * size[1]}, height x width",
            "fix the size or write the mask again",
        )
    return _compress_runs(runs, size)["counts"]


def _compress_runs(runs: list[int], size: Any) -> Rle:
    code = coco_mask.frPyObjects({"size": list(size), "counts": runs}, size[0], size[1])
    return {"size": list(size), "counts": code["counts"].decode("ascii")}
