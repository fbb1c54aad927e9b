"""Validation inside a training: free answers about a fixed subset of images, scored as `grex score` does (strict), and the losses there.

Every process takes every n-th image and the sums of the metrics are exchanged, so that one process and many give the same digits.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from grex_mllm.config import PROTOCOL_FOLDER, Config
from grex_mllm.data.dataset import FolderDataset
from grex_mllm.data.sources import options_of, source_of, weighted
from grex_mllm.errors import fault
from grex_mllm.metrics import entry, needs_of
from grex_mllm.metrics.language import round_trip
from grex_mllm.metrics.sums import Means, empty_sums, stacked
from grex_mllm.metrics.truth import Truth
from grex_mllm.precision import autocast
from grex_mllm.predictors.grex import describe_sets
from grex_mllm.predictors.lines import grounding_fields
from grex_mllm.predictors.protocol import Item, object_sets
from grex_mllm.score import load_protocol
from grex_mllm.training.batches import BatchSource, map_tensors, seed_all
from grex_mllm.training.engine import gathered, is_main_process, wait_for
from grex_mllm.training.lockstep import in_lockstep
from grex_mllm.training.step import GENERATE, tasks_of
from grex_mllm.types import ExpressionRecord, ImageRecord, Sample

FOLDER = "validation"  # of drawn scenes, in train.out
ALL_EXPRESSIONS = 10**9
GENERATED = {"round_trip_Pr@F1": "correct", "round_trip_gIoU": "iou"}  # column of "generate" -> what metrics.language.round_trip gives
VALIDATION_STREAM = 5  # keeps the uses of one seed apart, as in training/batches.py


class Subset:
    """The images that are looked at: the same in every run and process, spread evenly over the split of every part of `data.train`.

    Raises:
        GrexError: numbers that make no validation; no such split.
    """

    def __init__(self, config: Config) -> None:
        parts, wanted = weighted(config.data), config.train.validation
        if wanted.images < 1 or wanted.every < 1 or wanted.patience < 0:
            given = f"train.validation.every {wanted.every}, images {wanted.images}, patience {wanted.patience}"
            raise fault(given, "steps and images from 1, patience from 0", "fix them")
        self.places: list[tuple[FolderDataset, int]] = []
        for number, part in enumerate(parts):
            most = (wanted.images + len(parts) - 1 - number) // len(parts)
            folder, root = part.train, part.image_root or config.data.image_root
            if source_of(part.train) is not None and most:
                folder, root = str(_drawn(config, part.train, most)), None
            data = FolderDataset(folder, wanted.split, ALL_EXPRESSIONS, image_root=root)
            most = min(most, len(data))
            self.places += [(data, k * len(data) // most) for k in range(most)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, position: int) -> Sample:
        data, place = self.places[position]
        return data[place]

    def known(self) -> list[tuple[ImageRecord, list[ExpressionRecord]]]:
        """Return record and expressions of every image, without reading the images."""
        return [(data.dataset.images[data.groups[place][0].image_id], data.groups[place]) for data, place in self.places]


class Repeated:
    """The images of a subset as a training source without end, with as many expressions of each as a training has."""

    def __init__(self, subset: Subset, expressions_per_image: int) -> None:
        self.subset, self.most = subset, expressions_per_image

    def __len__(self) -> int:
        return len(self.subset)

    def __getitem__(self, position: int) -> Sample:
        sample = self.subset[position % len(self.subset)]
        return replace(sample, expressions=sample.expressions[: self.most])


def _drawn(config: Config, name: str, num_images: int) -> Path:
    """Write scenes of the split as a dataset folder (the main process; the others wait for them), or find them there."""
    split, module = config.train.validation.split, source_of(name)
    folder = Path(config.train.out) / FOLDER / f"{name}_{split}_{num_images}"
    if not is_main_process():
        wait_for(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    assert module is not None
    module.export_for_prediction(options_of(config.data, name), split, num_images, folder)
    return folder


class Validation:
    """What `train.validation` asks for.

    subset: the images.  batches: the same ones (`Repeated`) as training batches, for the losses.

    Raises:
        GrexError: a metric that does not exist or has no value on the subset.
    """

    def __init__(self, config: Config, subset: Subset, batches: BatchSource) -> None:
        self.config, self.subset, self.batches = config, subset, batches
        self.rules = load_protocol(PROTOCOL_FOLDER / "all.yaml").tasks
        masks = config.predict.masks
        expressions = [task for task in self.rules if not hasattr(entry(task), "UNIT")]
        needs = {task: needs_of(entry(task), self.rules[task])["strict"] for task in expressions}
        self.tasks = [task for task in expressions if masks or "mask_rle" not in needs[task]]
        self.generates = GENERATE in tasks_of(config)
        self.higher_is_better = self._direction(config.train.validation.metric)

    def __call__(self, step: Any, accelerator: Any, mark: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Return "task/column" -> value (percent as shares in [0, 1]), and "loss/..." -> mean over the batches; the same on all processes.

        step: the module `Step` with whole weights, in evaluation mode.  mark: called after every image.  All processes call it.
        """
        model, rank, num_ranks = step.model, accelerator.process_index, accelerator.num_processes
        batches = self.batches.share(rank, num_ranks) if num_ranks > 1 else self.batches
        tally = _Tally(self.rules, self.tasks, self.generates)
        losses: dict[str, float] = {}
        num_batches = -(-len(self.subset) // self.config.train.batch_images)
        with torch.no_grad(), in_lockstep(accelerator, step):
            for index in range(num_batches):
                seed_all(self.config.train.seed, VALIDATION_STREAM, index, rank)
                batch = map_tensors(batches.at(index), lambda tensor: tensor.to(accelerator.device))
                for name, value in step(batch, 1.0).items():
                    losses[name] = losses.get(name, 0.0) + float(value) / num_batches
                mark()
            for position in range(rank, len(self.subset), num_ranks):
                with autocast(step.precision, model.device.type):
                    self._ask(model, self.subset[position], tally)
                mark()
        parts = gathered(accelerator, {"losses": losses, "sums": tally.state()})
        found = _Tally(self.rules, self.tasks, self.generates).joined([part["sums"] for part in parts]).compute()
        return found | {f"loss/{name}": sum(part["losses"][name] for part in parts) / len(parts) for name in losses}

    def _ask(self, model: Any, sample: Sample, tally: _Tally) -> None:
        """Ground every expression of an image and, with a generator, describe every set of objects and ground that again."""
        encoded, rules = model.encode(sample.image), model.config.predict
        results = model.ground(encoded, [record.raw for record in sample.expressions], rules.batch)
        lines = [grounding_fields(result, rules.masks) for result in results]
        for record, line in zip(sample.expressions, lines, strict=True):
            tally.add(line, self._truth(sample.record, record))
        sets = object_sets(sample.expressions) if self.generates else []
        if sets:
            item = Item(sample.record, Path(sample.record.file), lambda: sample.image, sample.expressions, sets)
            for targets, answer in zip(sets, describe_sets(model, item, encoded, sets, 0), strict=True):
                about = Truth(answer.key, list(targets), lambda: sample.record, tasks=self.rules)
                tally.add_text(answer.fields.get("round_trip"), about)

    def _truth(self, image: ImageRecord, record: ExpressionRecord) -> Truth:
        return Truth(record.expression_id, record.targets, lambda: image, [record.expression], record.ref_id, self.rules)

    def _direction(self, metric: str) -> bool:
        """Return whether more is better; raise where the metric cannot be had. Answers that are all missing show what has a value."""
        wanted = self.config.train.validation
        tally = _Tally(self.rules, self.tasks, self.generates)
        for image, expressions in self.subset.known():
            for record in expressions:
                tally.add(None, self._truth(image, record))
            for targets in object_sets(expressions):
                tally.add_text(None, Truth(image.image_id, list(targets), lambda image=image: image, tasks=self.rules))  # type: ignore[misc]
        better = {f"{task}/{column.key}": column.higher_is_better for task in self.tasks for column in entry(task).COLUMNS}
        better |= {f"{GENERATE}/{name}": True for name in GENERATED if self.generates}
        possible = {name: better[name] for name in tally.compute() if name in better}
        possible |= {f"loss/{task}/total": False for task in tasks_of(self.config)} | {"loss/total": False}
        if metric not in possible:
            near = difflib.get_close_matches(metric, possible, n=1)
            given = f'train.validation.metric "{metric}" has no value on {len(self.subset)} images of split "{wanted.split}"'
            raise fault(given, f"one of {', '.join(possible)}", f'did you mean "{near[0]}"?' if near else "choose one of them")
        return possible[metric]


class _Tally:
    """Rows of answers, then exact sums of the metrics, which join over processes."""

    def __init__(self, rules: dict[str, Any], tasks: list[str], generates: bool) -> None:
        self.rules, self.tasks = rules, tasks
        self.rows: dict[str, list[dict[str, Any]]] = {task: [] for task in tasks}
        self.texts: list[dict[str, float]] = []
        self.sums = {task: empty_sums(entry(task), rules[task], "strict") for task in tasks}
        if generates:
            self.sums[GENERATE] = Means(*GENERATED)

    def add(self, line: dict[str, Any] | None, truth: Truth) -> None:
        """Take in the answer to one expression; None = no answer."""
        for task in self.tasks:
            row = entry(task).row(line, truth, self.rules[task], "strict")
            if row is not None:
                self.rows[task].append(row | {"num_targets": truth.num_targets})

    def add_text(self, trip: dict[str, Any] | None, truth: Truth) -> None:
        """Take in the grounding of the text for one set of objects; None = nothing was said."""
        found = round_trip(trip, truth) if trip else {}
        self.texts.append({name: float(found.get(key) or 0.0) for name, key in GENERATED.items()})

    def state(self) -> dict[str, Any]:
        """Return the sums as plain integers."""
        for task, rows in self.rows.items():
            if rows:
                self.sums[task].update_rows(stacked(entry(task), rows))
        if GENERATE in self.sums and self.texts:
            self.sums[GENERATE].update_rows(stacked(Means, self.texts))
        self.rows, self.texts = {task: [] for task in self.tasks}, []
        return {task: sums.state() for task, sums in self.sums.items()}

    def joined(self, states: list[dict[str, Any]]) -> _Tally:
        """Return this tally with the sums of all processes."""
        for state in states:
            for task, sums in self.sums.items():
                part = Means(*GENERATED) if task == GENERATE else empty_sums(entry(task), self.rules[task], "strict")
                sums.merge(part.load_state(state[task]))
        return self

    def compute(self) -> dict[str, float]:
        """Return "task/column" -> value of the columns that have one."""
        self.state()
        found: dict[str, float] = {}
        for task, sums in self.sums.items():
            block = sums.compute()
            keys = list(GENERATED) if task == GENERATE else [column.key for column in entry(task).COLUMNS]
            found |= {f"{task}/{key}": float(block[key]) for key in keys if block.get(key) is not None}
        return found
