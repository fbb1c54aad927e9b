"""The loss terms: hand-computed values, the recorded terms of the released code, batches without any target, missing heads."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_batch import RELEASED, make_batch

from grex_mllm.errors import GrexError
from grex_mllm.models.decoders.rela.config import RelaConfig, RelaLossConfig
from grex_mllm.models.decoders.rela.criterion import RelaCriterion
from grex_mllm.models.decoders.rela.network import RelaExtra
from grex_mllm.models.grex_losses import box_score, mask_cross_entropy, minimap_cross_entropy, minimap_target
from grex_mllm.ops.losses import count_cross_entropy
from grex_mllm.ops.matching import match
from grex_mllm.types import GroundingOutput

WEIGHTS = torch.tensor([0.9, 1.1])


def make_output(num: int, queries: int = 9, requires_grad: bool = False) -> GroundingOutput:
    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).requires_grad_(requires_grad)

    return GroundingOutput(
        mask_logits=leaf(num, 2, 6, 8),
        minimap_logits=leaf(num, queries, 2),
        no_target_logits=leaf(num, 2),
        boxes_norm=(torch.rand(num, queries, 4) * 0.5 + 0.1).requires_grad_(requires_grad),
        box_logits=leaf(num, queries),
        count_logits=leaf(num, 7),
    )


@pytest.mark.parametrize("name", ["rela_nano_swin", "rela_nano_r50"])
def test_against_released_terms(shared: Path, name: str) -> None:
    recorded = torch.load(shared / "oracle" / name / "oracle.pt", weights_only=True)
    head = recorded["eval"]["head_out"]
    masks = torch.cat([sample["gt_mask_merged"] for sample in recorded["inputs"]])
    batch = make_batch(masks, [torch.zeros(0, 4) for _ in recorded["inputs"]])
    batch.no_target = torch.tensor([bool(sample["empty"]) for sample in recorded["inputs"]])
    terms = RelaCriterion(RELEASED)(GroundingOutput(head["pred_masks"], head["pred_logits"], head["nt_label"]), batch)
    expected = recorded["train"]["ce_terms_unweighted"]
    for ours, theirs in (("mask", "mask"), ("minimap", "minimap"), ("no_target", "nt")):
        assert float(terms[ours]) == pytest.approx(expected[theirs], abs=1e-5)
    assert float(terms["total"]) == pytest.approx(recorded["train"]["losses"]["loss_mask"], abs=5e-5)


def test_mask_mean_is_weighted_by_class() -> None:
    logits = torch.tensor([[[[2.0, 0.0]], [[0.0, 1.0]]]])  # one row of two pixels, margins 2 for background and 1 for target
    gt = torch.tensor([[[False, True]]])
    by_hand = (0.9 * math.log1p(math.exp(-2)) + 1.1 * math.log1p(math.exp(-1))) / 2.0
    assert float(mask_cross_entropy(logits, gt, WEIGHTS)) == pytest.approx(by_hand, rel=1e-6)


def test_minimap_targets() -> None:
    mask = torch.zeros(1, 40, 40, dtype=torch.bool)
    mask[0, 0:10, 0:10] = True  # a whole cell
    mask[0, 10:14, 10:14] = True  # a corner of a cell: no centre pixel
    mask[0, 34:36, 34:35] = True  # two of the four centre pixels of the last cell
    truncated = minimap_target(mask, 4, "truncated")[0]
    assert truncated.nonzero().flatten().tolist() == [0]
    area = minimap_target(mask, 4, "area")[0]
    assert area[0] == 1 and area[5].item() == pytest.approx(0.16) and area[15].item() == pytest.approx(0.02)
    with pytest.raises(GrexError, match="minimap_target"):
        minimap_target(mask, 4, "maximum")


def test_soft_minimap_equals_hard_for_zero_and_one() -> None:
    torch.manual_seed(0)
    logits, hard = torch.randn(3, 16, 2), torch.rand(3, 16) > 0.6
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), hard.flatten().long(), weight=WEIGHTS)
    assert float(minimap_cross_entropy(logits, hard.float(), WEIGHTS)) == pytest.approx(float(expected), rel=1e-6)


def test_count_of_many_is_the_last_class() -> None:
    logits = torch.randn(2, 7)
    assert torch.equal(count_cross_entropy(logits, torch.tensor([6, 3])), count_cross_entropy(logits, torch.tensor([250, 3])))


def test_perfect_boxes_cost_nothing() -> None:
    gt = [torch.tensor([[0.3, 0.4, 0.2, 0.2], [0.7, 0.6, 0.3, 0.1]]), torch.zeros(0, 4)]
    output = make_output(2)
    assert output.boxes_norm is not None and output.box_logits is not None
    output.boxes_norm[0, [3, 7]] = gt[0]
    output.box_logits[:] = -20
    output.box_logits[0, [3, 7]] = 20
    terms = RelaCriterion(RelaConfig(loss=RelaLossConfig()))(output, make_batch(torch.zeros(2, 24, 32, dtype=torch.bool), gt))
    for name in ("box_l1", "box_giou", "box_score"):
        assert float(terms[name]) == pytest.approx(0, abs=1e-6)


def test_focal_score_by_hand() -> None:
    matches = match(torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]]]), [torch.tensor([[0.5, 0.5, 0.2, 0.2]])])
    logits = torch.tensor([[0.0, 1.0]])
    p = 1 / (1 + math.exp(-1))
    by_hand = 0.25 * 0.25 * math.log(2) + 0.75 * p**2 * math.log1p(math.exp(1))
    assert float(box_score(logits, matches, "focal")) == pytest.approx(by_hand, rel=1e-5)
    assert float(box_score(logits, matches, "bce")) == pytest.approx((math.log(2) + math.log1p(math.exp(1))) / 2, rel=1e-5)
    with pytest.raises(GrexError, match="box_score_kind"):
        box_score(logits, matches, "hinge")


@pytest.mark.parametrize("kind", ["area", "truncated"])
def test_no_target_batches_are_finite_and_reach_every_head(kind: str) -> None:
    output = make_output(3, requires_grad=True)
    batch = make_batch(torch.zeros(3, 24, 32, dtype=torch.bool), [torch.zeros(0, 4)] * 3)
    terms = RelaCriterion(RelaConfig(loss=RelaLossConfig(minimap_target=kind)))(output, batch)
    assert all(torch.isfinite(value) for value in terms.values())
    assert terms["box_l1"].item() == terms["box_giou"].item() == 0
    terms["total"].backward()
    reached = []
    for name in ("mask_logits", "minimap_logits", "no_target_logits", "boxes_norm", "box_logits", "count_logits"):
        gradient = getattr(output, name).grad
        assert torch.isfinite(gradient).all(), name
        if (gradient.abs().flatten(1).amax(1) > 0).all():  # in every sample
            reached.append(name)
    # without a true box there is nothing to draw boxes to
    assert reached == ["mask_logits", "minimap_logits", "no_target_logits", "box_logits", "count_logits"]
    assert not output.boxes_norm.grad.any()  # type: ignore[union-attr]


def test_total_is_the_weighted_sum_and_deep_supervision_adds_layers() -> None:
    output, earlier = make_output(2), make_output(2)
    batch = make_batch(torch.rand(2, 24, 32) > 0.7, [torch.tensor([[0.3, 0.4, 0.2, 0.2]]), torch.zeros(0, 4)])
    config = RelaLossConfig(mask=2, minimap=3, no_target=0, box_l1=5, box_giou=7, box_score=11, count=13)
    terms = RelaCriterion(RelaConfig(loss=config))(output, batch)
    assert "no_target" not in terms
    weighted = sum(getattr(config, name) * float(value) for name, value in terms.items() if name != "total")
    assert float(terms["total"]) == pytest.approx(weighted, rel=1e-5)
    output = output._replace(extra=RelaExtra(torch.zeros(0), [earlier, earlier]))
    deep = RelaCriterion(RelaConfig(loss=replace(config, deep_supervision=0.5)))(output, batch)
    once = float(RelaCriterion(RelaConfig(loss=config))(earlier, batch)["total"])
    assert float(deep["total"]) == pytest.approx(weighted + 0.5 * 2 * once, rel=1e-5)


def test_missing_heads_and_targets_are_named() -> None:
    batch = make_batch(torch.zeros(1, 24, 32, dtype=torch.bool), [torch.zeros(0, 4)])
    bare = make_output(1)._replace(boxes_norm=None, box_logits=None, count_logits=None)
    with pytest.raises(GrexError, match=r"decoder\.boxes"):
        RelaCriterion(RelaConfig(loss=RelaLossConfig()))(bare, batch)
    with pytest.raises(GrexError, match=r"decoder\.count"):
        RelaCriterion(RelaConfig(loss=RelaLossConfig(box_l1=0, box_giou=0, box_score=0)))(bare, batch)
    batch.gt_masks = None
    with pytest.raises(GrexError, match="without masks"):
        RelaCriterion(RELEASED)(bare, batch)
    with pytest.raises(GrexError, match="class_weights"):
        RelaCriterion(RelaConfig(loss=RelaLossConfig(class_weights=[1.0])))
