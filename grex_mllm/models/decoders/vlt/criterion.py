"""The loss of VLT: GREx's terms, and masked contrastive learning between the expressions of an image (thesis, Eq. 4.8).

A batch holds several expressions of an image (`data.expressions_per_image`), so every relation of the thesis is in it: the same object in
other words (SISO), another object of the image (SIDO), another image (DI, which the formula does not read). An expression of several
targets meets its equals; those that share some targets are neither; an expression without target is no anchor and no positive.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from grex_mllm.errors import fault
from grex_mllm.models.decoders.vlt.config import VltConfig
from grex_mllm.models.decoders.vlt.network import VltExtra
from grex_mllm.models.grex_losses import GrexLosses
from grex_mllm.ops.losses import shared_count
from grex_mllm.types import Batch, GroundingOutput

ALL, ONE = ANCHORS = ("all", "one")
FAR_BELOW = -1e4  # logit of what takes no part: exp of it is 0, and its gradient is no NaN where nothing takes part


def relations(image_index: Tensor, targets: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return bool [E, E] twice: pairs of one image and the same targets (SISO), and of one image and none in common (SIDO).

    image_index: int64 [E].  targets: E tensors int64, positions among the image's instances. Rows of expressions without target are False.
    """
    device = image_index.device
    most = max([int(t.max()) + 1 for t in targets if len(t)], default=1)
    hot = torch.stack([torch.zeros(most).index_fill(0, t.cpu().long(), 1.0) for t in targets]).to(device)
    size, common = hot.sum(dim=1), hot @ hot.T
    together = (image_index[:, None] == image_index[None]) & (size > 0)[:, None]
    same = together & (common == size[:, None]) & (common == size[None]) & ~torch.eye(len(hot), dtype=torch.bool, device=device)
    return same, together & (common == 0)


def at_most(pairs: Tensor, number: int) -> Tensor:
    """Return bool [E, E] with the first `number` True of each row; all of them where it is 0. The order of a batch is a random one."""
    return pairs & (pairs.cumsum(dim=1) <= number) if number else pairs


def contrastive(extra: VltExtra, same: Tensor, different: Tensor, temperature: float, anchors: str) -> Tensor:
    """Compute Eq. 4.8, a scalar: the mean over anchors of the mean over their positives; 0 (with a gradient path) without any.

    The features are F_m, compared by cosine. Positives of an expression are those of `same`, and the copies without one word of these and
    of itself; in the denominator stand one positive and all of `different`.
    """
    features = F.normalize(extra.mask_features.flatten(1).float(), dim=1)
    logits, positive = features @ features.T / temperature, same
    negatives = logits.masked_fill(~different, FAR_BELOW).logsumexp(dim=1, keepdim=True)
    if extra.masked_features is not None and extra.masked is not None:
        copies = F.normalize(extra.masked_features.flatten(1).float(), dim=1)
        has_target = different.any(dim=1) | same.any(dim=1)
        own = torch.diag_embed(has_target)
        logits = torch.cat([logits, features @ copies.T / temperature], dim=1)
        positive = torch.cat([same, (same | own) & extra.masked[None]], dim=1)
    each = F.softplus(negatives - logits) * positive  # -log(e^s / (e^s + sum of e^n))
    num = positive.sum(dim=1)
    values, counted = each.sum(dim=1) / num.clamp(min=1), num > 0
    if anchors == ONE:
        counted = counted & (counted.cumsum(dim=0) == 1)
    return (values * counted).sum() / shared_count(counted.sum(), values)


class VltCriterion:
    """Named terms of VLT and their weighted `total`."""

    reads_targets_only = True

    def __init__(self, decoder: VltConfig) -> None:
        self.config = config = decoder.loss
        if config.anchors not in ANCHORS:
            raise fault(f'model.decoder.loss.anchors is "{config.anchors}"', " or ".join(ANCHORS), "choose one of them")
        self.losses = GrexLosses(config, config.class_weights)
        self.weights = {**self.losses.weights, "contrastive": config.contrastive}

    def __call__(self, output: GroundingOutput, batch: Batch) -> dict[str, Tensor]:
        """Return name -> unweighted scalar of the terms with a weight, and `total`.

        Raises:
            GrexError: a term has a weight, but the model lacks its head or the batch its target.
        """
        terms = self.losses.terms(output, batch)
        total = self.losses.total(terms)
        if self.config.contrastive:
            same, different = relations(batch.image_index, batch.target_index)
            different = at_most(different, self.config.num_different)
            terms["contrastive"] = contrastive(output.extra, same, different, self.config.temperature, self.config.anchors)
            total = total + self.config.contrastive * terms["contrastive"]
        return {**terms, "total": total}
