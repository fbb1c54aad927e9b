"""Let a multimodal model answer a batch of chats: greedily, or sampled with a seed for each row, so that no row depends on its batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grex_mllm.models.lm_decoding import write_on


class Answers(NamedTuple):
    """tokens: int64 [B, T], filled with the end after an end.  first: float [B, V], logits of the first token.

    num_tokens: of each answer, without the end.  ended: whether an end came before the limit.
    """

    tokens: Tensor
    first: Tensor
    num_tokens: list[int]
    ended: list[bool]


def read(model: Any, inputs: dict[str, Any]) -> tuple[Any, Tensor, Tensor | None]:
    """Return the cache of a batch of chats, logits [B, V] after the last token, and how far their positions are ahead (M-RoPE), if so."""
    forget_positions(model)
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    return out.past_key_values, out.logits[:, -1], getattr(model.model, "rope_deltas", None)


def forget_positions(model: Any) -> None:
    """Let no call use the positions that the model keeps from the one before."""
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None


@torch.no_grad()
def write(
    model: Any,
    inputs: dict[str, Any],
    ends: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] = (),
) -> Answers:
    """Answer B chats. inputs: of `Chat.inputs`, on the model's device.  ends: ids that end an answer, `Chat.ends`.

    temperature: 0 = greedy.  top_p: least share of the probability that samples are drawn from.  seeds: one a row, for sampling.
    """
    cache, first, deltas = read(model, inputs)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(logits: Tensor, step: int, rows: Tensor) -> Tensor:
        if temperature <= 0:
            return logits.argmax(-1)
        chance = [float(torch.rand((), generator=generators[int(row)], dtype=torch.float64)) for row in rows]
        return _sampled(logits.float() / temperature, top_p, torch.tensor(chance, dtype=torch.float64, device=logits.device))

    tokens = write_on(model, cache, first, inputs["attention_mask"], ends=list(ends), steps=max_new_tokens, choose=choose, deltas=deltas)
    stops = torch.isin(tokens, torch.tensor(list(ends), device=tokens.device))
    ended = stops.any(1)
    length = torch.where(ended, stops.long().argmax(1), tokens.shape[1])
    return Answers(tokens, first, length.tolist(), ended.tolist())


def _sampled(logits: Tensor, top_p: float, chance: Tensor) -> Tensor:
    """Return int64 [B]: the token at `chance` [B] of the cumulative distribution over the likeliest tokens that hold `top_p` of it."""
    share, order = logits.softmax(-1).double().sort(dim=-1, descending=True, stable=True)
    before = share.cumsum(-1) - share
    kept = (share * (before < top_p)).cumsum(-1)
    at = torch.searchsorted(kept, (chance * kept[:, -1])[:, None].contiguous(), right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    return order.gather(1, at[:, None])[:, 0]
