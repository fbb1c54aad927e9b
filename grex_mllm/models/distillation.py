"""Distillation (Hinton et al. 2015): a small model learns what a larger, trained one answers, beside the ground truth.

What is learned from: the mask's probability of every pixel, and those of "no target" and of the count where both models have such heads.
Regions and their boxes are each model's own and do not correspond.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from grex_mllm.errors import fault
from grex_mllm.ops.losses import shared_count
from grex_mllm.types import GroundingOutput

HEADS = ("no_target_logits", "count_logits")


def distillation(student: GroundingOutput, teacher: GroundingOutput, temperature: float) -> Tensor:
    """Compute T^2 KL(teacher || student) of the probabilities at temperature T, a scalar that is 0 for equal answers.

    The mask's term is a mean over pixels and expressions at the student's size, the heads' are means over expressions; their sum.

    Raises:
        GrexError: a student that makes no mask in training.
    """
    logits = student.mask_logits
    if not logits.shape[-1]:
        raise fault("loss.distill with a decoder that makes no mask in training", "one that does", "choose another model.decoder")
    wanted = teacher.mask_logits.to(logits.device).float()
    if wanted.shape[-2:] != logits.shape[-2:]:
        wanted = F.interpolate(wanted, size=logits.shape[-2:], mode="bilinear", align_corners=False)
    total = divergence(logits, wanted, temperature)
    for name in HEADS:
        own, theirs = getattr(student, name), getattr(teacher, name)
        if own is not None and theirs is not None:
            total = total + divergence(own, theirs, temperature)
    return total


def divergence(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Compute T^2 KL(softmax(wanted / T) || softmax(logits / T)) over axis 1, a mean over all others.

    logits, wanted: float [E, K, ...]. The gradient's size does not depend on T then.
    """
    own = (logits.float() / temperature).log_softmax(dim=1)
    theirs = (wanted.detach().to(own) / temperature).log_softmax(dim=1)
    total = (theirs.exp() * (theirs - own)).sum() * temperature**2
    return total / shared_count(logits.numel() // logits.shape[1], total)


def check_distillation(weight: float, temperature: float) -> None:
    """Raise GrexError for a weight or a temperature that makes no loss."""
    if not weight >= 0:
        raise fault(f"loss.distill is {weight:g}", "0 or more", "give another number")
    if not temperature > 0:
        raise fault(f"loss.distill_temperature is {temperature:g}", "a number above 0", "give another number")
