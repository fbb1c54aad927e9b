"""Box and count metrics: hand-computed cases, the released evaluator's recorded numbers, brute force, invariances."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grex_mllm.errors import GrexError
from grex_mllm.metrics import GREC, REC, Count
from grex_mllm.metrics.detection import greedy_matches, most_matches, pair_giou_float32, pair_iou
from grex_mllm.ops.boxes import box_iou, generalized_iou

UNIT = [0.0, 0.0, 10.0, 10.0]
FAR = [100.0, 100.0, 110.0, 110.0]


def score(protocol: str, *samples: tuple[Any, ...], **options: Any) -> dict[str, Any]:
    metric = GREC(protocol, **options)
    metric.update_many([(*s, None, None)[:5] for s in samples])
    return metric.compute()


@pytest.mark.parametrize("protocol", ["strict", "official"])
def test_simple_cases(protocol: str) -> None:
    right = ([UNIT, FAR], [0.9, 0.8], [FAR, UNIT])
    one_missing = ([UNIT], [0.9], [FAR, UNIT])
    duplicated = ([UNIT, UNIT], [0.9, 0.9], [UNIT])
    nothing_right, nothing_wrong = ([UNIT], [0.6], []), ([UNIT], [0.7], [])
    result = score(protocol, right, one_missing, duplicated, nothing_right, nothing_wrong)
    assert result["Pr@F1"] == 2 / 5
    assert result["mean_F1"] == pytest.approx((1 + 2 / 3 + 2 / 3 + 1 + 0) / 5)
    assert (result["N_acc"], result["T_acc"]) == (0.5, 1.0)


@pytest.mark.parametrize("protocol", ["strict", "official"])
def test_edges(protocol: str) -> None:
    assert score(protocol, ([], [], []))["Pr@F1"] == 1.0
    assert score(protocol, ([], [], [UNIT]))["T_acc"] == 0.0
    assert score(protocol, ([], [], [UNIT]))["N_acc"] is None
    assert score(protocol)["Pr@F1"] is None
    outside = [-20.0, -20.0, 900.0, 900.0]
    assert score(protocol, ([outside], [1.0], [outside]))["Pr@F1"] == 1.0
    point = [5.0, 5.0, 5.0, 5.0]
    assert score(protocol, ([point], [1.0], [UNIT]))["Pr@F1"] == 0.0
    more = ([UNIT, FAR, [50.0, 50.0, 60.0, 60.0]], [0.9, 0.9, 0.9], [UNIT])
    assert score(protocol, more)["mean_F1"] == 0.5
    with pytest.raises(GrexError, match="NaN"):
        score(protocol, ([UNIT], [float("nan")], [UNIT]))
    with pytest.raises(GrexError, match="x1 <= x2"):
        score(protocol, ([[10.0, 10.0, 0.0, 0.0]], [0.9], [UNIT]))
    with pytest.raises(GrexError, match="one score for each box"):
        score(protocol, ([UNIT], [], [UNIT]))


@pytest.mark.parametrize("protocol", ["strict", "official"])
def test_all_empty_split_and_split_without_a_no_target_sample(protocol: str) -> None:
    empty = score(protocol, ([], [], []), ([UNIT], [0.9], []), ([UNIT], [0.1], []))
    assert (empty["Pr@F1"], empty["N_acc"], empty["T_acc"], empty["balanced_acc"]) == (2 / 3, 2 / 3, None, None)
    full = score(protocol, ([UNIT], [0.9], [UNIT]), ([], [], [UNIT]))
    assert (full["Pr@F1"], full["N_acc"], full["T_acc"], full["balanced_acc"]) == (0.5, None, 0.5, None)


@pytest.mark.parametrize("protocol", ["strict", "official"])
def test_ties_duplicates_and_zero_areas(protocol: str) -> None:
    third = [50.0, 50.0, 60.0, 60.0]
    for boxes in itertools.permutations([UNIT, FAR, third]):  # equal scores: the same choice in any order
        chosen = score(protocol, (list(boxes), [0.5, 0.5, 0.5], [FAR, third], False, 2), select="count")
        assert chosen["Pr@F1"] == 1.0
    twice_wanted = ([UNIT, UNIT], [0.9, 0.9], [UNIT, UNIT])
    assert score(protocol, twice_wanted)["Pr@F1"] == 1.0  # each box takes one target
    assert score(protocol, ([UNIT], [0.9], [UNIT, UNIT]))["mean_F1"] == pytest.approx(2 / 3)
    line = [0.0, 5.0, 10.0, 5.0]
    assert score(protocol, ([line], [0.9], [UNIT]))["mean_F1"] == 0.0
    assert score(protocol, ([UNIT, line], [0.9, 0.9], [UNIT]))["mean_F1"] == pytest.approx(2 / 3)
    out = [-5.0, -5.0, 10.0, 10.0]
    assert score("strict", ([out], [0.9], [UNIT]))["Pr@F1"] == 0.0  # boxes are not cut to the image: IoU 100 / 225


def test_two_equal_points_match_under_official_only() -> None:
    """0 / 0 is NaN in the released code, and NaN is not below the threshold: reproduced, not repeated under strict."""
    point = [5.0, 5.0, 5.0, 5.0]
    assert score("official", ([point], [1.0], [point]))["Pr@F1"] == 1.0
    assert score("strict", ([point], [1.0], [point]))["Pr@F1"] == 0.0


def test_generalized_overlap_is_stricter() -> None:
    """IoU 0.507, GIoU below 0.5: accepted by the papers' words, rejected by the released code."""
    shifted = [3.0, 0.4, 13.0, 10.4]
    iou = float(pair_iou(np.array([UNIT]), np.array([shifted]))[0])
    giou = float(pair_giou_float32(np.array([UNIT]), np.array([shifted]))[0])
    assert iou > 0.5 > giou
    assert score("strict", ([shifted], [0.9], [UNIT]))["Pr@F1"] == 1.0
    assert score("official", ([shifted], [0.9], [UNIT]))["Pr@F1"] == 0.0


def test_greedy_can_lose_a_pair_that_optimal_matching_keeps() -> None:
    overlap = [[0.9, 0.8], [0.7, 0.1]]
    assert greedy_matches(overlap, 0.5) == 1
    assert most_matches(overlap, 0.5) == 2


def test_selection_by_count_and_all() -> None:
    boxes, scores = [UNIT, FAR, [50.0, 50.0, 60.0, 60.0]], [0.2, 0.3, 0.1]
    assert score("strict", (boxes, scores, [UNIT, FAR], False, 2), select="count")["Pr@F1"] == 1.0
    assert score("strict", (boxes, scores, [UNIT, FAR], False, 0), select="count")["T_acc"] == 0.0
    assert score("strict", (boxes, scores, boxes, False, None), select="all")["Pr@F1"] == 1.0
    seven = [[20.0 * k, 0.0, 20.0 * k + 9, 9.0] for k in range(9)]
    result = score("strict", (seven, [0.9] * 7 + [0.1] * 2, seven[:7], False, 6), select="count")
    assert result["Pr@F1"] == 1.0  # ">5": all seven stand above the threshold
    with pytest.raises(GrexError, match="count"):
        score("strict", (boxes, scores, [UNIT]), select="count")
    with pytest.raises(GrexError, match="select"):
        GREC(select="best")


def test_against_the_released_evaluator(shared: Path) -> None:
    recorded = json.loads((shared / "oracle" / "grec_eval.json").read_text())
    wanted: dict[int, list[Any]] = {}
    for annotation in recorded["annotations"]:
        wanted.setdefault(annotation["image_id"], []).append(annotation)
    samples = []
    for image in recorded["images"]:
        found = recorded["predictions"][str(image["id"])]
        boxes = [[b[0], b[1], b[0] + b[2], b[1] + b[3]] for b in (a["bbox"] for a in wanted[image["id"]])]
        none = any(a["category_id"] == -1 for a in wanted[image["id"]])
        samples.append((found["boxes"], found["scores"], boxes, none, None))
    names = {"thresh_score": "score_threshold", "thresh_F1": "f1_threshold", "thresh_iou": "iou_threshold"}
    for variant, printed in {"": recorded["metrics"], **recorded["metrics_variants"]}.items():
        options = {names[variant.split("=")[0]]: float(variant.split("=")[1])} if variant else {}
        metric = GREC("official", **options)
        rows = metric.update_many(samples)
        result = metric.compute()
        assert (result["Pr@F1"], result["T_acc"], result["N_acc"]) == (printed["F1_score"], printed["T_acc"], printed["N_acc"]), variant
        if not variant:
            for correct, (tp, kept, num) in zip(recorded["per_sample_correct"], rows, strict=True):
                assert correct is None or bool(correct) == (2 * tp >= kept + num)


def test_matched_targets_of_real_predictions(shared: Path) -> None:
    samples = json.loads((shared / "data" / "grec_fixture" / "grec_89_predictions.json").read_text())
    assert len(samples) == 89 and any(sample["matched_targets"] for sample in samples)
    for sample in samples:
        pred = np.array(sample["predicted_boxes_xyxy"], np.float64).reshape(-1, 4)
        gt = np.array(sample["target_boxes_xyxy"], np.float64).reshape(-1, 4)
        assert greedy_matches(box_iou(pred, gt).tolist(), 0.5) == sample["matched_targets"], sample["sample_id"]


box = st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 12), st.integers(1, 12)).map(
    lambda v: [float(v[0]), float(v[1]), float(v[0] + v[2]), float(v[1] + v[3])]
)
sample = st.tuples(st.lists(st.tuples(box, st.sampled_from([0.5, 0.7, 0.8, 0.9])), max_size=5), st.lists(box, max_size=4))


@settings(max_examples=25, deadline=None)
@given(st.lists(sample, min_size=1, max_size=6), st.randoms())
def test_order_sharding_and_official_below_strict(drawn: list[Any], rng: Any) -> None:
    samples = [([b for b, _ in found], [s for _, s in found], gt, None, None) for found, gt in drawn]
    results = {}
    for protocol in ("strict", "official"):
        whole, left, right = (GREC(protocol) for _ in range(3))
        whole.update_many(samples)
        shuffled = [(*(_shuffle(s, rng)), s[2], None, None) for s in rng.sample(samples, len(samples))]
        for k, one in enumerate(shuffled):
            (left if k % 2 else right).update(*one)
        assert left.merge(GREC(protocol).load_state(right.state())).state() == whole.state()
        results[protocol] = whole.compute()
    assert results["official"]["Pr@F1"] <= results["strict"]["Pr@F1"]
    assert results["official"]["mean_F1"] <= results["strict"]["mean_F1"]
    assert results["official"]["N_acc"] == results["strict"]["N_acc"]


def _shuffle(one: tuple[Any, ...], rng: Any) -> tuple[list[Any], list[Any]]:
    pairs = list(zip(one[0], one[1], strict=True))
    rng.shuffle(pairs)
    return [b for b, _ in pairs], [s for _, s in pairs]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.sampled_from([0.0, 0.4, 0.5, 0.6, 0.9]), min_size=3, max_size=3), max_size=4))
def test_matching_by_brute_force(overlap: list[list[float]]) -> None:
    best = 0
    rows = range(len(overlap))
    for chosen in itertools.permutations(range(3), min(len(overlap), 3)):
        for picked in itertools.combinations(rows, len(chosen)):
            best = max(best, sum(overlap[r][c] >= 0.5 for r, c in zip(picked, chosen, strict=True)))
    assert most_matches(overlap, 0.5) == best
    assert greedy_matches(overlap, 0.5) == _greedy_by_definition(overlap)
    assert most_matches([list(column) for column in zip(*overlap, strict=True)], 0.5) == best


def _greedy_by_definition(overlap: list[list[float]]) -> int:
    left = np.array(overlap).reshape(-1, 3)
    hits = 0
    for _ in range(min(left.shape)):
        place = int(left.argmax())
        if left.flat[place] < 0.5:
            break
        hits += 1
        left[place // 3, :] = 0
        left[:, place % 3] = 0
    return hits


@settings(max_examples=25, deadline=None)
@given(box, box)
def test_overlaps_agree_with_the_operators(first: list[float], second: list[float]) -> None:
    a, b = np.array([first]), np.array([second])
    assert pair_iou(a, b)[0] == pytest.approx(box_iou(a, b)[0, 0])
    assert pair_iou(a, b)[0] == pair_iou(b, a)[0]
    assert pair_giou_float32(a, b)[0] == pytest.approx(generalized_iou(a, b)[0], abs=1e-5)
    assert pair_giou_float32(a, b)[0] <= pair_iou(a, b)[0] + 1e-6


def test_rec_takes_the_best_box() -> None:
    metric = REC()
    assert metric.update(torch.tensor([FAR, UNIT]), torch.tensor([0.1, 0.2]), UNIT)
    assert not metric.update([], [], UNIT)
    assert metric.merge(REC()).compute() == {"num_samples": 2, "Pr@0.5": 0.5}
    for boxes in ([FAR, UNIT], [UNIT, FAR]):  # a tie: the same answer in any order
        assert not REC().update(boxes, [0.5, 0.5], UNIT)
    assert not REC().update([[5.0, 5.0, 5.0, 5.0]], [0.9], UNIT)
    for scores, words in (([float("nan")], "NaN"), ([], "one score for each box")):
        with pytest.raises(GrexError, match=words):
            metric.update([UNIT], scores, UNIT)
    with pytest.raises(GrexError, match="x1 <= x2"):
        metric.update([[10.0, 10.0, 0.0, 0.0]], [0.9], UNIT)


def test_count() -> None:
    metric = Count()
    metric.update([0, 2, 9], [0, 3, 6])
    metric.update(torch.tensor([1]), torch.tensor([1]), [True])
    result = metric.merge(Count()).compute()
    assert result["num_samples"] == 4
    assert result["accuracy"] == 0.5
    assert result["mae"] == (0 + 1 + 0 + 5) / 4
    assert result["confusion"][1][7] == 1
    for bad in (-1, 1.5, float("nan")):
        with pytest.raises(GrexError, match="whole numbers"):
            metric.update([bad], [1])


def test_a_box_that_is_no_number_is_an_error_without_a_target_too() -> None:
    from grex_mllm.errors import GrexError
    from grex_mllm.metrics import GREC

    with pytest.raises(GrexError, match="box"):
        GREC().update(np.array([[0, 0, np.nan, 5.0]]), np.array([0.9]), np.zeros((0, 4)))
