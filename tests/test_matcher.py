"""Hungarian matching: hand-made cases, brute force over all pairings, no targets, too many targets."""

from __future__ import annotations

import itertools

import pytest
import torch

from grex_mllm.ops.boxes import cxcywh_to_xyxy, generalized_iou
from grex_mllm.ops.matching import MatchCost, match, pairing_cost


def random_boxes(*shape: int) -> torch.Tensor:
    return torch.cat([torch.rand(*shape, 2), torch.rand(*shape, 2) * 0.4 + 0.05], dim=-1)


def test_exact_predictions_are_found() -> None:
    torch.manual_seed(0)
    boxes = random_boxes(2, 6)
    order = [[4, 1, 2], [0, 5]]
    matches = match(boxes, [boxes[0, order[0]], boxes[1, order[1]]], logits=torch.zeros(2, 6))
    found = {(int(p), int(t)): int(q) for p, q, t in zip(matches.problem, matches.query, matches.target)}
    assert found == {(0, 0): 4, (0, 1): 1, (0, 2): 2, (1, 0): 0, (1, 1): 5}
    assert torch.equal(matches.pick([boxes[0, order[0]], boxes[1, order[1]]]), boxes[matches.problem, matches.query])
    assert matches.indicator(6).sum().item() == 5


def test_empty_sets_match_nothing() -> None:
    boxes = random_boxes(3, 4)
    none = torch.zeros(0, 4)
    matches = match(boxes, [none, none, none])
    assert len(matches) == 0
    assert matches.pick([none, none, none]).shape == (0, 4)
    assert not matches.indicator(4).any()
    some = match(boxes, [none, boxes[1, :2], none])
    assert some.problem.tolist() == [1, 1]


def test_more_targets_than_queries_pairs_every_query() -> None:
    boxes = random_boxes(1, 3)
    matches = match(boxes, [random_boxes(7)])
    assert sorted(matches.query.tolist()) == [0, 1, 2]
    assert len(set(matches.target.tolist())) == 3


def test_against_brute_force() -> None:
    torch.manual_seed(1)
    cost = MatchCost(score=1.5, box_l1=5, box_giou=2)
    boxes, logits = random_boxes(4, 5), torch.randn(4, 5)
    gt = [random_boxes(n) for n in (0, 1, 3, 4)]
    matches = match(boxes, gt, logits=logits, cost=cost)
    for e, targets in enumerate(gt):
        table = torch.zeros(5, len(targets))
        for q, n in itertools.product(range(5), range(len(targets))):
            giou = generalized_iou(cxcywh_to_xyxy(boxes[e, q])[None, None], cxcywh_to_xyxy(targets[n])[None, None])
            table[q, n] = -1.5 * logits[e, q].sigmoid() + 5 * (boxes[e, q] - targets[n]).abs().sum() - 2 * giou
        best = min(
            (sum(table[q, n] for n, q in enumerate(choice)) for choice in itertools.permutations(range(5), len(targets))),
            default=torch.tensor(0.0),
        )
        here = matches.problem == e
        assert here.sum() == len(targets)
        reached = table[matches.query[here], matches.target[here]].sum()
        assert float(reached) == pytest.approx(float(best), abs=1e-4)


def test_pairs_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(2)
    boxes, logits = random_boxes(5, 9), torch.randn(5, 9)
    gt = [random_boxes(n) for n in (2, 0, 9, 12, 1)]
    together = match(boxes, gt, logits=logits)
    for e in range(5):
        alone = match(boxes[e : e + 1], gt[e : e + 1], logits=logits[e : e + 1])
        here = together.problem == e
        assert torch.equal(alone.query, together.query[here])
        assert torch.equal(alone.target, together.target[here])


def test_not_a_number_does_not_stop_the_pairing() -> None:
    boxes = random_boxes(1, 4)
    boxes[0, 2] = float("nan")
    matches = match(boxes, [random_boxes(2)])
    assert 2 not in matches.query.tolist()
    assert len(matches) == 2


def test_costs_of_weight_zero_are_left_out() -> None:
    boxes, gt = random_boxes(2, 3), [random_boxes(2), random_boxes(1)]
    none = MatchCost(score=0, box_l1=0, box_giou=0)
    assert not pairing_cost(boxes, gt, torch.randn(2, 3), none).any()


def test_wrong_number_of_sets_is_refused() -> None:
    with pytest.raises(ValueError, match="2 problems but 1"):
        match(random_boxes(2, 3), [random_boxes(1)])
