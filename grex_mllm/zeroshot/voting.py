"""What several samples of one answer agree on (self-consistency, arXiv 2203.11171): whether there is a target, then its objects.

Objects of different samples stand for one if they overlap (boxes by their IoU, outlines by that of their areas) or, of points, lie near
each other: without outlines nothing tells more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from grex_mllm.ops.boxes import box_iou
from grex_mllm.ops.masks import segmentation_to_mask
from grex_mllm.zeroshot.parsing import Parsed

SAME_IOU = 0.5  # of boxes or outlines of two samples that stand for one object
SAME_DISTANCE = 0.05  # between points of two samples that do, in parts of the picture's diagonal
GRID = 64  # cells on each side of what two outlines are compared on

Alike = Callable[[Any, list[Any]], float]  # an object, the objects of a cluster -> how alike, 0 = another one


def agreed(samples: list[Parsed], answer: str = "boxes", diagonal: float = 0.0) -> Parsed:
    """Return what samples agree on.

    Those that are not ok have no vote; where none is, the first one's status stands. A draw between targets and none is decided by the
    first sample. Objects that stand for one are put together greedily, in the order of the samples; an object stays if more than half of
    the samples with targets have it (if none does, those that most have): as the median of its boxes or of its points, as the outline
    (or the box with its mask) that overlaps the others most.

    answer: what was asked for, of ANSWERS.  diagonal: of the picture in pixels, for points.
    """
    able = [sample for sample in samples if sample.status == "ok"]
    if not able:
        return samples[0]
    found = [sample for sample in able if not sample.no_target]
    absent = [sample for sample in able if sample.no_target]
    if len(absent) > len(found) or (len(absent) == len(found) and able[0].no_target):
        return replace(absent[0], flags=())
    if answer == "points":
        points = [np.median(c, axis=0) for c in _clusters([s.points for s in found], _near(SAME_DISTANCE * diagonal))]
        return Parsed("ok", points=np.asarray(points, np.float64).reshape(-1, 2))
    if answer == "polygons":
        outlines = [_medoid(c, area_iou) for c in _clusters([s.polygons for s in found], _same_area)]
        boxes = [[*outline.min(axis=0), *outline.max(axis=0)] for outline in outlines]
        return Parsed("ok", boxes_xyxy=np.asarray(boxes, np.float64).reshape(-1, 4), polygons=outlines)
    if answer == "masks":
        pairs = [_medoid(c, _pair_iou) for c in _clusters([list(zip(s.boxes_xyxy, s.masks)) for s in found], _same_pair)]
        boxes = [box for box, _ in pairs]
        return Parsed("ok", boxes_xyxy=np.asarray(boxes, np.float64).reshape(-1, 4), masks=[mask for _, mask in pairs])
    boxes = [np.median(c, axis=0) for c in _clusters([s.boxes_xyxy for s in found], _same_box)]
    return Parsed("ok", boxes_xyxy=np.asarray(boxes, np.float64).reshape(-1, 4))


def area_iou(first: np.ndarray, second: np.ndarray) -> float:
    """Return the IoU of the areas of two outlines [P, 2], counted on a grid over both."""
    both = np.concatenate([first, second])
    low, size = both.min(axis=0), np.ptp(both, axis=0)
    if (np.minimum(first.max(axis=0), second.max(axis=0)) <= np.maximum(first.min(axis=0), second.min(axis=0))).any():
        return 0.0
    one, other = (segmentation_to_mask([((p - low) / size * GRID).reshape(-1).tolist()], GRID, GRID) for p in (first, second))
    return float((one & other).sum() / max(1, (one | other).sum()))


def _clusters(samples: list[Any], alike: Alike) -> list[list[Any]]:
    """Return the objects that enough samples have, each as the list of its versions; a sample has one version of an object."""
    clusters: list[list[tuple[int, Any]]] = []
    for n, objects in enumerate(samples):
        for one in objects:
            best, place = 0.0, None
            for cluster in clusters:
                if n not in (number for number, _ in cluster):
                    value = alike(one, [other for _, other in cluster])
                    if value > best:
                        best, place = value, cluster
            if place is None:
                clusters.append([(n, one)])
            else:
                place.append((n, one))
    most = max((len(cluster) for cluster in clusters), default=0)
    least = len(samples) // 2 + 1 if most > len(samples) / 2 else most
    return [[one for _, one in cluster] for cluster in clusters if len(cluster) >= least]


def _same_box(box: np.ndarray, others: list[np.ndarray]) -> float:
    overlap = float(box_iou(box[None], np.median(others, axis=0)[None])[0, 0])
    return overlap if overlap >= SAME_IOU else 0.0


def _same_area(outline: np.ndarray, others: list[np.ndarray]) -> float:
    overlap = area_iou(outline, others[0])
    return overlap if overlap >= SAME_IOU else 0.0


def _near(distance: float) -> Alike:
    def alike(point: np.ndarray, others: list[np.ndarray]) -> float:
        away = float(np.linalg.norm(point - np.median(others, axis=0)))
        return 1 / (1 + away) if away <= distance else 0.0

    return alike


def _same_pair(pair: Any, others: list[Any]) -> float:
    return _same_box(pair[0], [box for box, _ in others])


def _pair_iou(pair: Any, other: Any) -> float:
    return float(box_iou(pair[0][None], other[0][None])[0, 0])


def _medoid(versions: list[Any], overlap: Callable[[Any, Any], float]) -> Any:
    """Return the version of an object that overlaps the others most; of equals the first."""
    return max(versions, key=lambda one: sum(overlap(one, other) for other in versions))
