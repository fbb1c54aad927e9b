"""Hungarian matching of predicted boxes with any number of targets, many small problems at once.

The assignment of DETR (Carion et al. 2020, section 3.1): the cheapest one-to-one pairing of targets with queries. The papers of ReLA and
GREx say "L1 and generalized IoU loss" for boxes and leave the pairing open; this is ours, chosen because a set of boxes has no order to
supervise by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from grex_mllm.ops.boxes import cxcywh_to_xyxy, generalized_iou

if TYPE_CHECKING:
    from collections.abc import Sequence

WORST_COST = 1e6


@dataclass(frozen=True)
class MatchCost:
    """Weights of the terms of the pairing cost; 0 leaves a term out of the work as well as of the sum."""

    score: float = 1.0
    box_l1: float = 5.0
    box_giou: float = 2.0


@dataclass(frozen=True)
class Matches:
    """All pairs of a batch of E problems, sorted by problem and then by query.

    problem, query, target: int64 [M] on the predictions' device; target counts from 0 within its problem.
    sizes: targets of each problem, matched or not.
    """

    problem: Tensor
    query: Tensor
    target: Tensor
    sizes: tuple[int, ...]

    def __len__(self) -> int:
        return int(self.problem.numel())

    def pick(self, targets: Sequence[Tensor]) -> Tensor:
        """Gather [M, ...] the matched rows from E tensors [n_e, ...]."""
        starts = torch.tensor([0, *self.sizes], device=self.target.device).cumsum(0)[:-1]
        return torch.cat(list(targets)).index_select(0, starts[self.problem] + self.target)

    def indicator(self, num_queries: int) -> Tensor:
        """Tell bool [E, Q] which queries were matched."""
        hit = torch.zeros(len(self.sizes), num_queries, dtype=torch.bool, device=self.problem.device)
        hit[self.problem, self.query] = True
        return hit


@torch.no_grad()
def match(boxes_norm: Tensor, gt_boxes_norm: Sequence[Tensor], *, logits: Tensor | None = None, cost: MatchCost | None = None) -> Matches:
    """Pair every target of every problem with its own query at the least total cost.

    One cost tensor is computed for the whole batch on its device and moved to the host once. With more targets than queries, every query
    is paired and the dearest targets are left out. A cost that is not a number counts as the worst one, so that the loss, not the
    pairing, reports it.

    Args:
        boxes_norm: float [E, Q, 4] cxcywh.  gt_boxes_norm: E tensors float [n_e, 4], n_e >= 0.
        logits: float [E, Q], score of each query (the cost is minus its sigmoid).
    """
    cost = cost or MatchCost()
    sizes = tuple(int(gt.shape[0]) for gt in gt_boxes_norm)
    if len(sizes) != boxes_norm.shape[0]:
        raise ValueError(f"{boxes_norm.shape[0]} problems but {len(sizes)} sets of targets; give one set, maybe empty, for each problem")
    most = max(sizes, default=0)
    if most == 0:
        empty = torch.zeros(0, dtype=torch.int64, device=boxes_norm.device)
        return Matches(empty, empty, empty, sizes)
    total = pairing_cost(boxes_norm, gt_boxes_norm, logits, cost)
    host = total.clamp(-WORST_COST, WORST_COST).nan_to_num(nan=WORST_COST).cpu().numpy()
    found = [linear_sum_assignment(host[index, :, :size]) for index, size in enumerate(sizes)]
    rows = [np.stack([np.full_like(queries, index), queries, targets]) for index, (queries, targets) in enumerate(found)]
    pairs = torch.from_numpy(np.concatenate(rows, axis=1)).to(boxes_norm.device)
    return Matches(pairs[0], pairs[1], pairs[2], sizes)


def pairing_cost(boxes_norm: Tensor, gt_boxes_norm: Sequence[Tensor], logits: Tensor | None, cost: MatchCost) -> Tensor:
    """Compute float32 [E, Q, N] costs, N the most targets of any problem; columns past a problem's own targets mean nothing."""
    boxes = boxes_norm.float()
    gt = torch.nn.utils.rnn.pad_sequence(list(gt_boxes_norm), batch_first=True).to(boxes)
    total = boxes.new_zeros(boxes.shape[0], boxes.shape[1], gt.shape[1])
    if cost.score and logits is not None:
        total = total - cost.score * logits.float().sigmoid()[:, :, None]
    if cost.box_l1:
        total = total + cost.box_l1 * (boxes[:, :, None] - gt[:, None]).abs().sum(-1)
    if cost.box_giou:
        total = total - cost.box_giou * generalized_iou(cxcywh_to_xyxy(boxes)[:, :, None], cxcywh_to_xyxy(gt)[:, None])
    return total
