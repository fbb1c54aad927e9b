"""Video metrics and calibration: hand-computed cases, brute force, merging."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from grex_mllm.errors import GrexError
from grex_mllm.metrics import RVOS, Calibration
from grex_mllm.metrics.video import boundary, contour, region


def test_frames_first_then_expressions() -> None:
    full, empty = np.ones((2, 8, 8), bool), np.zeros((2, 8, 8), bool)
    half = full.copy()
    half[1] = False
    metric = RVOS()
    metric.update(half, full, "a")
    metric.update(empty, empty, "b")
    result = metric.compute()
    assert (result["num_expressions"], result["num_frames"]) == (2, 4)
    assert result["J"] == (0.5 + 1) / 2
    other = RVOS()
    other.update(torch.tensor(full[0]), torch.tensor(full[0]), "a")
    assert metric.merge(RVOS().load_state(other.state())).compute()["J"] == pytest.approx((2 / 3 + 1) / 2)
    with pytest.raises(GrexError, match="shape"):
        metric.update(full, empty[:, :4], "a")


def test_contour_by_hand() -> None:
    square = np.zeros((20, 20), bool)
    square[5:15, 5:15] = True
    assert contour(square, square) == 1.0
    assert contour(square, np.zeros_like(square)) == 0.0
    assert contour(np.zeros_like(square), np.zeros_like(square)) == 1.0
    shifted = np.roll(square, 1, axis=1)
    assert contour(square, shifted) == 1.0  # 0.008 of the diagonal, rounded up, is one pixel
    assert contour(square, np.roll(square, 3, axis=1)) < 1.0


@settings(max_examples=20, deadline=None)
@given(hnp.arrays(bool, (9, 11)), hnp.arrays(bool, (9, 11)))
def test_contour_by_brute_force(pred: np.ndarray, gt: np.ndarray) -> None:
    radius = math.ceil(0.1 * math.hypot(9, 11))
    edges = [np.argwhere(boundary(mask)) for mask in (pred, gt)]
    if not len(edges[0]) or not len(edges[1]):
        assert contour(pred, gt, 0.1) == float(len(edges[0]) == len(edges[1]))
        return
    near = [np.mean([(((other - p) ** 2).sum(1) <= radius**2).any() for p in mine]) for mine, other in (edges, edges[::-1])]
    expected = 2 * near[0] * near[1] / sum(near) if sum(near) else 0.0
    assert contour(pred, gt, 0.1) == pytest.approx(expected)
    assert contour(gt, pred, 0.1) == pytest.approx(contour(pred, gt, 0.1))
    assert region(pred, gt) == region(gt, pred)


def test_calibration_by_hand() -> None:
    metric = Calibration()
    metric.update([0.95, 0.95, 0.05, 0.05], [True, False, False, False])
    result = metric.compute()
    assert result["num_samples"] == 4
    assert result["ECE"] == pytest.approx((2 * 0.45 + 2 * 0.05) / 4)
    assert result["reliability"][9] == {"num_samples": 2, "mean_probability": pytest.approx(0.95), "no_target_share": 0.5}
    curve = {round(point["threshold"], 2): point for point in result["curve"]}
    assert curve[0.5]["N_acc"] == 1.0
    assert curve[0.5]["T_acc"] == pytest.approx(2 / 3)
    assert (curve[0.5]["coverage"], curve[0.5]["risk"]) == (0.5, 0.0)
    assert (curve[0.0]["N_acc"], curve[0.0]["T_acc"], curve[0.0]["risk"]) == (1.0, 0.0, None)
    with pytest.raises(GrexError, match=r"\[0, 1\]"):
        metric.update([1.5], [True])
    with pytest.raises(GrexError, match=r"\[0, 1\]"):
        metric.update([float("nan")], [True])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30), st.integers(0, 30))
def test_calibration_merges_and_stays_in_bounds(pairs: list[tuple[float, bool]], cut: int) -> None:
    whole, left, right = Calibration(), Calibration(), Calibration()
    for metric, part in ((whole, pairs), (left, pairs[:cut]), (right, pairs[cut:])):
        if part:
            metric.update([p for p, _ in part], torch.tensor([t for _, t in part]))
    assert left.merge(Calibration().load_state(right.state())).compute() == whole.compute()
    assert 0 <= whole.compute()["ECE"] <= 1
    thresholds = [point["N_acc"] for point in whole.compute()["curve"] if point["N_acc"] is not None]
    assert thresholds == sorted(thresholds, reverse=True)
