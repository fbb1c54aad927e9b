"""The loss of M3Att: GREx's terms, and language feature reconstruction (thesis, Eq. 5.5)."""

from __future__ import annotations

import torch
from torch import Tensor

from grex_mllm.models.decoders.m3att.config import M3AttConfig
from grex_mllm.models.grex_losses import GrexLosses
from grex_mllm.ops.losses import shared_count
from grex_mllm.types import Batch, GroundingOutput


def reconstruction(reconstructed: Tensor, projected: Tensor) -> Tensor:
    """Compute the mean squared error of F_rec against F_proj, float [E, C] each, over expressions and channels. No target or not: words are
    words."""
    error = (reconstructed.float() - projected.float()).square().sum()
    return error / shared_count(reconstructed.numel(), error)


@torch.no_grad()
def spread(projected: Tensor) -> Tensor:
    """Return the variance over the expressions of all processes of F_proj, a mean over channels; 0 = collapsed.

    projected: float [E, C], none below 0.
    """
    values = projected.float()
    mean = shared_count(values.sum(dim=0), values, least=0.0) / shared_count(len(values), values)
    return (values - mean).square().sum() / shared_count(values.numel(), values)


class M3AttCriterion:
    """Named terms of M3Att and their weighted `total`; `target_spread` is reported and not learned."""

    reads_targets_only = True

    def __init__(self, decoder: M3AttConfig) -> None:
        self.config = decoder.loss
        self.losses = GrexLosses(decoder.loss, decoder.loss.class_weights)
        self.weights = {**self.losses.weights, "reconstruction": decoder.loss.reconstruction}

    def __call__(self, output: GroundingOutput, batch: Batch) -> dict[str, Tensor]:
        """Return name -> unweighted scalar of the terms with a weight, and `total`.

        Raises:
            GrexError: a term has a weight, but the model lacks its head or the batch its target.
        """
        terms = self.losses.terms(output, batch)
        total = self.losses.total(terms)
        if self.config.reconstruction:
            terms["reconstruction"] = reconstruction(output.extra.reconstructed, output.extra.projected)
            total = total + self.config.reconstruction * terms["reconstruction"]
            terms["target_spread"] = spread(output.extra.projected)
        return {**terms, "total": total}
