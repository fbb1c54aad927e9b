"""Objects shown by the words that they are called by, which are learned from expressions alone.

Every object gets a probability for each word of the language model's vocabulary, from what is seen of it, and its token shows the mean of
the words' embeddings. Source: words of captions as weak labels of image regions (Fang et al. 2015, section 3.1). There a region must
answer for a caption's word, by noisy-or; here it is the objects that an expression means, all alike, and the words compete.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grex_mllm.errors import fault
from grex_mllm.models.generators.region_tokens.config import RegionTokensConfig
from grex_mllm.models.generators.region_tokens.parts import GenerationPart
from grex_mllm.models.generators.region_tokens.ranks import Kinds, Said, likelier
from grex_mllm.models.generators.region_tokens.sets import positions_of
from grex_mllm.models.generators.region_tokens.tokens import ObjectTokens
from grex_mllm.models.language_model import embedding_shape, embedding_weight
from grex_mllm.models.word_bags import bag_loss, places_of


def check_words(cfg: RegionTokensConfig, lm: Any) -> None:
    """Raise GrexError for a number of words that the language model does not have, and for ranks without words."""
    number = embedding_shape(lm)[0]
    if not 0 <= cfg.words <= number:
        raise fault(f"model.generator.words is {cfg.words}", f"0 to {number}, the tokens of the language model", "lower it")
    if cfg.ranks and not cfg.words:
        raise fault("model.generator.ranks without words", "words, by which objects are of a kind", "set model.generator.words")


def with_words(objects: ObjectTokens, lm: Any, ids: Tensor, kinds: Kinds | None = None) -> ObjectTokens:
    """Return the objects with `word_logits`, how much likelier each word is of an object than of any, and `words`, the mean embedding.

    ids: int64 [V], the tokens that are words.  kinds: adds `kind_logits`, how likely each word is of what looks so, and `same`.
    """
    table = embeddings(lm, ids)
    assert objects.queries is not None
    objects.word_logits = likelier(objects.queries, table)
    objects.words, objects.table = objects.word_logits.softmax(-1) @ table, table
    if kinds is not None:
        assert objects.kind_queries is not None
        objects.kind_logits = likelier(objects.kind_queries, table) + kinds.often.float()
        objects.same = kinds.same(objects.kind_logits)
    return objects


def embeddings(lm: Any, ids: Tensor) -> Tensor:
    """Return float32 [V, W]: the embeddings of some ids."""
    return lm.get_input_embeddings()(ids.to(embedding_weight(lm).device)).float()  # type: ignore[no-any-return]


def word_loss(objects: ObjectTokens, part: GenerationPart, listed: Tensor, eos_id: int, said: Said | None = None) -> Tensor:
    """Compute `bag_loss` of the G expressions' tokens, without BOS, EOS and what is no word.

    With ranks it is the sum of three: of the words of objects and of sets as they are `said`, and of kinds.
    listed: int64 [V], the tokens that are words.
    """
    assert objects.word_logits is not None
    ids, known = places_of(part.lm_ids[:, 1:], listed)
    real = part.lm_mask[:, 1:].bool() & (part.lm_ids[:, 1:] != eos_id) & known
    member = torch.zeros(len(ids), objects.tokens.shape[1], dtype=torch.bool, device=ids.device)
    member = positions_of(part.target_index, member)
    if said is None or objects.kind_logits is None:
        return bag_loss(objects.word_logits, part.image_index, member, ids, real)
    rows = torch.arange(len(ids), device=ids.device)
    loss = bag_loss(said.logits, rows, member, ids, real) + bag_loss(said.set_logits[:, None], rows, member.any(1, keepdim=True), ids, real)
    return loss + bag_loss(objects.kind_logits, part.image_index, member, ids, real, whole=True)


def called_by(counts: Tensor) -> Tensor:
    """Return the shares [B, N, V] by which words stand for objects of which expressions said them so often; 0 for an object of no word.

    counts: float [B, N, V]. A word counts as often as it is said of an object, times the logarithm of how much likelier it is there than
    anywhere in the batch (tf-idf); one that is no likelier there does not count.
    """
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1e-6)
    overall = counts.sum((0, 1)) / counts.sum().clamp(min=1e-6)
    weight = counts * (share / overall.clamp(min=1e-9)).clamp(min=1.0).log()
    return weight / weight.sum(-1, keepdim=True).clamp(min=1e-6)
