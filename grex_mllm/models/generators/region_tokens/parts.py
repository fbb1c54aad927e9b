"""The generation part of a batch, and the tokenizer, of the region-token generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from grex_mllm.models.generators.region_tokens.config import RegionTokensConfig
from grex_mllm.models.lm_tokenizer import LMTokenizer, train_sentencepiece
from grex_mllm.types import GenerationImage, GenerationItem


class GenerationPart(NamedTuple):
    """G expressions to learn.

    lm_ids, lm_mask: int64 [G, L] tokens with BOS and EOS, right-padded.  image_index: int64 [G].  target_index: G x int64 [n_g].
    weight: float32 [G], 0 for the stand-in of a batch without any expression, which keeps the step's graph the same.
    """

    lm_ids: Tensor
    lm_mask: Tensor
    image_index: Tensor
    target_index: list[Tensor]
    weight: Tensor

    def first(self) -> GenerationPart:
        """Return the first expression alone."""
        return GenerationPart(self.lm_ids[:1], self.lm_mask[:1], self.image_index[:1], self.target_index[:1], self.weight[:1])


def collate(
    config: RegionTokensConfig, tokenizer: LMTokenizer, images: Sequence[GenerationImage], items: Sequence[GenerationItem]
) -> tuple[GenerationPart, list[str]]:
    """Return the part, and the ids of the expressions that are left out because they have more than `max_expression_tokens` tokens.

    The tokens count with BOS and EOS. `images` are not read: the masks are in the batch.
    """
    if not items:
        return _stand_in(tokenizer), []
    ids, mask = tokenizer.encode([item.expression for item in items])
    fits = mask.sum(1) <= config.max_expression_tokens
    left_out = [item.expression_id for item, fit in zip(items, fits.tolist(), strict=True) if not fit]
    kept = [item for item, fit in zip(items, fits.tolist(), strict=True) if fit]
    if not kept:
        return _stand_in(tokenizer), left_out
    ids, mask = ids[fits], mask[fits]
    longest = int(mask.sum(1).max())
    index = torch.tensor([item.image for item in kept], dtype=torch.int64)
    targets = [torch.from_numpy(item.targets) for item in kept]
    return GenerationPart(ids[:, :longest], mask[:, :longest], index, targets, torch.ones(len(kept))), left_out


def _stand_in(tokenizer: LMTokenizer) -> GenerationPart:
    ids = torch.tensor([[tokenizer.bos_id, tokenizer.eos_id]])
    first = torch.zeros(1, dtype=torch.int64)
    return GenerationPart(ids, torch.ones_like(ids), first, [torch.zeros(0, dtype=torch.int64)], torch.zeros(1))


def make_tokenizer(config: RegionTokensConfig, lines: Callable[[], list[str]], folder: Path) -> None:
    """Write the language model's tokenizer into a folder; for `lm: tiny` one that is trained on the lines."""
    if config.lm == "tiny":
        train_sentencepiece(lines(), folder, config.vocab_size)
    else:
        LMTokenizer.load(config.lm, config.prompt_style).save(folder)


def load_tokenizer(config: RegionTokensConfig, folder: Path) -> LMTokenizer:
    """Read the tokenizer that `make_tokenizer` or a model folder wrote."""
    return LMTokenizer.load(folder, config.prompt_style)
