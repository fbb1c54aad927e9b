"""Which tokens count as words in a training: those that its expressions say most (`WordList`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grex_mllm.config import Config
from grex_mllm.data.sources import training_text
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.text import TextTokenizer
from grex_mllm.models.word_bags import WordList

LINES = 20_000
CHUNK = 1_000
Encode = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


def choose_words(model: GrexModel, config: Config, text_tokenizer: TextTokenizer, lm_tokenizer: Any) -> None:
    """Let every list of words that is shorter than its tokenizer's vocabulary take the tokens that the training data says most.

    The same in every process, because it depends on the data alone.
    """
    most = config.model.text.max_tokens
    read, written = (partial(training_text, config.data, LINES, raw=raw) for raw in (True, False))
    _choose(model.grounding, text_tokenizer.vocab_size, lambda texts: text_tokenizer.encode(texts, most), read)
    if model.generator is not None:
        _choose(model.generator, getattr(lm_tokenizer, "num_ids", 0), lambda texts: lm_tokenizer.encode(texts), written)


def _choose(part: nn.Module, size: int, encode: Encode, lines: Callable[[], list[str]]) -> None:
    lists = [module for module in part.modules() if isinstance(module, WordList) and len(module.ids) < size]
    if not lists:
        return
    counts = torch.zeros(size, dtype=torch.int64)
    texts = [line for line in lines() if line.strip()]
    for start in range(0, len(texts), CHUNK):
        ids, mask = encode(texts[start : start + CHUNK])
        counts += torch.bincount(ids[mask.bool()], minlength=size)
    for words in lists:
        words.choose(counts)
