"""The likelihood of text under a causal language model, with logits for the tokens that count alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grex_mllm.models.lm_packing import Shared, can_pack, pack, position_ids, rows_alone


def token_losses(lm: Any, embeds: Tensor, mask: Tensor, ids: Tensor, real: Tensor, shared: Shared | None = None) -> Tensor:
    """Return the negative log-likelihood of the last L tokens of E sequences, float [E, L]; 0 where `real` is False.

    embeds: float [E, S, D].  mask: bool [E, S], what is no padding.  ids: int64 [E, L], their tokens; S - L - 1 + i predicts ids i.
    real: bool [E, L], at least one True.  shared: what the sequences have in common; it is computed once where the model allows.
    The output layer, whose rows are as wide as the vocabulary, runs for the tokens of `real` only: padding costs nothing.
    """
    length = ids.shape[1]
    predicting = torch.zeros_like(mask)
    predicting[:, -length - 1 : -1] = real
    if shared is not None and can_pack(lm, mask, shared):
        packs = pack(mask, shared)
        inputs = embeds.flatten(0, 1)[packs.source]
        attention, positions, rows = packs.mask(lm, embeds.dtype), packs.positions, packs.place[predicting]
    else:
        inputs, attention, positions, rows = embeds, mask.long(), position_ids(mask), predicting.flatten().nonzero()[:, 0]
    with rows_alone(lm.get_output_embeddings(), rows):
        out = lm(inputs_embeds=inputs, attention_mask=attention, position_ids=positions, use_cache=False)
    logits = out.logits[0]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return embeds.new_zeros(real.shape, dtype=logits.dtype).masked_scatter(real, F.cross_entropy(logits, ids[real], reduction="none"))
