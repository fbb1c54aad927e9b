"""Train a causal language model on text alone: stands in for pre-trained weights before the joint training freezes it.

Batches are runs of the lines sorted by length, so little of a batch is padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grex_mllm.errors import fault
from grex_mllm.models.lm_tokenizer import LMTokenizer
from grex_mllm.precision import autocast

LOSS_MEMORY = 0.98  # of the running mean that is reported
WARM_UP = 0.05


def train_language_model(
    lm: Any,
    tokenizer: LMTokenizer,
    lines: Sequence[str],
    *,
    steps: int,
    batch: int = 64,
    lr: float = 2e-3,
    weight_decay: float = 0.01,
    seed: int = 0,
    precision: str = "fp32",
    progress: Callable[[float, float], None] | None = None,
) -> float:
    """Train the parameters of `lm` that want gradients on lines, with AdamW, warm-up and cosine; return the running loss, nats per token.

    progress: called after each step with the share done, in [0, 1], and the running loss.

    Raises:
        GrexError: no text, or a loss that is not finite.
    """
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise fault("language-model training without text", "at least one line", "give a corpus")
    rows = _sorted_rows(tokenizer, texts)
    parameters = [p for p in lm.parameters() if p.requires_grad]
    matrices, others = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    draw = torch.Generator().manual_seed(seed)
    device = parameters[0].device
    loss_mean, was_training = math.nan, lm.training
    lm.train()
    for step in range(steps):
        done = step / steps
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
        memory = min(LOSS_MEMORY, 1 - 1 / (step + 1))
        loss_mean = loss.item() if step == 0 else memory * loss_mean + (1 - memory) * loss.item()
        if progress is not None:
            progress((step + 1) / steps, loss_mean)
    lm.train(was_training)
    return loss_mean


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
