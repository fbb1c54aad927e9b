"""A model of transformers on this machine as a backend: conversations side by side, their requests in batches, each picture read once.

Greedy by default. What a checkpoint's generation_config.json asks for (temperature, penalties, banned words) has no say, but for the tokens
that end an answer. Samples are drawn from a stream of random numbers of their own request, so that no batch changes them.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from grex_mllm.errors import GrexError, fault
from grex_mllm.models.multimodal import Chat, ModelChoice, load_chat, load_multimodal
from grex_mllm.models.multimodal.decoding import Answers, Read, read_batch, write_after
from grex_mllm.models.multimodal.sharing import SharedReader
from grex_mllm.models.multimodal.task_words import TaskWords, answer_tasks
from grex_mllm.models.placement import Placement, placed
from grex_mllm.precision import Resolved, autocast, pick_device, resolve_precision
from grex_mllm.predictors.protocol import Answer
from grex_mllm.zeroshot.base import Conversation, Picture, RawAnswer, Request
from grex_mllm.zeroshot.local_settings import LocalSettings


@dataclass(eq=False)
class _Open:
    """A conversation that waits. replies: to the requests of its round."""

    conversation: Conversation
    replies: list[RawAnswer | None] = field(default_factory=list)


@dataclass(eq=False)
class _Waiting:
    """A request that has no answer yet. place: in its round."""

    opened: _Open
    place: int
    request: Request

    @cached_property
    def pictures(self) -> tuple[str, ...]:
        """Digests of its pictures, in order."""
        return tuple(part.digest for turn in self.request.turns for part in turn.parts if isinstance(part, Picture))

    @property
    def sampling(self) -> tuple[float, float, int]:
        """What all requests of a batch have in common."""
        return self.request.temperature, self.request.top_p, self.request.max_tokens


class Local:
    """A model on a device, in one precision. Of several processes on one machine each takes a GPU of its own (LOCAL_RANK).

    Raises:
        GrexError: no such model or device, a family that is not known, or a setting out of its range.
    """

    def __init__(self, name: str, settings: LocalSettings | None = None, device: str = "auto") -> None:
        settings = settings or LocalSettings()
        if settings.batch < 1:
            raise fault(f"batch {settings.batch}", "at least 1 request", "give another number")
        if (settings.min_pixels is None) != (settings.max_pixels is None):
            raise fault("one of min_pixels and max_pixels", "both or none", "give the other one, too")
        place = torch.device(pick_device(device))
        if place.index is not None and place.type == "cuda":
            torch.cuda.set_device(place)
        precision = resolve_precision(settings.precision, place)
        pixels = None if settings.min_pixels is None or settings.max_pixels is None else (settings.min_pixels, settings.max_pixels)
        chat = load_chat(name, pixels=pixels, tiles=settings.max_tiles)
        with placed(Placement(place, precision.precision)):
            model = load_multimodal(ModelChoice(name, settings.dtype, settings.quantisation, settings.attn_implementation))
        self._begin(Path(name).name, model, chat, settings, precision)

    @classmethod
    def around(cls, model: Any, chat: Chat | TaskWords, settings: LocalSettings, precision: Resolved) -> Local:
        """Return the backend of a model that is loaded already."""
        made = cls.__new__(cls)
        made._begin(type(model).__name__, model, chat, settings, precision)
        return made

    def _begin(self, name: str, model: Any, chat: Chat | TaskWords, settings: LocalSettings, precision: Resolved) -> None:
        self.name, self.model, self.chat, self.settings, self.precision = name, model, chat, settings, precision
        self._shared = SharedReader(self.model, self.chat) if isinstance(self.chat, Chat) else None
        self.done: Counter[str] = Counter()
        self._seconds = 0.0

    def fingerprint(self) -> str:
        """Return a hash of weights, chat template, picture settings, precision and batch settings."""
        found = hashlib.sha256()
        for key, value in self.model.state_dict().items():
            found.update(key.encode())
            found.update(value.flatten()[:64].float().cpu().numpy().tobytes())
        known = [*self.chat.known(), self.precision.precision, vars(self.settings)]
        found.update(json.dumps(known, sort_keys=True, default=str).encode())
        return found.hexdigest()

    @property
    def chats(self) -> bool:
        """Whether the model takes chats; else it is asked by task words, one question at a time."""
        return isinstance(self.chat, Chat)

    def view(self, width: int, height: int) -> tuple[int, int] | None:
        """Return the size of the picture that the model sees of an original of this size."""
        try:
            return self.chat.sent_size(width, height)
        except ValueError:  # the family refuses such a picture; so will the request
            return None

    def hold(self, conversations: Iterator[Conversation]) -> Iterator[Answer]:
        """Hold every conversation to its end; new ones are begun while fewer requests wait than fit into a batch."""
        source, waiting, more = iter(conversations), list[_Waiting](), True
        while more or waiting:
            while more and len(waiting) < self.settings.batch:
                conversation = next(source, None)
                more = conversation is not None
                if conversation is not None:
                    answer = self._go_on(_Open(conversation), waiting)
                    if answer is not None:
                        yield answer
            batch = self._next_batch(waiting)
            for one, raw in zip(batch, self._answers(batch), strict=True):
                one.opened.replies[one.place] = raw
            for opened in dict.fromkeys(one.opened for one in batch):
                if None not in opened.replies:
                    answer = self._go_on(opened, waiting)
                    if answer is not None:
                        yield answer

    def remarks(self) -> list[str]:
        """Return what the run took so far."""
        if not self.done["calls"]:
            return []
        told = f"{self.done['calls']} calls in {self._seconds:.0f} s, {self.done['completion_tokens']} tokens written"
        share = self.done["cached_tokens"] / max(1, self.done["prompt_tokens"])
        where = f"{self.precision.precision} on {self.model.device} ({self.precision.reason})"
        return [f"{told}, {self.done['prompt_tokens']} read, {share:.0%} of them once for several", where]

    def _go_on(self, opened: _Open, waiting: list[_Waiting]) -> Answer | None:
        """Send the replies of a round, or begin; queue the requests of the next round, in front, or return the answer."""
        try:
            while True:
                replies = [reply for reply in opened.replies if reply is not None]
                requests = opened.conversation.send(replies) if opened.replies else next(opened.conversation)
                opened.replies = [None] * len(requests)
                if requests:
                    break
        except StopIteration as end:
            answer: Answer = end.value
            return answer
        made = [_Waiting(opened, n, request) for n, request in enumerate(requests)]
        waiting[:0] = made
        return None

    def _next_batch(self, waiting: list[_Waiting]) -> list[_Waiting]:
        """Take requests of one sampling off the list: those about the first one's pictures, or else those that stand alone with theirs."""
        if not waiting:
            return []
        first = waiting[0]
        alike = [one for one in waiting if one.sampling == first.sampling]
        if self.settings.share_prefix:
            same = [one for one in alike if one.pictures == first.pictures]
            number = Counter(one.pictures for one in waiting)
            alike = same if len(same) > 1 else [one for one in alike if one is first or number[one.pictures] == 1]
        batch = alike[: self.settings.batch]
        taken = set(map(id, batch))
        waiting[:] = [one for one in waiting if id(one) not in taken]
        return batch

    def _answers(self, batch: Sequence[_Waiting]) -> list[RawAnswer]:
        """Answer a batch; where its pictures are refused or memory runs out, its halves, down to single requests, which then fail."""
        if not batch:
            return []
        start = time.perf_counter()
        try:
            with torch.no_grad(), autocast(self.precision.precision, self.model.device.type):
                found = self._batch(batch)
        except (RuntimeError, ValueError) as error:
            refused = isinstance(error, ValueError) and not isinstance(error, GrexError)
            if not refused and not _out_of_memory(error):
                raise
            if len(batch) == 1:
                return [RawAnswer(None, "error", error=str(error).splitlines()[0][:300], seconds=time.perf_counter() - start)]
            half = len(batch) // 2
            return self._answers(batch[:half]) + self._answers(batch[half:])
        spent = time.perf_counter() - start
        self._seconds += spent
        for raw in found:
            raw.seconds = spent / len(batch)
            self.done.update({"calls": 1} | raw.usage)
        return found

    def _batch(self, batch: Sequence[_Waiting]) -> list[RawAnswer]:
        if self._shared is None:
            return self._by_task_words(batch)
        if not self.settings.share_prefix or len({one.pictures for one in batch}) > 1:
            return self._written(batch, self._read_apart(batch))
        rows = self._shared.rows([one.request.turns for one in batch], batch[0].pictures)
        if not self._shared.pads and len({len(row) for row in rows}) > 1:
            return self._by_length(batch, [len(row) for row in rows], self._batch)
        self._check_length(max(map(len, rows)))
        return self._written(batch, self._shared.read(rows) or self._read_apart(batch))

    def _by_length(
        self, batch: Sequence[_Waiting], lengths: list[int], answered: Callable[[Sequence[_Waiting]], list[RawAnswer]]
    ) -> list[RawAnswer]:
        """Answer the questions of each length by themselves."""
        parts = [[n for n, length in enumerate(lengths) if length == wanted] for wanted in sorted(set(lengths))]
        answers = {n: raw for part in parts for n, raw in zip(part, answered([batch[n] for n in part]))}
        return [answers[n] for n in range(len(batch))]

    def _by_task_words(self, batch: Sequence[_Waiting]) -> list[RawAnswer]:
        assert isinstance(self.chat, TaskWords)
        inputs = self.chat.inputs([one.request.turns for one in batch])
        lengths = inputs["attention_mask"].sum(1).tolist()
        if not self.chat.kind.padding and len(set(lengths)) > 1:
            return self._by_length(batch, lengths, self._by_task_words)
        self._check_length(max(lengths))
        given = {k: v.to(self.model.device, self.model.dtype if v.is_floating_point() else None) for k, v in inputs.items()}
        temperature, top_p, most = batch[0].sampling
        most = min(most, self._places - (1 if self.chat.kind.apart else max(lengths)))
        made = answer_tasks(self.model, self.chat, given, most, temperature=temperature, top_p=top_p, seeds=_seeds(batch, temperature))
        found = Read(None, made.first, inputs["attention_mask"], None, lengths, [0] * len(batch))
        return [self._raw(one.request, made, found, n) for n, one in enumerate(batch)]

    def _read_apart(self, batch: Sequence[_Waiting]) -> Read:
        assert isinstance(self.chat, Chat)
        inputs = self.chat.inputs([one.request.turns for one in batch])
        self._check_length(inputs["input_ids"].shape[1])
        return read_batch(self.model, {name: value.to(self.model.device) for name, value in inputs.items()})

    def _written(self, batch: Sequence[_Waiting], found: Read) -> list[RawAnswer]:
        """Write the answers of chats that are read."""
        temperature, top_p, most = batch[0].sampling
        most = min(most, self._places - max(found.lengths))
        seeds = _seeds(batch, temperature)
        made = write_after(self.model, found, self.chat.ends, most, temperature=temperature, top_p=top_p, seeds=seeds)
        return [self._raw(one.request, made, found, n) for n, one in enumerate(batch)]

    def _raw(self, request: Request, made: Answers, found: Read, n: int) -> RawAnswer:
        length = made.num_tokens[n]
        usage = {"prompt_tokens": found.lengths[n], "completion_tokens": length, "cached_tokens": found.cached[n]}
        pixels = next((p.pixels for turn in request.turns[-1:] for p in turn.parts if isinstance(p, Picture)), None)
        return RawAnswer(
            text=self.chat.decode(made.tokens[n, :length].tolist(), special=True),
            finish="stop" if made.ended[n] else "length",
            usage=usage,
            sent=None if pixels is None else self.chat.sent_size(pixels.shape[1], pixels.shape[0]),
            choice_probs=self._choice_probs(request.choices, made.first[n]) if request.choices else None,
        )

    def _choice_probs(self, choices: tuple[str, ...], logits: torch.Tensor) -> dict[str, float]:
        """Return the probability that an answer begins with a word, in whatever case and with or without a space before it.

        Tokens that begin several of the words do not count.

        Raises:
            GrexError: words that begin alike.
        """
        firsts = {word: self._first_tokens(word) for word in choices}
        own = {word: firsts[word] - set[int]().union(*(firsts[other] for other in choices if other != word)) for word in choices}
        share, alike = logits.float().softmax(-1), [word for word in choices if not own[word]]
        if alike:
            raise fault(
                f"choices {', '.join(choices)}, of which {alike[0]} begins like another", "words that begin differently", "change them"
            )
        return {word: float(share[sorted(ids)].sum()) for word, ids in own.items()}

    def _first_tokens(self, word: str) -> set[int]:
        ways = {f"{space}{case}" for case in (word, word.capitalize(), word.upper()) for space in ("", " ")}
        return {ids[0] for way in ways if (ids := self.chat.tokenizer(way, add_special_tokens=False)["input_ids"])}

    @property
    def _places(self) -> int:
        """How many tokens of question and answer the model has positions for."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)

    def _check_length(self, length: int) -> None:
        """Refuse a question that leaves no place for an answer; `_answers` makes it an error of single requests."""
        if length >= self._places:
            raise ValueError(f"a question of {length} tokens; the model has places for {self._places}, with the answer")


def _seeds(batch: Sequence[_Waiting], temperature: float) -> list[int]:
    """Return a seed for each request of a batch that is sampled."""
    return [int(one.request.digest[:15], 16) for one in batch] if temperature > 0 else []


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
