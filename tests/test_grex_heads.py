"""The heads that bring every segmentation system to GREx: pooled regions, absent heads, the two-way mask, and the 50-pixel rule."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from made_batch import make_batch

from grex_mllm.config import PredictConfig
from grex_mllm.errors import GrexError
from grex_mllm.models.answer import answers
from grex_mllm.models.grex_heads import GrexHeads, GrexHeadsConfig, HeadAnswers, dense_answer, two_way
from grex_mllm.models.grex_losses import GrexLossConfig, GrexLosses
from grex_mllm.types import Geometry, GroundingOutput

NONE = GrexHeadsConfig(minimap=False, no_target=False, boxes=False, count=False)
BARE = GrexLossConfig(minimap=0, no_target=0, box_l1=0, box_giou=0, box_score=0, count=0)
HEAD_OF = {"minimap": "minimap_logits", "no_target": "no_target_logits", "boxes": "boxes_norm", "count": "count_logits"}


def test_cross_entropy_of_two_way_logits_is_binary_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(3, 5, 7, dtype=torch.float64), torch.rand(3, 5, 7) > 0.5
    expected = F.binary_cross_entropy_with_logits(logits, target.double())
    torch.testing.assert_close(F.cross_entropy(two_way(logits), target.long()), expected)
    batch = make_batch(target, [torch.rand(1, 4) for _ in target])
    terms = GrexLosses(BARE, [1.0, 1.0]).terms(dense_answer(logits, HeadAnswers()), batch)
    assert list(terms) == ["mask"]
    torch.testing.assert_close(terms["mask"].double(), expected, rtol=1e-6, atol=0)


def test_regions_are_the_means_of_the_cells() -> None:
    torch.manual_seed(0)
    heads = GrexHeads(GrexHeadsConfig(minimap_side=3), 4, 8).double()
    maps = torch.randn(2, 4, 6, 9, dtype=torch.float64)
    cells = [maps[:, :, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3].mean(dim=(2, 3)) for i in range(3) for j in range(3)]
    for ours, expected in zip(heads(maps), heads(torch.stack(cells, dim=1)), strict=True):
        torch.testing.assert_close(ours, expected)
    answer = heads(maps)
    assert answer.minimap_logits.shape == (2, 9, 2) and answer.minimap_prob.shape == (2, 3, 3)
    torch.testing.assert_close(answer.minimap_prob[:, 1, 2], answer.minimap_logits[:, 5].softmax(-1)[:, 1])
    centres = heads.heads.box_start.sigmoid()[:, :2]  # a new head's box lies at its cell's centre
    torch.testing.assert_close(answer.boxes_norm[0, :, :2], centres)
    torch.testing.assert_close(centres[5], torch.tensor([5 / 6, 0.5]).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", [f.name for f in fields(GrexHeadsConfig) if f.name != "minimap_side"])
def test_each_head_can_be_left_out_alone(name: str) -> None:
    heads = GrexHeads(replace(GrexHeadsConfig(minimap_side=3), **{name: False}), 4, 8)
    answer = heads(torch.randn(1, 4, 6, 6))
    absent = {field for field, value in answer._asdict().items() if value is None}
    assert absent == {HEAD_OF[name]} | {"boxes": {"box_logits"}, "minimap": {"minimap_prob"}}.get(name, set())
    term = {"boxes": "box_l1"}.get(name, name)
    batch = make_batch(torch.zeros(1, 8, 8, dtype=torch.bool), [torch.zeros(0, 4)])
    with pytest.raises(GrexError, match=rf"model\.decoder\.heads\.{name}"):
        GrexLosses(replace(BARE, mask=0, **{term: 1.0}), [1.0, 1.0]).terms(dense_answer(torch.zeros(1, 8, 8), answer), batch)


def test_the_papers_baseline_has_a_mask_alone_and_empties_it_under_fifty_pixels() -> None:
    heads = GrexHeads(NONE, 4, 8)
    assert list(heads.parameters()) == [] and all(value is None for value in heads(torch.randn(1, 4, 6, 6)))
    logits = torch.full((2, 10, 10), -1.0)
    logits[0].view(-1)[:49], logits[1].view(-1)[:50] = 1.0, 1.0
    output: GroundingOutput = dense_answer(logits, HeadAnswers())
    small, kept = answers(output, ["a", "b"], [Geometry(10, 10, 10, 10)] * 2, (10, 10), PredictConfig())
    assert small.no_target and not small.mask.any() and not kept.no_target and kept.mask.sum() == 50
    assert small.boxes_xyxy is None and small.count is None


def test_union_of_targets_is_what_the_mask_learns() -> None:
    """Two objects in one mask, and a sample without target, which is background everywhere."""
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :2], masks[0, 6:] = True, True
    batch = make_batch(masks, [torch.rand(2, 4), torch.zeros(0, 4)])
    logits = torch.where(masks, 20.0, -20.0)
    assert GrexLosses(BARE, [1.0, 1.0]).terms(dense_answer(logits, HeadAnswers()), batch)["mask"] < 1e-6


def test_a_pixel_belongs_to_the_mask_above_a_threshold() -> None:
    logits = torch.logit(torch.tensor([[[0.3, 0.4], [0.6, 0.8]]]))
    for threshold, pixels in ((0.35, 3), (0.5, 2), (0.7, 1)):
        rules = PredictConfig(mask_threshold=threshold, min_mask_pixels=1)
        (answer,) = answers(dense_answer(logits, HeadAnswers()), ["a"], [Geometry(2, 2, 2, 2)], (2, 2), rules)
        assert answer.mask.sum() == pixels and answer.mask_input.sum() == pixels
    for wrong in (0.0, 1.0, 35.0):
        with pytest.raises(GrexError, match="mask_threshold"):
            answers(dense_answer(logits, HeadAnswers()), ["a"], [Geometry(2, 2, 2, 2)], (2, 2), PredictConfig(mask_threshold=wrong))
