"""Mask metrics: hand-computed cases, the released evaluator's recorded numbers, brute force, invariances."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from grex_mllm.errors import GrexError
from grex_mllm.metrics import GRES, METRICS, RES
from grex_mllm.metrics.sums import limb_sums, mean
from grex_mllm.ops.masks import encode_rle, segmentation_to_mask
from grex_mllm.ops.rle import area, check_rle, empty_rle, overlap_counts, rle_runs, segmentation_to_rle


def square(first: int, last: int) -> np.ndarray:
    mask = np.zeros((4, 4), bool)
    mask[:, first:last] = True
    return mask


def test_every_entry_of_the_table_has_the_four_verbs() -> None:
    import grex_mllm.metrics as room

    for home in (home for home in METRICS.values() if ":" in home):
        kind = getattr(room, home.split(":")[1])
        assert all(callable(getattr(kind, verb)) for verb in ("update", "merge", "compute", "state", "load_state")), home


def test_table_of_the_four_cases_by_hand() -> None:
    """e, ê in all combinations: columns 0-1 wanted (8 pixels), columns 1-2 predicted (8 pixels, 4 in both)."""
    wanted, said, nothing = square(0, 2), square(1, 3), square(0, 0)
    cases = [(wanted, said, False), (wanted, said, True), (nothing, said, False), (nothing, nothing, True)]
    expected = {"strict": (4 / 12 + 0 + 0 + 1) / 4, "official": (4 / 12 + 0 + 0 + 1) / 4}
    unions = {"strict": 12 + 8 + 8, "official": 12 + 12 + 8}
    for protocol, giou in expected.items():
        metric = GRES(protocol)
        for gt, pred, head in cases:
            metric.update(pred, gt, [head])
        result = metric.compute()
        assert result["gIoU"] == pytest.approx(giou, abs=1e-15)
        assert result["cIoU"] == 4 / unions[protocol]
        assert (result["N_acc"], result["T_acc"], result["balanced_acc"]) == (0.5, 0.5, 0.5)
        assert result["no_target_share"] == 0.5
        assert result["Pr@0.5"] == 0.0


def test_empty_mask_says_no_target_under_strict_only() -> None:
    strict, official = GRES("strict"), GRES("official")
    for metric in (strict, official):
        metric.update(square(0, 0), square(0, 0), [False], [True])
    assert strict.compute()["N_acc"] == 1.0
    assert official.compute()["N_acc"] == 0.0


def test_no_target_free_split() -> None:
    """official prints 0 for both; strict gives null and the computed T_acc."""
    for protocol, n_acc, t_acc in (("official", 0.0, 0.0), ("strict", None, 1.0)):
        metric = GRES(protocol)
        metric.update(square(0, 2), square(0, 2), [False])
        assert (metric.compute()["N_acc"], metric.compute()["T_acc"]) == (n_acc, t_acc)


def test_union_zero_is_zero_with_a_warning() -> None:
    metric = GRES("strict")
    metric.update(square(0, 0), square(0, 0))
    with pytest.warns(UserWarning, match="cIoU"):
        result = metric.compute()
    assert (result["cIoU"], result["gIoU"], result["T_acc"]) == (0.0, 1.0, None)


def test_all_empty_split() -> None:
    """Nothing to find anywhere: T_acc has no sample under either protocol (the released code divides by zero there)."""
    for protocol in ("strict", "official"):
        metric = GRES(protocol)
        metric.update(np.stack([square(0, 0), square(0, 0), square(0, 2)]), np.zeros((3, 4, 4), bool), [True, True, False])
        result = metric.compute()
        assert (result["gIoU"], result["N_acc"], result["T_acc"]) == (2 / 3, 2 / 3, None), protocol
        assert (result["no_target_share"], result["cIoU"], result["balanced_acc"], result["Pr@0.5"]) == (1.0, 0.0, None, None)


def test_no_sample_at_all() -> None:
    result = GRES("strict").compute()
    assert result["num_samples"] == 0 and {v for k, v in result.items() if k != "num_samples"} == {None}


def test_one_pixel_masks_count() -> None:
    for protocol in ("strict", "official"):
        metric = GRES(protocol)
        for at in ((0, 0), (0, 0), (3, 3)):
            pred, gt = np.zeros((2, 4, 4), bool)
            pred[0, 0], gt[at] = True, True
            metric.update(pred, gt, [False])
        result = metric.compute()
        assert (result["gIoU"], result["cIoU"], result["Pr@0.9"]) == (2 / 3, 2 / 4, 2 / 3)


@pytest.mark.parametrize("protocol", ["strict", "official"])
@pytest.mark.parametrize("verb", ["update", "update_logits"])
def test_tensors_are_added_without_waiting_for_the_device(protocol: str, verb: str) -> None:
    """Meta tensors have no values: .item(), .tolist(), bool(), .cpu(), nonzero() and numpy() all raise on them. So nothing here asks."""
    metric = GRES(protocol, min_mask_pixels=1)
    shape = (3, 2, 8, 9) if verb == "update_logits" else (3, 8, 9)
    flags = torch.zeros(3, dtype=torch.bool, device="meta")
    for _ in range(2):
        getattr(metric, verb)(torch.zeros(shape, device="meta"), torch.zeros((3, 8, 9), dtype=torch.uint8, device="meta"), flags, flags)
        pixels = torch.zeros(3, dtype=torch.int64, device="meta")
        metric.update_counts(pixels, pixels, pixels, flags, flags, flags)
    assert metric._device_sums.device.type == "meta"
    with pytest.raises(RuntimeError, match="meta"):  # compute() does ask
        metric.compute()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_host_sync_per_batch_on_a_gpu() -> None:
    rng = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn((4, 2, 48, 64), device="cuda", generator=rng)
    gt = torch.rand((4, 48, 64), device="cuda", generator=rng) > 0.5
    head, none = torch.zeros(4, dtype=torch.bool, device="cuda"), torch.zeros(4, dtype=torch.bool, device="cuda")
    metric, plain = GRES("official"), GRES("official")
    torch.cuda.set_sync_debug_mode("error")
    try:
        metric.update_logits(logits, gt, head, none)
        metric.update_logits(logits, gt, head, none)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(2):
        plain.update_logits(logits.cpu().numpy(), gt.cpu().numpy(), head.cpu().numpy(), none.cpu().numpy())
    assert metric.compute() == plain.compute()


def test_zero_area_target_is_no_division_by_zero() -> None:
    for protocol in ("strict", "official"):
        metric = GRES(protocol)
        metric.update(square(0, 0), square(0, 0), [False], [False])
        with pytest.warns(UserWarning, match="cIoU"):
            assert metric.compute()["gIoU"] == 0.0


def test_small_masks_are_emptied_only_on_request() -> None:
    one_pixel = np.zeros((4, 4), bool)
    one_pixel[0, 0] = True
    plain, fifty = GRES("strict"), GRES("strict", min_mask_pixels=2)
    for metric in (plain, fifty):
        metric.update(one_pixel, one_pixel)
    assert plain.compute()["gIoU"] == 1.0
    assert (fifty.compute()["gIoU"], fifty.compute()["T_acc"]) == (0.0, 0.0)


def test_official_needs_the_head() -> None:
    with pytest.raises(GrexError, match="no-target head"):
        GRES("official").update(square(0, 1), square(0, 1))
    with pytest.raises(GrexError, match="shape"):
        GRES("strict").update(np.zeros((2, 3), bool), square(0, 1))


def test_logits_are_argmax_with_ties_to_the_background() -> None:
    rng = np.random.default_rng(0)
    logits = rng.integers(-2, 3, (3, 2, 5, 6)).astype(np.float32)
    gt = rng.random((3, 5, 6)) > 0.5
    by_logits, by_mask, by_tensor = GRES("official"), GRES("official"), GRES("official")
    by_logits.update_logits(logits, gt, [False] * 3, [False] * 3)
    by_mask.update(logits.argmax(1) == 1, gt, [False] * 3, [False] * 3)
    by_tensor.update_logits(torch.tensor(logits), torch.tensor(gt), torch.zeros(3).bool(), torch.zeros(3).bool())
    assert by_logits.compute() == by_mask.compute() == by_tensor.compute()
    logits[1, 1, 2, 2] = np.nan
    with pytest.raises(GrexError, match="NaN"):
        GRES("official").update_logits(logits, gt, [False] * 3)


def test_res_is_the_targeted_part() -> None:
    metric = RES()
    metric.update(square(1, 3), square(0, 2))
    metric.update(square(0, 0), square(0, 2))
    assert metric.compute()["mIoU"] == pytest.approx(4 / 12 / 2)
    assert metric.compute()["cIoU"] == 4 / 20
    metric.update(square(0, 0), square(0, 0))
    with pytest.raises(GrexError, match="no target"):
        metric.compute()


@pytest.mark.parametrize("case", ["grefcoco_500", "mixed_500", "refcoco_only_100"])
def test_against_the_released_evaluator(shared: Path, case: str) -> None:
    recorded = json.loads((shared / "oracle" / f"gres_eval_{case}.json").read_text())
    arrays = np.load(shared / "oracle" / f"gres_eval_{case}.npz")
    metrics: dict[str, GRES] = {}
    for n, sample in enumerate(recorded["samples"]):
        h, w = sample["shape"]
        pred, gt = (np.unpackbits(arrays[f"{name}_{n:04d}"])[: h * w].reshape(h, w).astype(bool) for name in ("pred", "gt"))
        for key in (sample["source"], "full"):
            metrics.setdefault(key, GRES("official")).update(pred, gt, [sample["pred_no_target"]], [sample["gt_no_target"]])
    for source, printed in recorded["metrics"].items():
        result = metrics[source].compute()
        for name, value in printed.items():
            found = result[name] * (1 if name.endswith("_acc") else 100)
            assert math.isclose(found, value, rel_tol=1e-13, abs_tol=1e-15), (source, name, found, value)


masks = hnp.arrays(bool, st.tuples(st.integers(1, 6), st.just(5), st.just(7)))


@settings(max_examples=15, deadline=None)
@given(masks, st.integers(0, 2**32 - 1), st.sampled_from(["strict", "official"]))
def test_order_sharding_kind_and_bounds(gt: np.ndarray, seed: int, protocol: str) -> None:
    rng = np.random.default_rng(seed)
    pred = gt ^ (rng.random(gt.shape) < 0.2)
    pred[rng.random(len(gt)) < 0.2] = False
    head, none = rng.random(len(gt)) < 0.3, ~gt.any((1, 2))
    whole, left, right, runs, tensors = (GRES(protocol) for _ in range(5))
    whole.update(pred, gt, head, none)
    order = rng.permutation(len(gt))
    cut = len(gt) // 2
    for metric, part in ((left, order[:cut]), (right, order[cut:])):
        for n in part:
            metric.update(pred[n], gt[n], head[n : n + 1], none[n : n + 1])
    runs.update_rle([encode_rle(p) for p in pred], [encode_rle(g) for g in gt], head, none)
    tensors.update(torch.tensor(pred), torch.tensor(gt), torch.tensor(head), torch.tensor(none))
    merged = left.merge(GRES(protocol).load_state(right.state()))
    assert merged.state() == whole.state() == runs.state() == tensors.state()
    shares = [v for k, v in whole.compute().items() if k != "num_samples" and v is not None]
    assert all(0 <= v <= 1 for v in shares)
    ious = [brute_iou(protocol, p, g, h) for p, g, h in zip(pred, gt, head, strict=True)]
    assert whole.compute()["gIoU"] == pytest.approx(sum(ious) / len(ious), abs=1e-15)


@settings(max_examples=15, deadline=None)
@given(masks, st.integers(0, 2**32 - 1))
def test_prediction_and_truth_are_symmetric_where_both_have_pixels(first: np.ndarray, seed: int) -> None:
    second = np.asarray(np.random.default_rng(seed).random(first.shape) < 0.5)
    first[:, 0, 0] = second[:, 1, 1] = True
    for protocol in ("strict", "official"):
        there, back = GRES(protocol), GRES(protocol)
        there.update(first, second, [False] * len(first))
        back.update(second, first, [False] * len(first))
        assert there.compute() == back.compute()


def brute_iou(protocol: str, pred: np.ndarray, gt: np.ndarray, head: bool) -> float:
    says_none = bool(head) or (protocol == "strict" and not pred.any())
    if not gt.any():
        return float(says_none)
    return 0.0 if says_none else float((pred & gt).sum() / (pred | gt).sum())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(1, 2**31 - 1)), max_size=20))
def test_limbs_add_up_exactly(pairs: list[tuple[int, int]]) -> None:
    values = np.array([min(a, b) / b for a, b in pairs], np.float64)
    expected = math.fsum(values) / len(values) if len(values) else None
    assert mean(limb_sums(values), len(values)) == (expected if expected is None else pytest.approx(expected, rel=1e-15))
    assert [int(v) for v in limb_sums(values)] == [int(v) for v in limb_sums(torch.tensor(values))]


@settings(max_examples=25, deadline=None)
@given(hnp.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40))), st.integers(0, 2**32 - 1))
def test_run_length_algebra_equals_pixels(first: np.ndarray, seed: int) -> None:
    second = np.random.default_rng(seed).random(first.shape) < 0.5
    a, b = check_rle(encode_rle(first), *first.shape), check_rle(encode_rle(second))
    assert overlap_counts(a, b) == ((first & second).sum(), first.sum(), second.sum())
    runs = rle_runs(a["counts"])
    assert (first == np.repeat(np.arange(len(runs)) % 2, runs).reshape(first.shape[::-1]).T).all()
    assert check_rle({"size": list(first.shape), "counts": runs.tolist()}) == a


def test_malformed_codes_are_refused_before_c_sees_them() -> None:
    good = encode_rle(square(1, 3))
    assert area(empty_rle(4, 4)) == 0
    for bad, words in [
        (None, "RLE"),
        ({"size": [4, 5], "counts": good["counts"]}, "cover 16 pixels"),
        ({"size": [4, 4], "counts": good["counts"][:-1]}, "cover|cut off"),
        ({"size": [4, 4], "counts": "\x01" + good["counts"]}, "character"),
        ({"size": [4, 4], "counts": "é"}, "character"),
        ({"size": [4, 4], "counts": "o" * 40}, "cut off"),
        ({"size": [4, 4], "counts": [3, 14]}, "cover 17"),
        ({"size": [10**6, 10**6], "counts": ""}, "pixels"),
    ]:
        with pytest.raises(GrexError, match=words):
            check_rle(bad)
    with pytest.raises(GrexError, match="swapped"):
        check_rle(encode_rle(np.ones((2, 3), bool)), 3, 2)


def test_segmentation_codes_equal_pixels_on_real_polygons(shared: Path) -> None:
    data = json.loads((shared / "data" / "photos" / "instances.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in data["images"]}
    chosen = data["annotations"][::150]
    assert len(chosen) > 1
    for annotation in chosen:
        height, width = sizes[annotation["image_id"]]
        for size in ((height, width), (480, 480)):
            code = segmentation_to_rle(annotation["segmentation"], height, width, *size)
            pixels = segmentation_to_mask(annotation["segmentation"], height, width, *size)
            assert overlap_counts(code, encode_rle(pixels)) == (pixels.sum(),) * 3
