"""Attribute pre-training of the tiny language model: attributes and places of objects in, an expression for some of them out; no pixels.

It stands in for what a pre-trained language model brings along: reading a list of things with their properties, and telling some of them
from the others. No image takes part. Objects enter as they later do from an image, with their true attributes in place of those that
are recognised.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from grex_mllm.config import Config
from grex_mllm.errors import fault
from grex_mllm.models.grex import GrexModel
from grex_mllm.precision import autocast, resolve_precision
from grex_mllm.training.batches import BatchSource, stream
from grex_mllm.training.optim import build_optimizer, build_schedule, clip_gradients, optimized_parameters
from grex_mllm.types import Batch

LOSS_MEMORY = 0.98  # of the running mean that is reported


def pretrain_on_attributes(
    model: GrexModel, source: BatchSource, config: Config, progress: Callable[[float, float], None] | None = None
) -> float:
    """Train the base of the language model, adapters off, and the region tokens on `train.text.scenes` batches; return the running mean of
    the loss, nats per token.

    AdamW's learning rate is `train.text.lr`, everything else is as in `train.optim` but for `lr_scale`.  source: batches with attributes of
    the instances.  progress: called after each step with the share done, in [0, 1], and the running loss.

    Raises:
        GrexError: a generator that knows no attributes or whose language model is not tiny, instances without attributes, a loss that is
            not finite.
    """
    if model.generator is None or not model.generator.region_tokens.classes or config.model.generator.lm != "tiny":
        raise fault(
            "train.text.scenes without a generator that knows attributes",
            "model.generator with lm: tiny and attribute_classes",
            "set them, or train.text.scenes to 0",
        )
    optim = replace(config.train.optim, lr=config.train.text.lr, lr_scale={}, schedule="cosine", weight_decay=0.0)
    steps, precision = config.train.text.scenes, resolve_precision(config.train.precision, model.device).precision
    running, was_training = float("nan"), model.training
    model.train()
    with model.generator.base_training():
        optimizer = build_optimizer(model.generator, optim, precision)
        schedule = build_schedule(optimizer, optim, steps)
        for step, (_, batch) in enumerate(stream(source, 0, steps, config.data.num_workers, config.train.seed)):
            loss = _loss(model, batch, precision)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise fault(f"loss {value} at step {step} of the attribute pre-training", "a finite number", "lower train.text.lr")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            clip_gradients(optimized_parameters(optimizer), optim.clip)
            optimizer.step()
            schedule.step()
            running = value if step == 0 else LOSS_MEMORY * running + (1 - LOSS_MEMORY) * value
            if progress is not None:
                progress((step + 1) / steps, running)
        optimizer.zero_grad(set_to_none=True)
    model.train(was_training)
    return running


def _loss(model: GrexModel, batch: Batch, precision: str) -> Tensor:
    if batch.lm_ids is None or batch.lm_mask is None or batch.lm_index is None:
        raise fault(
            "attribute pre-training without any expression that has a target", "at least one in a batch", "raise train.batch_images"
        )
    index, targets = batch.image_index[batch.lm_index], [batch.target_index[e] for e in batch.lm_index.tolist()]
    with autocast(precision, model.device.type):
        attributes = batch.instance_attributes or {}
        return model.generator.forward_attributes(batch.instance_masks, attributes, index, targets, batch.lm_ids, batch.lm_mask).loss
