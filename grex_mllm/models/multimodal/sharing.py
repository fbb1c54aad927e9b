"""Read what several chats begin with once: the system turn, earlier turns and the pictures, then the words that they have in common.

The key-value cache of the common beginning is copied for every chat; the rest of each is read as one batch, padded between the two. A model
some of whose layers see the last tokens alone (a sliding window) would count that padding, so its batches hold rests of one length.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grex_mllm.compat import cache_name
from grex_mllm.models.multimodal.chat import Chat, is_picture, pixels_of
from grex_mllm.models.multimodal.decoding import Read, read

FEWEST_COMMON = 8  # words in common that are worth a call of their own


class _Pictures(NamedTuple):
    """key: names them.  tensors, tokens: of `Chat.pictures`."""

    key: Hashable
    tensors: dict[str, Tensor]
    tokens: list[str]


class _Beginning(NamedTuple):
    """Tokens up to the last one of a picture, read: cache of one chat, and how far positions are ahead (M-RoPE)."""

    key: Hashable
    ids: list[int]
    cache: Any
    deltas: Tensor | None


class SharedReader:
    """Reads chats about the same pictures; the last pictures and the last beginning stay for the next call. Not for several threads."""

    def __init__(self, model: Any, chat: Chat) -> None:
        self.model, self.chat = model, chat
        self._pictures: _Pictures | None = None
        self._last: _Beginning | None = None

    @property
    def pads(self) -> bool:
        """Whether a batch may hold chats whose rests differ in length."""
        return "sliding_attention" not in (getattr(self.model.config.get_text_config(), "layer_types", None) or [])

    def rows(self, chats: Sequence[Sequence[Any]], key: Hashable) -> list[list[int]]:
        """Return the ids of chats that hold the same pictures, which `key` names.

        Raises:
            GrexError: a chat whose template drops a picture.
            ValueError: a picture that the model's rules refuse.
        """
        if self._pictures is None or self._pictures.key != key:
            tensors, tokens = self.chat.pictures([[pixels_of(part) for turn in chats[0] for part in turn.parts if is_picture(part)]])
            self._pictures = _Pictures(key, dict(tensors), tokens[0])
        return [self.chat.row(chat, self._pictures.tokens)[0] for chat in chats]

    @torch.no_grad()
    def read(self, rows: Sequence[list[int]]) -> Read | None:
        """Read chats, given what `rows` has just returned for them; None where what they have in common ends before the last picture."""
        device = self.model.device
        least = min(len(row) for row in rows) - 1  # one token of each is left to read
        common = next((n for n in range(least) if any(row[n] != rows[0][n] for row in rows)), least)
        start = _after_pictures(rows[0], self.chat.family.image_id)
        if start > common:
            return None
        known_before = self._known(rows[0][:start])
        beginning = self._beginning(rows[0][:start])
        cache, deltas = copy.deepcopy(beginning.cache), beginning.deltas
        known = start
        if len(rows) > 1 and common - start >= FEWEST_COMMON:
            ids = torch.tensor([rows[0][start:common]], device=device)
            self._go_on(cache, ids, torch.ones(1, common, dtype=torch.int64, device=device), deltas)
            known = common
        if len(rows) > 1:
            cache.batch_repeat_interleave(len(rows))
            deltas = None if deltas is None else deltas.expand(len(rows), -1)
        rest = self.chat.padded([row[known:] for row in rows])
        ids, tail = rest["input_ids"].to(device), rest["attention_mask"].to(device)
        mask = torch.cat([tail.new_ones(len(rows), known), tail], 1)
        first = self._go_on(cache, ids, mask, deltas)
        cached = [start if known_before else 0] + [known] * (len(rows) - 1)
        return Read(cache, first, mask, deltas, [len(row) for row in rows], cached)

    def _known(self, ids: list[int]) -> bool:
        assert self._pictures is not None, "rows come first"
        return self._last is not None and self._last.key == self._pictures.key and self._last.ids == ids

    def _beginning(self, ids: list[int]) -> _Beginning:
        if self._last is None or not self._known(ids):
            assert self._pictures is not None, "rows come first"
            inputs = {name: value.to(self.model.device) for name, value in (self._pictures.tensors | self.chat.padded([ids])).items()}
            cache, _, deltas = read(self.model, inputs)
            self._last = _Beginning(self._pictures.key, ids, cache, deltas)
        return self._last

    def _go_on(self, cache: Any, ids: Tensor, mask: Tensor, deltas: Tensor | None) -> Tensor:
        """Read tokens [B, n] behind what the cache holds; return the logits [B, V] after the last one. mask: [B, S + n]."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        positions = positions if deltas is None else (positions + deltas).expand(3, -1, -1)
        given = {"attention_mask": mask, "position_ids": positions, cache_name(): cache}
        logits: Tensor = self.model(input_ids=ids, **given, use_cache=True, logits_to_keep=1).logits[:, -1]
        return logits


def _after_pictures(row: list[int], image_id: int) -> int:
    """Return the place behind the last token of a picture; 1 in a chat without any."""
    return next((n + 1 for n in range(len(row) - 1, -1, -1) if row[n] == image_id), 1)
