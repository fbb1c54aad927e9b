"""Mask losses in which what is hard counts more: the focal loss, and learning from the hardest pixels or masks alone.

Focal loss: Lin et al. 2017, equations 4 and 5. Hardest pixels of each mask: bootstrapping (Wu et al. 2016). Hardest masks of a step: online
hard example mining (Shrivastava et al. 2016). Every decoder's mask terms take them by `model.decoder.loss.hard`; all off is the plain
cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from grex_mllm.errors import fault
from grex_mllm.ops.losses import ROUNDING, hardest

LEAST_ERROR = 1e-6  # below which the slope of a root is no number


@dataclass
class HardConfig:
    """What counts more in the mask terms: hard pixels, hard masks. A mask is that of an expression; of a cell or an object where a
    decoder has masks of them."""

    focal_gamma: float = 0.0  # the cross-entropy of a pixel times its error to this power (2 in the paper); 0 = the cross-entropy itself
    # weight of a target's pixels, 1 - alpha of the others (0.25 in the paper); null = as without focal loss. A factor that is the same for
    # all pixels is the term's own weight
    focal_alpha: float | None = None
    pixels: float = 1.0  # share of the pixels of each mask, those of the largest loss, that it learns from
    masks: float = 1.0  # share of the masks of a step, over all processes, those of the largest mean loss, that are learned

    @property
    def off(self) -> bool:
        """Tell whether all that is left is the plain cross-entropy."""
        return not self.focal_gamma and self.focal_alpha is None and self.pixels == 1 and self.masks == 1


def check_hard(config: HardConfig, where: str = "model.decoder.loss.hard") -> None:
    """Raise on numbers that make no loss.

    Raises:
        GrexError: names the field.
    """
    if not config.focal_gamma >= 0:
        raise fault(f"{where}.focal_gamma is {config.focal_gamma:g}", "0 or more", "give another number")
    if config.focal_alpha is not None and not 0 < config.focal_alpha < 1:
        raise fault(f"{where}.focal_alpha is {config.focal_alpha:g}", "a weight between 0 and 1, or null", "give another number")
    for name in ("pixels", "masks"):
        share = getattr(config, name)
        if not 0 < share <= 1:
            raise fault(f"{where}.{name} is {share:g}", "a share above 0 and up to 1 (all of them)", "give another number")


def pixel_losses(
    logits: Tensor, target: Tensor, config: HardConfig, class_weights: Tensor | None = None, inside: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the loss of each pixel and the weight that it has in a mean, float32 [M, S] both, 0 for a pixel that is not learned from.

    logits: float [M, S], above 0 = target.  target: float or bool [M, S], 0 or 1, or the share that the target covers: the error is
    |target - probability|, as for hard targets in the paper.  class_weights: float [2], of background and target, where `focal_alpha`
    leaves them; they weigh the mean, too.  inside: bool [M, S], pixels that count at all; None = all.
    """
    logits, target = logits.float(), target.float()
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if config.focal_gamma:
        each = each * (target - logits.sigmoid()).abs().clamp(min=LEAST_ERROR) ** config.focal_gamma
    weight = torch.ones_like(each)
    if config.focal_alpha is not None:
        each = each * (1.0 - config.focal_alpha + (2.0 * config.focal_alpha - 1.0) * target)
    elif class_weights is not None:
        share = class_weights.to(each)
        weight = share[0] + (share[1] - share[0]) * target
        each = each * weight
    kept = inside
    if config.pixels < 1:
        kept = _hardest_pixels(each.detach(), inside, config.pixels)
    return (each, weight) if kept is None else (each * kept, weight * kept)


def hardest_masks(each: Tensor, weight: Tensor, config: HardConfig) -> tuple[Tensor, Tensor]:
    """Set what `pixel_losses` gave to 0 for all but the hardest masks of the step, by their mean loss; as it is where all are learned."""
    if config.masks == 1:
        return each, weight
    kept = hardest(each.detach().sum(dim=1) / weight.sum(dim=1).clamp(min=LEAST_ERROR), config.masks)[:, None]
    return each * kept, weight * kept


def _hardest_pixels(each: Tensor, inside: Tensor | None, share: float) -> Tensor:
    """Return bool [M, S]: the hardest pixels of each row, their number rounded up."""
    inside = torch.ones_like(each, dtype=torch.bool) if inside is None else inside
    counts = (inside.sum(dim=1, keepdim=True).double() * share - ROUNDING).ceil()  # of each row
    most = int(counts.max()) if len(counts) else 0
    order = each.masked_fill(~inside, -1.0).topk(most, dim=1).indices
    counted = torch.arange(most, device=each.device) < counts
    return torch.zeros_like(inside).scatter(1, order, counted)
