"""Entry "tiny_lm" of `PRETRAINING`: what a tiny language model learns before the joint training, without images.

It stands in for what a pre-trained language model brings along: first lines of text, then attribute pre-training, which is reading a list
of things with their attributes and places, and telling some of them from the others. Objects enter as they later do from an image, with
their true attributes, or without attributes the words of the expressions that mean them, in place of those that are recognised. The joint
training then freezes the language model's base.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grex_mllm.config import Config as WholeConfig
from grex_mllm.data.sources import training_text
from grex_mllm.errors import fault
from grex_mllm.models.generators.region_tokens.tokens import ObjectTokens, RegionTokens, geometry_code, left_to_right
from grex_mllm.models.generators.region_tokens.words import called_by, embeddings
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.word_bags import places_of
from grex_mllm.precision import autocast, resolve_precision
from grex_mllm.training.batches import BatchSource, seed_all, stream
from grex_mllm.training.lm import train_language_model
from grex_mllm.training.optim import build_optimizer, build_schedule, clip_gradients, optimized_parameters
from grex_mllm.training.stages import Progress, Stage
from grex_mllm.types import Batch

LOSS_MEMORY = 0.98  # of the running mean that is reported
TEXT_LINES = 20_000
PRETRAINING_STREAM = 6  # keeps the uses of one seed apart, as in training/batches.py


@dataclass
class Config:
    """Steps and learning rate. The attribute pre-training needs model.generator.attribute_classes, and data with attributes, or
    model.generator.words."""

    name: str = "tiny_lm"
    steps: int = 0  # batches of lines of text; 0 = none
    batch: int = 64  # lines
    lr: float = 2e-3
    scenes: int = 0  # batches of train.batch_images images of the attribute pre-training; 0 = none
    num_generation_targets: int = 8  # expressions of such an image that the generator learns from


def stages(config: WholeConfig, make_batches: Callable[[int, int], BatchSource]) -> list[Stage]:
    """Return the stages that the configuration asks for.

    make_batches: (expressions of an image, number of batches) -> batches of other images than the joint training sees, where data is drawn.

    Raises:
        GrexError: a generator without a tiny language model, or one that knows neither attributes nor words of objects.
    """
    own: Config = config.train.pretraining
    generator = config.model.generator
    lm = getattr(generator, "lm", None)
    if lm != "tiny":
        raise fault(
            f"train.pretraining {own.name} with model.generator.lm {lm}",
            "model.generator.lm: tiny there; other language models come trained",
            "leave train.pretraining out",
        )
    if own.scenes and not generator.attribute_classes and not generator.words:
        raise fault(
            f"train.pretraining.scenes is {own.scenes} without model.generator.attribute_classes or words",
            "a generator that knows attributes or words of objects",
            "set model.generator.attribute_classes or words, or train.pretraining.scenes to 0",
        )
    if own.scenes and generator.ranks:
        raise fault(
            "train.pretraining.scenes with model.generator.ranks",
            "objects without ranks there, which come from what is seen",
            "set train.pretraining.scenes to 0, or model.generator.ranks to false",
        )
    found = []
    if own.steps:
        lines = cache(partial(training_text, config.data, TEXT_LINES, generation=True))  # the forecast asks for them, and then the training
        found.append(Stage("language model on text", own.steps, partial(_learn_text, config, lines)))
    if own.scenes:
        batches = make_batches(own.num_generation_targets, own.scenes)
        name = "attribute pre-training" if generator.attribute_classes else "word pre-training"
        found.append(Stage(name, own.scenes, partial(pretrain_on_attributes, config, batches)))
    return found


def _learn_text(config: WholeConfig, lines: Callable[[], list[str]], model: GrexModel, steps: int, progress: Progress) -> None:
    own: Config = config.train.pretraining
    precision = resolve_precision(config.train.precision, model.device).precision
    with model.generator.text_only() as lm:
        train_language_model(
            lm,
            model.generator.tokenizer,
            lines(),
            steps=steps,
            batch=own.batch,
            lr=own.lr,
            seed=config.train.seed,
            precision=precision,
            progress=progress,
        )


def pretrain_on_attributes(
    config: WholeConfig, source: BatchSource, model: GrexModel, steps: int, progress: Progress | None = None
) -> float:
    """Train the base of the language model, adapters off, and the region tokens on `steps` batches; return the running mean of the loss,
    nats per token.

    AdamW's learning rate is `train.pretraining.lr`, everything else is as in `train.optim` but for `lr_scale`.  source: batches with
    attributes of the instances.  progress: called after each step with the share done, in [0, 1], and the running loss.

    Raises:
        GrexError: instances without attributes, a loss that is not finite.
    """
    optim = replace(config.train.optim, lr=config.train.pretraining.lr, lr_scale={}, schedule="cosine", weight_decay=0.0)
    precision = resolve_precision(config.train.precision, model.device).precision
    running, was_training = float("nan"), model.training
    model.train()
    with model.generator.base_training():
        optimizer = build_optimizer(model.generator, optim, precision)
        schedule = build_schedule(optimizer, optim, steps)
        for step, batch in enumerate(stream(source, 0, steps, config.data.num_workers, seed=config.train.seed)):
            seed_all(config.train.seed, PRETRAINING_STREAM, step)  # the same dropout whichever process draws the batches
            loss = _loss(model, batch, precision)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise fault(f"loss {value} at step {step} of the attribute pre-training", "a finite number", "lower train.pretraining.lr")
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
    part, generator = batch.generation, model.generator
    with autocast(precision, model.device.type):
        if generator.region_tokens.classes:
            objects = attribute_tokens(generator.region_tokens, batch.instance_masks, batch.instance_attributes or {})
        else:
            objects = word_tokens(generator, batch)
        counts = [len(m) for m in batch.instance_masks]
        prefix = generator.arrange(objects, counts, part.image_index, part.target_index, part.weight)
        return generator.score_text(prefix, part.lm_ids, part.lm_mask, part.weight).loss


def word_tokens(generator: Any, batch: Batch) -> ObjectTokens:
    """Make the tokens of objects of which places are known, and the words of the expressions that mean them, as `called_by` weighs them.

    An expression's words are shared by its targets.
    """
    tokens, masks, listed = generator.region_tokens, [m.bool() for m in batch.instance_masks], generator.words.ids.cpu()
    ids, mask = generator.tokenizer.encode(batch.expressions)
    objects = placed_tokens(tokens, masks)
    counts = torch.zeros(len(masks), objects.tokens.shape[1], len(listed))
    for image, targets, row, real in zip(batch.image_index.tolist(), batch.target_index, ids[:, 1:], mask[:, 1:], strict=True):
        places, known = places_of(row, listed)
        said = places[(real > 0) & (row != generator.tokenizer.eos_id) & known]
        for target in targets.tolist():
            counts[image, target].index_add_(0, said, torch.full((len(said),), 1.0 / len(targets)))
    objects.words = called_by(counts).to(objects.tokens.device) @ embeddings(generator.lm, listed)
    return objects


def attribute_tokens(tokens: RegionTokens, instance_masks: list[Tensor], attributes: dict[str, list[Tensor]]) -> ObjectTokens:
    """Make the tokens of objects whose attributes are given: places and attributes instead of feature maps, no image tokens.

    instance_masks: B x bool [N_b, H, W] of one size.  attributes: name -> B x int64 [N_b], a negative value is unknown.

    Raises:
        GrexError: attributes other than those that the model knows.
    """
    if set(tokens.classes) - attributes.keys():
        raise fault(
            f"objects with attributes {sorted(attributes) or '(none)'}",
            f"the attributes {sorted(tokens.classes) or '(none)'} of model.generator.attribute_classes",
            "set attribute_classes to what the data has, or train.pretraining.scenes to 0",
        )
    masks = [m.bool() for m in instance_masks]
    known = []
    for name, classes in tokens.classes.items():
        value = torch.nn.utils.rnn.pad_sequence(attributes[name], batch_first=True, padding_value=-1).to(tokens.kind.weight.device)
        known.append(F.one_hot(value.clamp(min=0), classes) * (value >= 0)[..., None])
    return placed_tokens(tokens, masks, torch.cat(known, -1).to(tokens.kind.weight.dtype))


def placed_tokens(tokens: RegionTokens, masks: list[Tensor], probs: Tensor | None = None) -> ObjectTokens:
    """Make the tokens of objects of which places are known, and perhaps attributes, but nothing that is seen.

    masks: B x bool [N_b, H, W] of one size.  probs: float [B, N, sum of classes].
    """
    weight = tokens.kind.weight.dtype
    dtype = torch.promote_types(weight, torch.float32)
    boxes, area, present, _ = tokens.describe_masks(masks, max(1, max(len(m) for m in masks)), dtype)
    height, width = masks[0].shape[1:]
    area_norm = area / (height * width)
    geometry = geometry_code(boxes / boxes.new_tensor([width, height, width, height]), area_norm)
    token = tokens.position(geometry.to(weight))
    token = token if probs is None else token + tokens.attribute_embedding(probs)
    image = token.new_zeros(len(masks), 0, token.shape[-1])
    return ObjectTokens(tokens.norm(token), present, left_to_right(boxes, area, present), area_norm, image, {}, probs)
