"""What sets the targets apart from the other objects, computed from their attributes outright."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOST_COMPARED = 3.0  # objects; more count as this many


def compare(attribute_probs: Tensor, classes: Sequence[int], image_index: Tensor, member: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Compare the targets of E sets with the other objects: float32 [E, N, 3] for the objects and [E, K + 1] for the sets, K attributes.

    Of an object: how well a distractor fits all that the targets share; how many distractors are like a target in every attribute; how many
    other targets are. Of a set: whether its targets share a value of each attribute, and how many distractors fit all that they share.
    Whether a description suffices is so in plain sight, before anything is learned.

    attribute_probs: float [B, N, sum of classes], probabilities.  member, other: bool [E, N], targets and distractors.
    """
    with torch.autocast(attribute_probs.device.type, enabled=False):
        attribute_probs = attribute_probs.float()
        same = torch.stack([part @ part.transpose(1, 2) for part in attribute_probs.split(list(classes), -1)]).prod(0)  # [B, N, N]
        same = (same * (1.0 - torch.eye(same.shape[1], device=same.device))).index_select(0, image_index)
        target, distractor = member.float()[..., None], other.float()[..., None]
        rivals, kin = (same @ distractor) * target, (same @ target) * target
        each = attribute_probs.index_select(0, image_index)
        common = (target * each.clamp(min=1e-4).log()).sum(1, keepdim=True).exp()  # [E, 1, C]: the probability that all targets have it
        held = torch.cat([part.sum(-1, keepdim=True) for part in common.split(list(classes), -1)], -1)
        fitting = torch.cat([part.sum(-1, keepdim=True) for part in (common * each).split(list(classes), -1)], -1)
        fits = (1.0 - held + fitting).prod(-1, keepdim=True) * distractor
        objects = torch.cat([fits, rivals, kin], -1).clamp(max=MOST_COMPARED)
        return objects, torch.cat([held[:, 0], fits.sum(1).clamp(max=MOST_COMPARED)], -1)
