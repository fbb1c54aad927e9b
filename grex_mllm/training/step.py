"""One training step as one module: the model, the losses of its decoder and of its generator.

Every step runs the same graph on every process: a part without expressions enters with weight zero, and what no loss reads is added with
weight zero. So no parameter is ever without a gradient, and DDP, every ZeRO stage and `torch.compile` see one graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from grex_mllm.config import Config
from grex_mllm.entries import entry
from grex_mllm.errors import fault
from grex_mllm.models.distillation import distillation
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.round_trip import round_trip
from grex_mllm.precision import autocast
from grex_mllm.training.kept_maps import KeptMaps
from grex_mllm.training.teacher import teacher_of
from grex_mllm.types import Batch

TASKS = ("all", "ground", "generate", "align", "words")
GROUND, GENERATE, ALIGN, WORDS = "ground", "generate", "align", "words"


class Step(nn.Module):
    """Model and losses, so that the forward pass goes through the wrapper of DDP or DeepSpeed.

    precision: autocasts the forward pass; the weights that train stay float32, also under ZeRO.
    """

    def __init__(self, model: GrexModel, config: Config, precision: str = "fp32") -> None:
        super().__init__()
        self.model, self.precision, self.loss = model, precision, config.loss
        self.tasks = tasks_of(config)
        self.kept_maps = KeptMaps(config.data.feature_cache) if config.data.feature_cache else None
        self.teacher = teacher_of(config)
        self.criterion = entry("model.decoder", config.model.decoder.name).Criterion(config.model.decoder)
        freeze_unused(model, self.tasks)
        self.words_alone = config.train.tasks == WORDS
        if config.train.tasks in (ALIGN, WORDS):
            freeze_but_projector(model)
        freeze_named(model, config.train.optim.frozen)

    def forward(self, batch: Batch, progress: float = 1.0) -> dict[str, Tensor]:
        """Return the named loss terms, float32 scalars: "ground/<term>", "generate/<term>", "contrast", "distill"
        and "round_trip" where they are learned, and "total", which is minimised.

        progress: share of the training that is done, from 0 to 1; see `loss.generate_start`.
        """
        with autocast(self.precision, batch.image.device.type):
            terms = {name: value.float() for name, value in self._terms(batch, progress).items()}
        parts = [terms[f"{task}/total"] * getattr(self.loss, task) for task in self.tasks]
        parts += [terms[name] * getattr(self.loss, name) for name in ("contrast", "distill", "round_trip") if name in terms]
        return terms | {"total": torch.stack(parts).sum()}

    def _terms(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        grounding, terms = self.model.grounding, dict[str, Tensor]()
        if self.kept_maps is not None:
            features = self.kept_maps.features(grounding, batch)
        else:
            features = grounding.normalised(batch.image, batch.input_sizes)
        if GROUND in self.tasks:
            features = grounding.encode_normalised(features)
            text = grounding.encode_text(batch.text_ids, batch.text_mask)
            output = grounding.ground_text(features, batch.image_index, text)
            found = self.criterion(output, batch)
            found["total"] = found["total"] + nothing_of(output)
            terms |= {f"{GROUND}/{name}": value for name, value in found.items()}
            if self.teacher is not None:
                answer = self.teacher(batch, features.padded_size)
                terms["distill"] = distillation(output, answer, self.loss.distill_temperature)
        if GENERATE in self.tasks:
            given: dict[str, Any] = {"early": self.words_alone or progress < self.loss.generate_start}
            if getattr(self.model.generator, "reads_proposals", False):
                given["proposals"] = grounding.proposals(features)
            found = self.model.generator(grounding.language_free(features), batch, **given)
            terms |= {f"{GENERATE}/{name}": value for name, value in found.items()}
        if self.model.contrast is not None:
            sets = self.model.generator.set_features(grounding.language_free(features), batch)
            terms["contrast"] = self.model.contrast(sets, text.tokens[:, 0], batch.image_index, batch.target_index)
        if self.training and self.loss.round_trip > 0 and progress >= max(self.loss.round_trip_start, self.loss.generate_start):
            terms["round_trip"] = round_trip(self.model, grounding.language_free(features), batch)
        return terms


def tasks_of(config: Config) -> tuple[str, ...]:
    """Return what a training learns, of "ground" and "generate"; to align is to generate with everything but the projector frozen, and
    words are the part of it that the language model has no part in.

    Raises:
        GrexError: an unknown `train.tasks`, generation without a generator, words without any, or a contrast where not both are learned.
    """
    tasks = config.train.tasks
    if tasks not in TASKS:
        raise fault(f'train.tasks is "{tasks}"', f"one of {', '.join(TASKS)}", "choose one of them")
    if tasks in (GENERATE, ALIGN, WORDS) and config.model.generator is None:
        raise fault(f"train.tasks is {tasks}, but model.generator is null", "a generator", "set model.generator (for example lm: tiny)")
    if tasks == WORDS and not getattr(config.model.generator, "words", 0):
        raise fault("train.tasks is words with a generator that learns none", "words of objects", "set model.generator.words")
    if config.loss.contrast > 0 and tasks != "all":
        raise fault(f"loss.contrast is {config.loss.contrast:g} with train.tasks {tasks}", "train.tasks: all", "learn both, or set it to 0")
    if tasks == "all":
        return (GROUND, GENERATE) if config.model.generator is not None else (GROUND,)
    return (GENERATE,) if tasks in (ALIGN, WORDS) else (tasks,)


def freeze_unused(model: GrexModel, tasks: tuple[str, ...]) -> None:
    """Take the gradient from the weights that no step reaches when only one task is learned."""
    if GENERATE not in tasks and model.generator is not None:
        model.generator.requires_grad_(False)
    if GROUND not in tasks:
        model.grounding.text.requires_grad_(False)
        model.grounding.decoder.requires_grad_(False)
        for name, parameter in model.grounding.vision.named_parameters():
            if {"fusion", "gate"} & set(name.split(".")):  # only expressions reach them
                parameter.requires_grad_(False)


def freeze_but_projector(model: GrexModel) -> None:
    """Let only the generator's projector learn, which brings objects into the language model's space.

    Raises:
        GrexError: a generator that has none.
    """
    projector = getattr(model.generator, "projector", None)
    if projector is None:
        raise fault(
            f"train.tasks is {model.config.train.tasks} with model.generator.name {model.config.model.generator.name}",
            "a generator with a `projector`",
            "set train.tasks to generate",
        )
    model.requires_grad_(False)
    projector.requires_grad_(True)


def freeze_named(model: GrexModel, starts: list[str]) -> None:
    """Take the gradient from every parameter whose name begins with one of `starts` (`train.optim.frozen`).

    Raises:
        GrexError: a start that no parameter has.
    """
    for start in starts:
        found = [parameter for name, parameter in model.named_parameters() if name.startswith(start)]
        if not found:
            raise fault(
                f"train.optim.frozen names {start}", "the start of a parameter's name", "take one of grounding.vision, grounding.text ..."
            )
        for parameter in found:
            parameter.requires_grad_(False)


def nothing_of(tree: Any) -> Tensor:
    """Return zero with a gradient path to every float tensor of nested tuples, lists and dictionaries that has one."""
    return sum((tensor.float().sum() * 0.0 for tensor in _tensors(tree) if tensor.requires_grad), start=torch.zeros(()))


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple | dict):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(value)
