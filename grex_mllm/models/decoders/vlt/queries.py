"""Queries from the image and the words: query generation (thesis, Eq. 4.4-4.6), what table 4.2 sets beside it, and query balance."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.errors import fault
from grex_mllm.models.grid import ConvReluNorm, word_rows
from grex_mllm.types import TextFeatures

GENERATED, LEARNED, WORDS = QUERIES = ("generated", "learned", "words")
NONE, RANDOM, THRESHOLD, WEIGHTED = MASKED_WORDS = ("none", "random", "threshold", "weighted")


class Queries(NamedTuple):
    """Queries of E expressions.

    rows: F_q, float [E, N_q, C].  allowed: bool [E, 1, 1, N_q], which are real; None = all.  attention: A_qd, float [E, N_q, L], or None.
    """

    rows: Tensor
    allowed: Tensor | None = None
    attention: Tensor | None = None


class MaskedWords(NamedTuple):
    """A word taken from each of E sentences. rows: bool [E, L], those that stay.  masked: bool [E], whether one was taken at all."""

    rows: Tensor
    masked: Tensor


class ImageQueries(nn.Module):
    """The language-free part of query generation: F_vq (Eq. 4.4), then relu(F_vq W_v).

    F_vr is read without language. With `coordinates` x and y, from -1 to 1, stand beside its channels (the public code of VLT feeds them).
    """

    def __init__(self, width: int, num_queries: int, side: int, coordinates: bool) -> None:
        super().__init__()
        channels = width + 2 if coordinates else width
        self.coordinates = coordinates
        self.reduce = nn.Sequential(ConvReluNorm(channels, width), ConvReluNorm(width, width), ConvReluNorm(width, num_queries))
        self.project = nn.Linear(side * side, width, bias=False)  # W_v

    def forward(self, visual: Tensor, clip: Tensor | None = None) -> Tensor:
        """Return relu(F_vq W_v), float [B, N_q, C].

        visual: F_vr, float [B, C, side, side].  clip: int64 [B], the clip of each frame of a video; the frames of one share their F_vq.
        """
        if self.coordinates:
            visual = torch.cat([visual, _coordinates(visual)], dim=1)
        sequences = self.reduce(visual).flatten(2)
        if clip is not None:
            sequences = clip_mean(sequences, clip)
        return F.relu(self.project(sequences))


class LanguageQueries(nn.Module):
    """F_q of E expressions."""

    def __init__(self, queries: str, num_queries: int, width: int) -> None:
        super().__init__()
        if queries not in QUERIES:
            raise fault(f'model.decoder.queries is "{queries}"', f"one of {', '.join(QUERIES)}", "choose one of them")
        self.kind, self.num_queries = queries, num_queries
        generated = queries == GENERATED
        self.key = nn.Linear(width, width, bias=False) if generated else None  # W_a
        self.value = nn.Linear(width, width, bias=False) if generated else None  # W_t
        self.learned = nn.Parameter(torch.randn(num_queries, width) * 0.02) if queries == LEARNED else None

    def forward(self, visual: Tensor | None, text: TextFeatures, kept: Tensor | None = None) -> Queries:
        """Return the queries.

        visual: relu(F_vq W_v) of each expression's image, float [E, N_q, C].  text: tokens [E, L, C].  kept: bool [E, L], rows that may be
        read; None = all words.
        """
        if self.learned is not None:
            return Queries(self.learned.expand(len(text.tokens), -1, -1))
        if self.key is None or self.value is None:
            short = max(0, self.num_queries - text.tokens.shape[1])
            rows = F.pad(text.tokens, (0, 0, 0, short))[:, : self.num_queries]
            real = F.pad(text.mask.bool(), (0, short))[:, : self.num_queries]
            return Queries(rows * real[..., None], real[:, None, None])
        assert visual is not None
        kept = word_rows(text.mask) if kept is None else kept
        logits = visual @ F.relu(self.key(text.tokens)).transpose(1, 2) * text.tokens.shape[-1] ** -0.5
        attention = logits.masked_fill(~kept[:, None], -torch.inf).softmax(dim=-1)  # Eq. 4.5
        return Queries(attention.to(visual.dtype) @ F.relu(self.value(text.tokens)) + visual, attention=attention)  # Eq. 4.6


class QueryBalance(nn.Module):
    """Weigh each response by a confidence C_q in (0, 1), which a query and its response give (thesis, section 4.2.3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.hidden, self.confidence = nn.Linear(2 * width, width), nn.Linear(width, 1)

    def forward(self, queries: Tensor, responses: Tensor) -> Tensor:
        """Return F_b, float [E, N_q, C], of F_q and F_r."""
        both = torch.cat([F.relu(self.query(queries)), responses], dim=-1)
        return responses * self.confidence(F.relu(self.hidden(both))).sigmoid()


def clip_mean(sequences: Tensor, clip: Tensor) -> Tensor:
    """Return float [B, ...], each the mean over the frames of its clip: so all frames of a clip have the same queries (thesis, 4.3.5).

    clip: int64 [B], from 0.
    """
    num_clips = int(clip.max()) + 1
    sums = sequences.new_zeros(num_clips, *sequences.shape[1:]).index_add(0, clip, sequences)
    return (sums / clip.bincount(minlength=num_clips).to(sums).view(-1, *[1] * (sums.dim() - 1)))[clip]


@torch.no_grad()
def mask_words(attention: Tensor, text_mask: Tensor, rule: str, least_words: int, threshold: float, end_row: bool) -> MaskedWords:
    """Take one word from each sentence of more than `least_words` words (thesis, section 4.2.5).

    attention: A_qd, float [E, N_q, L].  text_mask: [E, L].  rule: random | threshold | weighted: p_m = softmax(a) over the words, a the
    attention summed over the queries.  threshold: in means of a over the sentence's words; above it a word may be taken by the rule
    "threshold", the one of most attention always.  end_row: the last real row is no word.
    """
    words = word_rows(text_mask)
    maskable = words
    if end_row:
        last = text_mask.long().cumsum(dim=1) == text_mask.long().sum(dim=1, keepdim=True)
        maskable = words & ~last
    num = maskable.sum(dim=1)
    chosen = (num > least_words) & (num > 0)
    total = attention.float().sum(dim=1).masked_fill(~maskable, 0.0)
    weights = maskable.float()
    if rule == WEIGHTED:
        weights = total.masked_fill(~maskable, -torch.inf).softmax(dim=1)
    elif rule == THRESHOLD:
        mean = total.sum(dim=1, keepdim=True) / num.clamp(min=1)[:, None]
        weights = ((total > threshold * mean) | (total == total.amax(dim=1, keepdim=True))) & maskable
    weights = torch.where(chosen[:, None], weights.float(), torch.ones_like(total))  # a row of zeros cannot be drawn from
    taken = F.one_hot(torch.multinomial(weights, 1).squeeze(1), text_mask.shape[1]).bool() & chosen[:, None]
    return MaskedWords(words & ~taken, chosen)


def _coordinates(like: Tensor) -> Tensor:
    """Return x and y of every cell, from -1 to 1, float [B, 2, h, w]."""
    y, x = (torch.linspace(-1, 1, n, device=like.device, dtype=like.dtype) for n in like.shape[-2:])
    return torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))]).expand(len(like), -1, -1, -1)
