"""Boxes and masks against hand-computed values, pycocotools and brute force."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from grex_mllm.errors import GrexError
from grex_mllm.ops import boxes, masks


def random_boxes(seed: int, n: int) -> np.ndarray:
    corners = np.random.default_rng(seed).integers(0, 12, (n, 4)).astype(np.float64)
    corners[:, 2:] += corners[:, :2] + 1
    return corners


def pixels(box: np.ndarray) -> np.ndarray:
    grid = np.zeros((32, 32), bool)
    grid[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = True
    return grid


def test_overlaps_equal_counting_pixels() -> None:
    first, second = random_boxes(0, 6), random_boxes(1, 7)
    iou, giou = boxes.box_iou(first, second), boxes.generalized_iou(first[:, None], second[None])
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            union = (pixels(a) | pixels(b)).sum()
            hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
            assert iou[i, j] == pytest.approx((pixels(a) & pixels(b)).sum() / union)
            assert giou[i, j] == pytest.approx(iou[i, j] - (hull - union) / hull)


def test_numpy_and_torch_agree_in_value_and_kind() -> None:
    first, second = random_boxes(2, 5), random_boxes(3, 4)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (boxes.xyxy_to_cxcywh, ()),
        (boxes.cxcywh_to_xyxy, ()),
        (boxes.xywh_to_xyxy, ()),
        (boxes.box_area, ()),
        (boxes.clip_boxes, (9, 8)),
        (boxes.box_iou, (second,)),
        (boxes.generalized_iou, (second[:1],)),
    ]
    for function, rest in calls:
        there = function(torch.from_numpy(first), *(torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in rest))
        assert isinstance(there, torch.Tensor)
        assert np.allclose(function(first, *rest), there.numpy())


def test_conversions_by_hand() -> None:
    box = np.array([[2.0, 4.0, 10.0, 8.0]])
    assert boxes.xyxy_to_cxcywh(box).tolist() == [[6, 6, 8, 4]]
    assert boxes.cxcywh_to_xyxy(boxes.xyxy_to_cxcywh(box)).tolist() == box.tolist()
    assert boxes.xywh_to_xyxy(np.array([[2.0, 4.0, 8.0, 4.0]])).tolist() == box.tolist()
    assert boxes.clip_boxes(np.array([[-3.0, -1.0, 99.0, 99.0]]), height=10, width=20).tolist() == [[0, 0, 20, 10]]


def test_degenerate_and_missing_boxes_are_finite_with_gradients() -> None:
    flat = torch.tensor([[3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 4.0, 4.0]], requires_grad=True)
    giou = boxes.generalized_iou(flat[:, None], flat[None])
    giou.sum().backward()
    assert torch.isfinite(giou).all() and flat.grad is not None and torch.isfinite(flat.grad).all()
    assert boxes.box_iou(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0, 3)


def test_rle_round_trip_and_equality_with_pycocotools() -> None:
    rng = np.random.default_rng(4)
    for _ in range(60):
        mask = rng.random(tuple(rng.integers(1, 40, 2))) < rng.random()
        code = json.loads(json.dumps(masks.encode_rle(mask)))
        assert np.array_equal(masks.decode_rle(code), mask)
        assert np.array_equal(coco_mask.decode(code).astype(bool), mask)
        runs = np.flatnonzero(np.diff(np.concatenate([[False], mask.T.ravel(), [not mask.T.ravel()[-1]]])))
        plain = {"size": list(mask.shape), "counts": np.diff(np.concatenate([[0], runs])).tolist()}
        assert np.array_equal(masks.decode_rle(plain), mask)


def test_extreme_masks() -> None:
    for mask in (np.zeros((3, 5), bool), np.ones((3, 5), bool), np.ones((1, 1), bool)):
        assert np.array_equal(masks.decode_rle(masks.encode_rle(mask)), mask)
    assert masks.mask_to_box_xyxy(np.zeros((3, 5), bool)) == [0, 0, 0, 0]
    one = np.zeros((3, 5), bool)
    one[1, 4] = True
    assert masks.mask_to_box_xyxy(one) == [4, 1, 5, 2]


@pytest.mark.parametrize(
    ("rle", "words"),
    [
        ({"size": [4, 6], "counts": [24]}, "swapped"),
        ({"size": [6, 5], "counts": [30]}, "6x4"),
        ({"size": [6, 4], "counts": [25]}, "25 pixels"),
        ({"size": [6, 4], "counts": [10, -4, 18]}, "run"),
        ({"size": [6, 4], "counts": "0"}, "0 pixels"),
        ({"size": [6, 4], "counts": "hello\x7f"}, "character"),
        ({"size": [6, 4], "counts": "ooooooooooooooooooo"}, "cut off"),
        ({"size": [6, 4], "counts": 7}, "counts"),
        ({"size": [6], "counts": [24]}, "size"),
        ({"size": [6, -4], "counts": [24]}, "size"),
    ],
)
def test_malformed_codes_are_refused_before_any_memory_is_touched(rle: dict[str, Any], words: str) -> None:
    with pytest.raises(GrexError, match=words):
        masks.decode_rle(rle, 6, 4)


def test_gigantic_sizes_are_refused() -> None:
    with pytest.raises(GrexError, match="at most"):
        masks.decode_rle({"size": [100_000, 100_000], "counts": [10_000_000_000]})
    with pytest.raises(GrexError, match="at most"):
        masks.segmentation_to_mask([[0, 0, 1, 0, 1, 1]], 100_000, 100_000)


def test_polygons_at_input_size_are_scaled_by_coordinates() -> None:
    polygon = [[3.0, 2.0, 17.5, 2.0, 17.5, 11.0, 3.0, 11.0], [20.0, 12.0, 25.0, 12.0, 25.0, 19.0]]
    scaled = [(np.reshape(p, (-1, 2)) * [48 / 30, 64 / 20]).ravel().tolist() for p in polygon]
    expected = np.logical_or(*(coco_mask.decode(coco_mask.frPyObjects([p], 64, 48))[..., 0] for p in scaled))
    assert np.array_equal(masks.segmentation_to_mask(polygon, 20, 30, 64, 48), expected)


def test_polygons_of_two_points_count_for_nothing() -> None:
    assert masks.usable_polygons([[0, 0, 5, 5], [0, 0, 5, 0, 5, 5], [0, 0, 5, 0, 5, 5, 1]]) == [[0, 0, 5, 0, 5, 5]]
    assert not masks.segmentation_to_mask([[0, 0, 5, 5]], 8, 8).any()


def test_polygon_far_outside_stays_bounded() -> None:
    mask = masks.segmentation_to_mask([[-1e12, 2.0, 1e12, 2.0, 1e12, 6.0, -1e12, 6.0]], 8, 10)
    assert mask[2:6].all() and not mask[:2].any() and not mask[6:].any()
    with pytest.raises(GrexError, match="finite"):
        masks.segmentation_to_mask([[0.0, 0.0, float("nan"), 1.0, 2.0, 2.0]], 8, 10)


def test_nearest_resize_by_hand() -> None:
    mask = np.array([[True, False], [False, True]])
    assert masks.resize_mask_nearest(mask, 4, 4).astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert np.array_equal(masks.resize_mask_nearest(masks.resize_mask_nearest(mask, 6, 8), 2, 2), mask)
    with pytest.raises(GrexError, match="segmentation"):
        masks.segmentation_to_mask("polygon", 4, 4)
