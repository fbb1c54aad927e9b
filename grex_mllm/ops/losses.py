"""Pieces of losses that several decoders share. Every sum is divided by a count over all processes (`shared_count`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from grex_mllm.ops.boxes import cxcywh_to_xyxy, generalized_iou
from grex_mllm.ops.matching import Matches
from grex_mllm.types import MORE_THAN_FIVE

ROUNDING = 1e-6  # that a share of a whole number may be off
_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Let this process compute losses by itself within the block, because the others take no part in it."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def shared_count(count: Tensor | float, like: Tensor, least: float = 1.0) -> Tensor:
    """Return what a sum of this process is divided by, a float32 scalar on the device of `like`: the mean of the count over the processes.

    Gradients are averaged over the processes, so sums divided by it give the loss and the gradients that one process has for the whole
    batch. Every process must call it the same number of times in a step, but within `alone`.  least: of the count over all processes.
    """
    total = torch.as_tensor(count, dtype=torch.float32, device=like.device).detach().clone()
    if not together():
        return total.clamp(min=least)
    torch.distributed.all_reduce(total)
    return total.clamp(min=least) / torch.distributed.get_world_size()


@torch.no_grad()
def hardest(values: Tensor, share: float) -> Tensor:
    """Return bool [M]: which values of this process are among the largest `share` of those of all processes, rounded up.

    values: float [M], M may differ between the processes and be 0. Of equal ones those of the first process come first, and within it
    those that stand first, so that exactly so many are chosen. Every process must call it the same number of times in a step, but within
    `alone`.
    """
    own = values.detach().float()
    rank, sizes = 0, [len(own)]
    if together():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        lengths = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(world)]
        torch.distributed.all_gather(lengths, torch.tensor([len(own)], device=own.device))
        sizes = [int(length) for length in lengths]
        rows = [own.new_zeros(max(sizes)) for _ in range(world)]
        torch.distributed.all_gather(rows, F.pad(own, (0, max(sizes) - len(own))))
        own = torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)])
    chosen = own.sort(descending=True, stable=True).indices[: math.ceil(share * len(own) - ROUNDING)]
    kept = torch.zeros(len(own), dtype=torch.bool, device=own.device)
    kept[chosen] = True
    return kept.split(sizes)[rank]


def together() -> bool:
    """Tell whether other processes compute losses, and statistics of maps, with this one."""
    return not _ALONE.get() and torch.distributed.is_available() and torch.distributed.is_initialized()


def focal_sum(logits: Tensor, target: Tensor, alpha: float) -> Tensor:
    """Sum the focal loss (Lin et al. 2017, gamma 2) of logits against targets 0 or 1 of the same shape; alpha weighs the ones."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    prob = logits.sigmoid()
    wrong = torch.where(target > 0, 1.0 - prob, prob)
    return (torch.where(target > 0, alpha, 1.0 - alpha) * wrong**2.0 * entropy).sum()


def matched_boxes(boxes_norm: Tensor, gt_boxes_norm: Sequence[Tensor], matches: Matches) -> tuple[Tensor, Tensor]:
    """Return the M matched predictions and their targets, float32 [M, 4] cxcywh each."""
    return boxes_norm.float()[matches.problem, matches.query], matches.pick(gt_boxes_norm).to(boxes_norm.device).float()


def giou_each(boxes_norm: Tensor, gt_boxes_norm: Tensor) -> Tensor:
    """Return the generalized IoU (Rezatofighi et al. 2019) of M pairs of cxcywh boxes, float [M]."""
    return generalized_iou(cxcywh_to_xyxy(boxes_norm), cxcywh_to_xyxy(gt_boxes_norm))


def count_cross_entropy(count_logits: Tensor, gt_count: Tensor) -> Tensor:
    """Compute the cross-entropy of the count N_O, logits [E, 7] over {0, ..., 5, >5}; larger counts belong to the last class."""
    total = F.cross_entropy(count_logits.float(), gt_count.clamp(max=MORE_THAN_FIVE), reduction="sum")
    return total / shared_count(len(gt_count), total)
