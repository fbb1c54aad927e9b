"""Words without their order: which words of expressions mean an object, learned from expressions alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from grex_mllm.ops.losses import shared_count

SMOOTHING = 0.1  # of a word's count in the batch


class WordList(nn.Module):
    """Which tokens of a tokenizer are words: its first ids, until `choose` takes those that a training says most. Saved with the model.

    ids: int64 [V], ascending.
    """

    ids: Tensor

    def __init__(self, number: int) -> None:
        super().__init__()
        self.register_buffer("ids", torch.arange(number))

    def choose(self, counts: Tensor) -> None:
        """Take the tokens that come most often. counts: [size of the vocabulary] of all tokens; of equals, the first ones."""
        best = counts.sort(descending=True, stable=True).indices[: len(self.ids)]
        self.ids.copy_(best.sort().values)


def places_of(ids: Tensor, listed: Tensor) -> tuple[Tensor, Tensor]:
    """Return where ids of any shape stand in an ascending list, int64, and which of them are there, bool; the others get a valid place."""
    places = torch.searchsorted(listed.contiguous(), ids.contiguous()).clamp(max=len(listed) - 1)
    return places, listed[places] == ids


def bag_loss(logits: Tensor, image_index: Tensor, member: Tensor, ids: Tensor, real: Tensor, whole: bool = False) -> Tensor:
    """Compute the mean negative log-likelihood of the words of E expressions from the objects that they mean, a scalar.

    A word of an expression may be said of any of its objects, all alike: its probability is their mean. How often a word comes in the batch
    at all is added to the logits, so that they say how much likelier it is of this object than of any.
    logits: float [B, N, V].  image_index: int64 [E].  member: bool [E, N], objects that are meant; expressions without any do not count.
    ids: int64 [E, L].  real: bool [E, L], words that count.  whole: nothing is added; the logits say how likely a word is.
    """
    real = real & member.any(1, keepdim=True)
    often = torch.zeros(logits.shape[-1], device=logits.device).index_add(0, ids.flatten(), real.flatten().float())
    usual = 0.0 if whole else shared_count(often, logits, least=SMOOTHING).log()
    logs = (logits.float() + usual).log_softmax(-1)
    every = torch.arange(logs.shape[1], device=logs.device)
    each = logs[image_index[:, None, None], every[None, :, None], ids[:, None]]  # [E, N, L]
    counted = member | ~member.any(1, keepdim=True)
    mean = each.masked_fill(~counted[..., None], -math.inf).logsumexp(1) - counted.sum(1, keepdim=True).log()
    return -(mean * real).sum() / shared_count(real.sum(), mean)
