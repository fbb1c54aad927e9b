"""Train a causal language model on text alone: stands in for pre-trained weights before the joint training freezes it.

Batches are runs of the lines sorted by length, so little of a batch is padding. With `steps` the result depends on the seed only; with
`seconds` the budget includes everything and the learning rate follows the clock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grex_mllm.errors import fault
from grex_mllm.models.lm_tokenizer import LMTokenizer
from grex_mllm.precision import autocast

LOSS_MEMORY = 0.98  # of the running mean that is reported
WARM_UP = 0.05


@dataclass
class LanguageModelTraining:
    """What a text training did. loss: running mean, nats per token, at the end."""

    steps: int
    tokens: int
    seconds: float
    loss: float
    tokens_per_s: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


def train_language_model(
    lm: Any,
    tokenizer: LMTokenizer,
    lines: Sequence[str],
    steps: int | None = None,
    seconds: float | None = None,
    batch: int = 64,
    lr: float = 2e-3,
    weight_decay: float = 0.01,
    seed: int = 0,
    precision: str = "fp32",
    progress: Callable[[float, float], None] | None = None,
) -> LanguageModelTraining:
    """Train the parameters of `lm` that want gradients on lines, for `steps` or `seconds` (give one), with AdamW, warm-up and cosine.

    progress: called after each step with the share done, in [0, 1], and the running loss.

    Raises:
        GrexError: no text, neither or both limits, or a loss that is not finite.
    """
    if (steps is None) == (seconds is None):
        raise fault(f"language-model training with steps={steps} and seconds={seconds}", "one of the two", "give one limit")
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise fault("language-model training without text", "at least one line", "give a corpus")
    start = time.monotonic()
    rows = _sorted_rows(tokenizer, texts)
    parameters = [p for p in lm.parameters() if p.requires_grad]
    matrices, others = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    draw = torch.Generator().manual_seed(seed)
    device = parameters[0].device
    step, tokens, loss_mean, done, was_training = 0, 0, math.nan, 0.0, lm.training
    lm.train()
    while done < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (done + 1e-3) / WARM_UP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        ids, mask = _draw_batch(rows, batch, tokenizer.pad_id, draw)
        loss = _text_loss(lm, ids.to(device), mask.to(device), precision)
        if not bool(torch.isfinite(loss)):
            raise fault(f"language-model loss {loss.item()} at step {step}", "a finite number", "lower the learning rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step, tokens = step + 1, tokens + int(mask.sum()) - len(mask)
        memory = min(LOSS_MEMORY, 1 - 1 / step)
        loss_mean = loss.item() if step == 1 else memory * loss_mean + (1 - memory) * loss.item()
        done = step / steps if steps is not None else (time.monotonic() - start) / max(seconds or 0.0, 1e-9)
        if progress is not None:
            progress(min(done, 1.0), loss_mean)
    lm.train(was_training)
    spent = time.monotonic() - start
    return LanguageModelTraining(step, tokens, spent, loss_mean, tokens / max(spent, 1e-9))


@torch.no_grad()
def text_loss(lm: Any, tokenizer: LMTokenizer, lines: Sequence[str], batch: int = 256) -> float:
    """Return the mean negative log-likelihood of a token (with EOS) of lines, in nats."""
    rows = _sorted_rows(tokenizer, list(lines))
    device = next(lm.parameters()).device
    was_training, total, count = lm.training, 0.0, 0
    lm.eval()
    for start in range(0, len(rows), batch):
        ids, mask = _pad(rows[start : start + batch], tokenizer.pad_id)
        tokens = int(mask[:, 1:].sum())
        total += float(_text_loss(lm, ids.to(device), mask.to(device), "fp32")) * tokens
        count += tokens
    lm.train(was_training)
    return total / max(count, 1)


def _sorted_rows(tokenizer: LMTokenizer, texts: list[str]) -> list[list[int]]:
    known = {text: [tokenizer.bos_id, *tokenizer.text_ids(text), tokenizer.eos_id] for text in dict.fromkeys(texts)}
    return sorted((known[text] for text in texts), key=len)


def _draw_batch(rows: list[list[int]], batch: int, pad_id: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Take a run of neighbours in length, starting anywhere so that every row is equally likely (the run is cut at both ends)."""
    start = int(torch.randint(1 - batch, len(rows), (1,), generator=draw)) if len(rows) > batch else 0
    return _pad(rows[max(0, start) : start + batch], pad_id)


def _pad(rows: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    length = max(len(row) for row in rows)
    ids = torch.tensor([row + [pad_id] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return ids, mask


def _text_loss(lm: Any, ids: Tensor, mask: Tensor, precision: str) -> Tensor:
    """Mean over the real tokens after the first. Padding is on the right and causal attention never sees it, so no mask is needed."""
    with autocast(precision, ids.device.type):
        logits = lm(input_ids=ids, use_cache=False).logits[:, :-1]
    real = mask[:, 1:].bool()
    return F.cross_entropy(logits[real].float(), ids[:, 1:][real])
