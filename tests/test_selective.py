"""Risk-coverage curves and no-target thresholds: hand-computed cases, brute force over all orders, extremes, monotony."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from grex_mllm.errors import GrexError
from grex_mllm.metrics.selective import no_target_at_thresholds, risk_coverage


def test_risk_coverage_by_hand() -> None:
    found = risk_coverage([0.9, 0.6, 0.8, 0.7], [0.0, 1.0, 0.0, 1.0])
    risks = [0.0, 0.0, 1 / 3, 1 / 2]  # of the 1, 2, 3, 4 surest
    assert found["num_samples"] == 4 and found["risk"] == 0.5
    assert found["AURC"] == pytest.approx(sum(risks) / 4, abs=1e-12)
    assert [point["coverage"] for point in found["curve"]] == [0.25, 0.5, 0.75, 1.0]
    assert [point["risk"] for point in found["curve"]] == pytest.approx(risks, abs=1e-12)


def test_ties_count_with_the_mean_over_all_their_orders() -> None:
    confidence, loss = [0.9, 0.5, 0.5, 0.5, 0.1], [0.25, 1.0, 0.0, 0.5, 1.0]
    areas = []
    for order in itertools.permutations((1, 2, 3)):
        kept = [loss[k] for k in (0, *order, 4)]
        areas.append(np.mean([np.mean(kept[: k + 1]) for k in range(5)]))
    assert risk_coverage(confidence, loss)["AURC"] == pytest.approx(np.mean(areas), abs=1e-9)


def test_no_order_of_the_samples_changes_a_bit() -> None:
    draw = np.random.default_rng(0)
    confidence, loss = draw.integers(0, 30, 500) / 30, draw.random(500)
    first = risk_coverage(confidence.tolist(), loss.tolist())
    order = draw.permutation(500)
    assert risk_coverage(confidence[order].tolist(), loss[order].tolist()) == first
    assert len(first["curve"]) == 20 and first["risk"] == pytest.approx(loss.mean(), abs=1e-9)


def test_a_perfect_confidence_is_best_and_its_curve_rises() -> None:
    loss = np.random.default_rng(1).random(200)
    best, worst = risk_coverage((-loss).tolist(), loss.tolist()), risk_coverage(loss.tolist(), loss.tolist())
    assert best["AURC"] < best["risk"] < worst["AURC"]
    for found, rises in ((best, True), (worst, False)):
        risks = [point["risk"] for point in found["curve"]]
        assert risks == sorted(risks, reverse=not rises) and risks[-1] == found["risk"]
    assert risk_coverage([0.5] * 7, [1.0, 0, 0, 0, 0, 0, 0])["AURC"] == pytest.approx(1 / 7)


def test_faults_and_nothing() -> None:
    assert risk_coverage([], []) == {"num_samples": 0, "AURC": None, "risk": None, "curve": []}
    for confidence, loss in (([0.1], [0.0, 1.0]), ([float("nan")], [0.0]), ([0.5], [1.5])):
        with pytest.raises(GrexError, match="expected"):
            risk_coverage(confidence, loss)


def test_thresholds_by_hand_and_at_the_ends() -> None:
    prob, none = [0.0, 0.2, 0.5, 0.7, 1.0], [False, True, False, True, True]
    table = {entry["threshold"]: entry for entry in no_target_at_thresholds(prob, none)}
    assert len(table) == 21
    assert table[0.5] == {"threshold": 0.5, "N_acc": 2 / 3, "T_acc": 1.0, "answered": 3 / 5, "risk": 1 / 3}  # 0.5 itself is a target
    assert table[0.0] == {"threshold": 0.0, "N_acc": 1.0, "T_acc": 0.0, "answered": 0.0, "risk": None}
    assert table[1.0] == {"threshold": 1.0, "N_acc": 0.0, "T_acc": 1.0, "answered": 1.0, "risk": 3 / 5}
    rows = list(table.values())
    for name, falls in (("N_acc", True), ("T_acc", False), ("answered", False)):
        values = [row[name] for row in rows]
        assert values == sorted(values, reverse=falls)
    assert {row["T_acc"] for row in no_target_at_thresholds([0.3], [True])} == {None}
