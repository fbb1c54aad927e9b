"""The loss of ReLA: GREx's terms for the last layer's answer and, where wanted, for those of the earlier layers."""

from __future__ import annotations

import torch
from torch import Tensor

from grex_mllm.models.decoders.rela.config import RelaConfig
from grex_mllm.models.grex_losses import GrexLosses
from grex_mllm.types import Batch, GroundingOutput


class RelaCriterion:
    """Turn a grounding answer and its batch into named, unweighted terms and their weighted `total`."""

    reads_targets_only = True

    def __init__(self, decoder: RelaConfig) -> None:
        self.config = decoder.loss
        self.losses = GrexLosses(decoder.loss, decoder.loss.class_weights, "model.decoder")
        self.weights = self.losses.weights

    def __call__(self, output: GroundingOutput, batch: Batch) -> dict[str, Tensor]:
        """Return name -> scalar of the terms with a weight, and `total`.

        With `deep_supervision` each earlier layer's terms are added to the total with that weight, and their sum is reported as `deep`.

        Raises:
            GrexError: a term has a weight, but the model lacks its head or the batch its target.
        """
        terms = self.losses.terms(output, batch)
        total = self.losses.total(terms)
        if self.config.deep_supervision:
            each = [self.losses.total(self.losses.terms(layer, batch)) for layer in output.extra.layers]
            terms["deep"] = torch.stack(each).sum()
            total = total + self.config.deep_supervision * terms["deep"]
        return {**terms, "total": total}
