"""Train the tiny language model on scenes that are told, not seen: objects as words and places in, an expression for a set of them out.

It stands in for what a pre-trained language model brings along: reading a list of things with their properties, and telling some of them
from the others. No image takes part. The objects' tokens are made as from an image (`RegionTokens`), with the words of their attributes in
place of what is recognised.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from grex_mllm.config import OptimConfig
from grex_mllm.data.collate import collate
from grex_mllm.data.dataset import SampleSource
from grex_mllm.errors import fault
from grex_mllm.models.generator import Generator
from grex_mllm.training.optim import build_optimizer, build_schedule, clip_gradients, optimized_parameters
from grex_mllm.types import Batch

LOSS_MEMORY = 0.98  # of the running mean that is reported


def train_on_told_scenes(
    generator: Generator,
    source: SampleSource,
    steps: int,
    batch_images: int,
    optim: OptimConfig,
    *,
    image_size: int,
    max_tokens: int = 64,
    bf16: bool = False,
    progress: Callable[[float, float], None] | None = None,
) -> float:
    """Train the base LM and the region tokens, adapters off, for `steps` batches of images; return the running loss, nats per token.

    source: samples whose instances carry the attributes of `model.generator.attribute_classes`, all expressions with targets; position i of
    step s is s * batch_images + i.  progress: called after each step with the share done, in [0, 1], and the running loss.

    Raises:
        GrexError: instances without these attributes, a language model that is not tiny, a loss that is not finite.
    """
    encode = partial(generator.tokenizer.encode, max_tokens=max_tokens)
    running, was_training = float("nan"), generator.training
    generator.train()
    with generator.base_training():
        optimizer = build_optimizer(generator, optim)
        schedule = build_schedule(optimizer, optim, steps)
        for step in range(steps):
            samples = [source[step * batch_images + i] for i in range(batch_images)]
            batch = collate(samples, encode, encode, image_size=image_size, task="generate")
            loss = _loss(generator, batch, bf16)
            value = float(loss.detach())
            if not torch.isfinite(loss):
                raise fault(f"loss {value} at step {step} of the training on told scenes", "a finite number", "lower train.text.lr")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            clip_gradients(optimized_parameters(optimizer), 1.0)
            optimizer.step()
            schedule.step()
            running = value if step == 0 else LOSS_MEMORY * running + (1 - LOSS_MEMORY) * value
            if progress is not None:
                progress((step + 1) / steps, running)
    generator.train(was_training)
    return running


def _loss(generator: Generator, batch: Batch, bf16: bool) -> torch.Tensor:
    assert batch.lm_ids is not None and batch.lm_mask is not None
    device = next(generator.parameters()).device
    attributes = {name: [v.to(device) for v in values] for name, values in (batch.instance_attributes or {}).items()}
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        masks = [mask.to(device) for mask in batch.instance_masks]
        ids, mask = batch.lm_ids.to(device), batch.lm_mask.to(device)
        return generator.told(masks, attributes, batch.image_index.to(device), batch.target_index, ids, mask).loss
