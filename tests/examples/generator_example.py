"""A worked example of a generator: it learns how many objects a set has words for, and answers from a template.

Chosen in a configuration by its dotted path, from a folder that Python finds: `model.generator: {name: examples.generator_example}`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from grex_mllm.ops.losses import shared_count
from grex_mllm.types import Batch, GenerationImage, GenerationItem

NUMBERS = ("no object", "one object", "two objects", "three objects")
SIDES = ("on the left", "in the middle", "on the right")


@dataclass
class Config:
    name: str = "generator_example"
    sides: bool = True  # say where the objects are


class Part(NamedTuple):
    """counts: float [G], objects of each set.  lengths: float [G], words of its expression."""

    counts: Tensor
    lengths: Tensor


def make_tokenizer(config: Config, lines: Callable[[], list[str]], folder: Path) -> None:
    """A template needs no tokenizer."""


def load_tokenizer(config: Config, folder: Path) -> None:
    return None


def collate(config: Config, tokenizer: None, images: Sequence[GenerationImage], items: Sequence[GenerationItem]) -> tuple[Part, list[str]]:
    counts = torch.tensor([float(len(item.targets)) for item in items])
    return Part(counts, torch.tensor([float(len(item.expression.split())) for item in items])), []


class Generator(nn.Module):
    """feature_channels and tokenizer are not read."""

    def __init__(self, config: Config, feature_channels: list[int], tokenizer: None) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.length = nn.Linear(1, 1)  # words of an expression from the number of its objects

    def forward(self, features: list[Tensor], batch: Batch, early: bool = False) -> dict[str, Tensor]:
        part: Part = batch.generation
        error = (self.length(part.counts[:, None])[:, 0] - part.lengths).abs().sum() / shared_count(len(part.counts), part.counts)
        return {"length": error, "total": error}

    def generate(
        self, features: list[Tensor], encoded: Any, masks: np.ndarray, sets: list[list[int]], num_candidates: int = 1, **options: Any
    ) -> list[list[str]]:
        return [[self.write(masks[chosen])] * num_candidates for chosen in sets]

    def write(self, masks: np.ndarray) -> str:
        text = f"the {NUMBERS[len(masks)] if len(masks) < len(NUMBERS) else 'many objects'}"
        if not self.config.sides:
            return text
        columns = np.nonzero(masks.any(axis=(0, 1)))[0]
        return f"{text} {SIDES[min(int(3 * columns.mean() / masks.shape[2]), 2)]}"
