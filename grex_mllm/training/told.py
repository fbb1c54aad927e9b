"""Train the language parts on scenes that are told, not seen: objects as words and places, and expressions for some of them.

It stands in for what pre-trained language models bring along: reading a list of things with their properties, and telling some of them
from the others. The generator's tiny language model learns to speak, `rela_instances` to listen; no image takes part. Objects enter as they
later do from an image, with the words of their true attributes in place of what is recognised.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from grex_mllm.config import Config
from grex_mllm.errors import fault
from grex_mllm.models.decoders.image_regions import told_regions
from grex_mllm.models.decoders.rela_instances import RelaInstances
from grex_mllm.models.grex import GrexModel
from grex_mllm.training.instance_losses import selection_terms
from grex_mllm.training.optim import build_optimizer, build_schedule, clip_gradients, optimized_parameters
from grex_mllm.types import Batch

LOSS_MEMORY = 0.98  # of the running mean that is reported


def train_on_told_scenes(
    model: GrexModel, batches: Callable[[int], Batch], config: Config, progress: Callable[[float, float], None] | None = None
) -> dict[str, float]:
    """Train on `train.text.scenes` batches; return the running mean of each loss term.

    The base of the language model learns, its adapters do not; AdamW's learning rate is `train.text.lr`, everything else is as in
    `train.optim`.  batches: batch by number, with attributes of the instances.  progress: called after each step with the share done, in
    [0, 1], and the running loss.

    Raises:
        GrexError: instances without attributes, no part of the model that knows attributes, a loss that is not finite.
    """
    decoder = model.grounding.decoder
    listens = isinstance(decoder, RelaInstances) and bool(decoder.config.attribute_classes)
    speaks = model.generator is not None and bool(model.generator.region_tokens.classes) and config.model.generator.lm == "tiny"
    if not listens and not speaks:
        raise fault(
            "train.text.scenes without a part that knows attributes",
            "attribute_classes in model.decoder (rela_instances) or model.generator (lm: tiny)",
            "set them, or train.text.scenes to 0",
        )
    optim = replace(config.train.optim, lr=config.train.text.lr, schedule="cosine", weight_decay=0.0)
    steps, bf16 = config.train.text.scenes, config.train.precision == "bf16"
    running: dict[str, float] = {}
    was_training = model.training
    model.train()
    with model.generator.base_training() if speaks else nullcontext():
        optimizer = build_optimizer(model, optim)
        schedule = build_schedule(optimizer, optim, steps)
        for step in range(steps):
            terms = _terms(model, batches(step), config, listens, speaks, bf16)
            total = torch.stack(list(terms.values())).sum()
            if not torch.isfinite(total):
                raise fault(f"loss {float(total)} at step {step} of the training on told scenes", "a finite number", "lower train.text.lr")
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            clip_gradients(optimized_parameters(optimizer), optim.clip)
            optimizer.step()
            schedule.step()
            for name, value in terms.items():
                now = float(value.detach())
                running[name] = LOSS_MEMORY * running.get(name, now) + (1 - LOSS_MEMORY) * now
            if progress is not None:
                progress((step + 1) / steps, sum(running.values()))
        optimizer.zero_grad(set_to_none=True)
    model.train(was_training)
    return running


def _terms(model: GrexModel, batch: Batch, config: Config, listens: bool, speaks: bool, bf16: bool) -> dict[str, Tensor]:
    """Return the weighted terms of a batch."""
    attributes = batch.instance_attributes or {}
    terms: dict[str, Tensor] = {}
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bf16):
        if listens:
            decoder = model.grounding.decoder
            assert isinstance(decoder, RelaInstances)
            regions = told_regions(batch.instance_boxes_norm, attributes, decoder.config.attribute_classes, decoder.config.width)
            output = decoder(regions, batch.image_index, model.grounding.encode_text(batch.text_ids, batch.text_mask))
            places = torch.arange(regions.kept.shape[1]).expand_as(regions.kept)
            owner = torch.where(regions.objectness[-1] > 0, places, -1)
            weights = config.loss.instances
            for name, value in selection_terms(output, batch, owner).items():
                terms[name] = value * getattr(weights, name)
        if speaks and batch.lm_index is not None:
            assert batch.lm_ids is not None and batch.lm_mask is not None
            index = batch.image_index[batch.lm_index]
            targets = [batch.target_index[e] for e in batch.lm_index.tolist()]
            spoken = model.generator.told(batch.instance_masks, attributes, index, targets, batch.lm_ids, batch.lm_mask)
            terms["lm"] = spoken.loss * config.loss.lm
    return terms
