"""Write text after a prefix of embeddings: greedy and sampling on a prefix that is encoded once, beam search by transformers.

Sampling reads one uniform number per candidate and step from a seeded stream that is the same for every object set, so an answer depends
neither on the batch that it is computed in nor on the vocabulary size. The numbers of one step are stratified over the candidates
(candidate k of K gets one from its own K-th of [0, 1), the K-ths shuffled anew at each step): each candidate is an exact sample, and
together they differ more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grex_mllm.compat import cache_name, cache_of
from grex_mllm.errors import fault
from grex_mllm.models.lm_packing import Shared, can_pack, pack, position_ids, rows_alone

MODES = ("greedy", "beam", "sample")


@dataclass
class Prefix:
    """Embeddings before the expression. embeds: float [E, P, D].  mask: bool [E, P]; padding only behind the first token of a row.

    summary: float [E, D], added to the embedding of the token that opens the expression.
    objects: all objects of the images that the sets belong to.
    shared: what the prefixes begin with in common.  said: the words that the sets are likely to be called by, of all rows (`Said`).
    """

    embeds: Tensor
    mask: Tensor
    summary: Tensor
    objects: Any = None
    shared: Shared | None = None
    said: Any = None

    def part(self, rows: slice) -> Prefix:
        """Return the prefixes of some rows."""
        known = self.shared
        shared = None if known is None else Shared(known.frame, known.image, known.image_index[rows])
        return Prefix(self.embeds[rows], self.mask[rows], self.summary[rows], self.objects, shared)

    def open(self, lm: Any, opener: int) -> tuple[Tensor, Tensor]:
        """Return (embeds [E, P + 1, D], mask [E, P + 1]) with the token that opens the expression."""
        rows = self.embeds.shape[0]
        first = lm.get_input_embeddings()(torch.full((rows, 1), opener, dtype=torch.int64, device=self.embeds.device)).to(self.embeds.dtype)
        return torch.cat([self.embeds, first + self.summary[:, None]], 1), torch.cat([self.mask, self.mask.new_ones(rows, 1)], 1)


def stratified_uniforms(num_candidates: int, steps: int, seed: int) -> Tensor:
    """Return float64 [K, T] in [0, 1): each column holds one number of each K-th of the interval, in random order."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(num_candidates, steps, generator=generator, dtype=torch.float64)
    places = torch.rand(num_candidates, steps, generator=generator, dtype=torch.float64).argsort(0)
    return (places + noise) / num_candidates


@torch.no_grad()
def decode(
    lm: Any,
    prefix: Prefix,
    opener: int,
    eos_id: int,
    banned: list[int],
    max_new_tokens: int,
    uniforms: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Return int64 [E, K, T] tokens after the opener, EOS-filled after the end. uniforms [K, T]: sample; None: greedy, K = 1.

    At least one token comes before EOS; `banned` tokens never come. Rows that have ended leave the batch.
    """
    embeds, mask = prefix.open(lm, opener)
    cache, logits = _read(lm, embeds, mask, prefix.shared)
    return draw(lm, cache, logits, mask, eos_id, banned, max_new_tokens, uniforms, temperature)


@torch.no_grad()
def draw(
    lm: Any,
    cache: Any,
    logits: Tensor,
    mask: Tensor,
    eos_id: int,
    banned: list[int],
    max_new_tokens: int,
    uniforms: Tensor | None = None,
    temperature: float = 1.0,
    deltas: Tensor | None = None,
) -> Tensor:
    """Return what `decode` does, of sequences that are read already: their cache, logits [E, V] after the last token, and mask [E, S].

    deltas: as in `write_on`.
    """
    num_sets, num = len(logits), 1 if uniforms is None else len(uniforms)
    chances = None if uniforms is None else uniforms.to(logits.device)
    if num > 1:
        cache.batch_repeat_interleave(num)
        logits, mask = logits.repeat_interleave(num, 0), mask.repeat_interleave(num, 0)
        deltas = None if deltas is None else deltas.repeat_interleave(num, 0)

    def choose(values: Tensor, step: int, rows: Tensor) -> Tensor:
        chance = None if chances is None else chances[:, step][rows % num]
        return _choose(values, [*banned, eos_id] if step == 0 else banned, chance, temperature)

    tokens = write_on(lm, cache, logits, mask, ends=[eos_id], steps=max_new_tokens, choose=choose, deltas=deltas)
    return tokens.view(num_sets, num, max_new_tokens)


@torch.no_grad()
def write_on(
    lm: Any,
    cache: Any,
    logits: Tensor,
    mask: Tensor,
    *,
    ends: list[int],
    steps: int,
    choose: Callable[[Tensor, int, Tensor], Tensor],
    deltas: Tensor | None = None,
) -> Tensor:
    """Return int64 [R, steps] tokens of R rows that are read already, filled with `ends[0]` after an end. Rows that ended leave the batch.

    logits: float [R, V] after the last token.  mask: [R, S] of what the cache holds.  ends: tokens that end a row.
    choose(logits [r, V], step, rows [r]): the next tokens of the rows that are left.  deltas: int64 [R, 1], what positions are ahead of
    the number of tokens, where a model counts in three dimensions (M-RoPE).
    """
    device, last = logits.device, ends[0]
    result = torch.full((len(logits), steps), last, dtype=torch.int64, device=device)
    rows, stops = torch.arange(len(logits), device=device), torch.tensor(ends, device=device)
    for step in range(steps):
        token = choose(logits, step, rows)
        result[rows, step] = token
        going = ~torch.isin(token, stops)
        if step + 1 == steps or not bool(going.any()):
            break
        if int(going.sum()) < 0.75 * len(rows):
            kept = going.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            rows, token, mask, going = rows[kept], token[kept], mask[kept], going[kept]
            deltas = None if deltas is None else deltas[kept]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = (mask.long().sum(1) - 1)[:, None]
        positions = positions if deltas is None else (positions + deltas).expand(3, -1, -1)
        out = lm(input_ids=token[:, None], attention_mask=mask.long(), position_ids=positions, use_cache=True, **{cache_name(): cache})
        cache, logits = cache_of(out), out.logits[:, -1]
        ended = torch.full_like(logits[:1], -torch.inf).index_fill_(1, rows.new_tensor([last]), 0.0)
        logits = torch.where(going[:, None], logits, ended)  # a row that has ended but not yet left may only go on with the end
    return result


@torch.no_grad()
def beam_search(
    lm: Any,
    prefix: Prefix,
    opener: int,
    eos_id: int,
    pad_id: int,
    banned: list[int],
    max_new_tokens: int,
    num_beams: int,
    num_candidates: int,
) -> Tensor:
    """Return int64 [E, K, T], the best K of `num_beams` beams by mean log-likelihood, best first, padded with EOS or padding.

    These settings alone rule: what an LLM's generation_config.json asks for (penalties, temperatures, ...) went when it was read.
    """
    embeds, mask = prefix.open(lm, opener)
    tokens = lm.generate(
        inputs_embeds=embeds,
        attention_mask=mask.long(),
        do_sample=False,
        num_beams=num_beams,
        num_return_sequences=num_candidates,
        min_new_tokens=1,
        max_new_tokens=max_new_tokens,
        suppress_tokens=banned or None,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )
    return tokens.view(len(embeds), num_candidates, -1)


def _read(lm: Any, embeds: Tensor, mask: Tensor, shared: Shared | None) -> tuple[Any, Tensor]:
    """Return the cache of E sequences of S tokens, and the logits [E, V] after the last one, which is no padding."""
    if shared is None or getattr(lm.config, "sliding_window", None) is not None or not can_pack(lm, mask, shared):
        out = lm(inputs_embeds=embeds, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=True, logits_to_keep=1)
        return cache_of(out), out.logits[:, -1]
    packs = pack(mask, shared)
    with rows_alone(lm.get_output_embeddings(), packs.place[:, -1]):
        out = lm(
            inputs_embeds=embeds.flatten(0, 1)[packs.source],
            attention_mask=packs.mask(lm, embeds.dtype),
            position_ids=packs.positions,
            use_cache=True,
        )
    packed = cache_of(out)
    cache = type(packed)()
    for number, layer in enumerate(packed.layers):  # [P, heads, L, C] to [E, heads, S, C]
        keys, values = (x.transpose(1, 2).flatten(0, 1)[packs.place].transpose(1, 2) for x in (layer.keys, layer.values))
        cache.update(keys, values, number)
    return cache, out.logits[0]


def _choose(logits: Tensor, forbidden: list[int], chance: Tensor | None, temperature: float) -> Tensor:
    """Return int64 [rows]: the likeliest token, or the one at `chance` of the cumulative distribution."""
    values = logits.float()
    if forbidden:
        values[:, forbidden] = -torch.inf
    if chance is None:
        return values.argmax(-1)
    share = (values / temperature).softmax(-1).double().cumsum(-1)
    share = share / share[:, -1:]
    return torch.searchsorted(share, chance[:, None].contiguous(), right=True)[:, 0].clamp(max=values.shape[1] - 1)


def check_mode(mode: str, num_candidates: int, temperature: float) -> None:
    """Raise on settings with which nothing can be written.

    Raises:
        GrexError: an unknown mode, fewer than one candidate, temperature not above 0.
    """
    if mode not in MODES:
        raise fault(f"generation mode {mode!r}", f"one of {', '.join(MODES)}", "fix the mode")
    if num_candidates < 1 or (mode == "greedy" and num_candidates != 1):
        raise fault(f"{num_candidates} candidates with mode {mode}", "1 for greedy, 1 or more for beam and sample", "change one of them")
    if temperature <= 0:
        raise fault(f"temperature {temperature}", "a number above 0", "use mode greedy for the likeliest answer")
