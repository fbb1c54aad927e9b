"""Let a multimodal model answer a batch of chats: greedily, or sampled with a seed for each row, so that no row depends on its batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grex_mllm.compat import cache_name, cache_of
from grex_mllm.models.lm_decoding import write_on
from grex_mllm.models.lm_packing import position_ids


class Answers(NamedTuple):
    """tokens: int64 [B, T], filled with the end after an end.  first: float [B, V], logits of the first token.

    num_tokens: of each answer, without the end.  ended: whether an end came before the limit.
    """

    tokens: Tensor
    first: Tensor
    num_tokens: list[int]
    ended: list[bool]


class Read(NamedTuple):
    """B chats that are read. cache: keys and values.  first: float [B, V], logits after the last token.  mask: int64 [B, S] of the cache.

    deltas: int64 [B, 1], how far positions are ahead of tokens (M-RoPE); None in other models.
    lengths: tokens of each chat.  cached: how many of them cost nothing, because they had been read for another one.
    """

    cache: Any
    first: Tensor
    mask: Tensor
    deltas: Tensor | None
    lengths: list[int]
    cached: list[int]


def read(model: Any, inputs: dict[str, Any]) -> tuple[Any, Tensor, Tensor | None]:
    """Return the cache of a batch of chats, logits [B, V] after the last token, and how far their positions are ahead (M-RoPE), if so."""
    out = model(**inputs, **positions(model, inputs["attention_mask"]), use_cache=True, logits_to_keep=1)
    return cache_of(out), out.logits[:, -1], getattr(model.model, "rope_deltas", None)


def positions(model: Any, mask: Tensor) -> dict[str, Tensor]:
    """Return position_ids int64 [B, L] that do not count padding; nothing where the model itself counts in three dimensions (M-RoPE).

    Such a model keeps how far it is ahead for the next call; what it keeps from a call before is forgotten here.
    """
    if not hasattr(model.model, "rope_deltas"):
        return {"position_ids": position_ids(mask)}
    model.model.rope_deltas = None
    return {}


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
    return write_after(model, read_batch(model, inputs), ends, max_new_tokens, temperature=temperature, top_p=top_p, seeds=seeds)


@torch.no_grad()
def read_batch(model: Any, inputs: dict[str, Any]) -> Read:
    """Read B chats, each on its own. inputs: of `Chat.inputs`, on the model's device."""
    cache, first, deltas = read(model, inputs)
    lengths = inputs["attention_mask"].sum(1).tolist()
    return Read(cache, first, inputs["attention_mask"], deltas, lengths, [0] * len(lengths))


@torch.no_grad()
def write_after(
    model: Any,
    begun: Read,
    ends: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] = (),
) -> Answers:
    """Answer chats that are read; other arguments as in `write`."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(logits: Tensor, step: int, rows: Tensor) -> Tensor:
        if temperature <= 0:
            return logits.argmax(-1)
        chance = [float(torch.rand((), generator=generators[int(row)], dtype=torch.float64)) for row in rows]
        return sampled(logits.float() / temperature, top_p, torch.tensor(chance, dtype=torch.float64, device=logits.device))

    tokens = write_on(
        model, begun.cache, begun.first, begun.mask, ends=list(ends), steps=max_new_tokens, choose=choose, deltas=begun.deltas
    )
    stops = torch.isin(tokens, torch.tensor(list(ends), device=tokens.device))
    ended = stops.any(1)
    length = torch.where(ended, stops.long().argmax(1), tokens.shape[1])
    return Answers(tokens, begun.first, length.tolist(), ended.tolist())


@torch.no_grad()
def beam_search(
    model: Any,
    cache: Any,
    logits: Tensor,
    mask: Tensor,
    *,
    end: int,
    banned: list[int],
    steps: int,
    num_beams: int,
    num_candidates: int,
    deltas: Tensor | None = None,
) -> Tensor:
    """Return int64 [E, K, steps]: the K best of `num_beams` beams by mean log-likelihood, best first, filled with the end.

    The chats are read already: cache, logits [E, V] after the last token, mask [E, S], deltas as in `lm_decoding.write_on`.  At least one
    token comes before the end; `banned` tokens never come.
    """
    num_sets, device = len(logits), logits.device
    cache.batch_repeat_interleave(num_beams)
    logits, mask = logits.repeat_interleave(num_beams, 0), mask.repeat_interleave(num_beams, 0)
    deltas = None if deltas is None else deltas.repeat_interleave(num_beams, 0)
    score = torch.full((num_sets, num_beams), -torch.inf, device=device)
    score[:, 0] = 0.0  # all beams are alike at first
    tokens = torch.full((num_sets, num_beams, steps), end, dtype=torch.int64, device=device)
    done: list[list[tuple[float, list[int]]]] = [[] for _ in range(num_sets)]
    for step in range(steps):
        values = logits.float().log_softmax(-1)
        values[:, [*banned, end] if step == 0 else banned] = -torch.inf
        total = (score.flatten()[:, None] + values).view(num_sets, -1)
        best, at = total.topk(2 * num_beams)
        beam, token = at // values.shape[1], at % values.shape[1]
        for e, rank in ((token == end) & best.isfinite()).nonzero().tolist():
            if rank < num_beams:
                done[e].append((float(best[e, rank]) / (step + 1), tokens[e, beam[e, rank], :step].tolist()))
        order = (token == end).long().argsort(dim=1, stable=True)[:, :num_beams]  # those that go on, best first
        score, beam, token = (x.gather(1, order) for x in (best, beam, token))
        score = score.masked_fill(token == end, -torch.inf)
        tokens = tokens.gather(1, beam[..., None].expand(-1, -1, steps)).clone()
        tokens[:, :, step] = token
        source = (beam + torch.arange(num_sets, device=device)[:, None] * num_beams).flatten()
        if step + 1 == steps or all(_settled(found, num_beams, float(row.max()), step + 1) for found, row in zip(done, score, strict=True)):
            break
        cache.reorder_cache(source)
        mask = torch.cat([mask[source], mask.new_ones(len(mask), 1)], 1)
        logits = _step(model, cache, token.flatten(), mask, deltas)
    length = step + 1
    result = torch.full((num_sets, num_candidates, steps), end, dtype=torch.int64, device=device)
    for e, found in enumerate(done):
        going = [(float(score[e, k]) / length, tokens[e, k, :length].tolist()) for k in range(num_beams)]
        for k, (_, row) in enumerate(sorted([*found, *going], key=lambda pair: -pair[0])[:num_candidates]):
            result[e, k, : len(row)] = torch.tensor(row, device=device)
    return result


def _settled(found: list[tuple[float, list[int]]], num_beams: int, best: float, length: int) -> bool:
    """Tell whether enough answers have ended and none that goes on can be better now than the worst of the best of these."""
    return len(found) >= num_beams and best / length <= sorted(mean for mean, _ in found)[-num_beams]


def _step(model: Any, cache: Any, token: Tensor, mask: Tensor, deltas: Tensor | None) -> Tensor:
    """Return logits [R, V] after one more token of each row."""
    at = (mask.long().sum(1) - 1)[:, None]
    at = at if deltas is None else (at + deltas).expand(3, -1, -1)
    out = model(input_ids=token[:, None], attention_mask=mask.long(), position_ids=at, use_cache=True, **{cache_name(): cache})
    logits: Tensor = out.logits[:, -1]
    return logits


def sampled(logits: Tensor, top_p: float, chance: Tensor) -> Tensor:
    """Return int64 [B]: the token at `chance` [B] of the cumulative distribution over the likeliest tokens that hold `top_p` of it."""
    share, order = logits.softmax(-1).double().sort(dim=-1, descending=True, stable=True)
    before = share.cumsum(-1) - share
    kept = (share * (before < top_p)).cumsum(-1)
    at = torch.searchsorted(kept, (chance * kept[:, -1])[:, None].contiguous(), right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    return order.gather(1, at[:, None])[:, 0]
