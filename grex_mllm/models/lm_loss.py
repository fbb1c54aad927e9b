"""The likelihood of text under a causal language model, with logits for the tokens that count alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grex_mllm.models.lm_decoding import position_ids


def token_losses(lm: Any, embeds: Tensor, mask: Tensor, ids: Tensor, real: Tensor) -> Tensor:
    """Return the negative log-likelihood of the last L tokens of E sequences, float [E, L]; 0 where `real` is False.

    embeds: float [E, S, D].  mask: bool [E, S], what is no padding.  ids: int64 [E, L], their tokens; S - L - 1 + i predicts ids i.
    real: bool [E, L], at least one True.  The output layer, whose rows are as wide as the vocabulary, runs for those only: padding costs
    nothing.
    """
    length = ids.shape[1]
    with _rows_alone(lm.get_output_embeddings(), real):
        out = lm(
            inputs_embeds=embeds, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=False, logits_to_keep=length + 1
        )
    logits = out.logits[0]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return embeds.new_zeros(real.shape, dtype=logits.dtype).masked_scatter(real, F.cross_entropy(logits, ids[real], reduction="none"))


@contextmanager
def _rows_alone(head: Any, real: Tensor) -> Iterator[None]:
    """Let an output layer that gets hidden states [E, L + 1, D] read those of `real` [E, L] only, as [1, number, D]."""
    hook = head.register_forward_pre_hook(lambda _module, inputs: (inputs[0][:, :-1][real][None],))
    try:
        yield
    finally:
        hook.remove()
