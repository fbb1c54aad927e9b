"""What passes between predict and a predictor: images with questions in, answers in any order out.

A predictor has `can` (Abilities), `fingerprint()` and, by what it can do, `ground(items)` and `describe(items)`. Both take an iterable of
`Item`, which may be consumed at any pace (one image at a time, a few ahead for concurrent requests, all of it for a batch file), and yield
one `Answer` for every open question of every item. Where a task is left out of `can.tasks`, its method need not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from grex_mllm.config import Config
from grex_mllm.data.records import IMAGES
from grex_mllm.data.transforms import instance_mask, selectable_instances
from grex_mllm.errors import GrexError
from grex_mllm.types import ExpressionRecord, Geometry, Grounding, ImageRecord, Instance

TASKS = {"ground": "ground", "generate": "describe"}  # task of `grex predict --tasks` -> method of a predictor
STATUSES = ("ok", "unparsable", "refused", "error")

ObjectSet = tuple[str, ...]


@dataclass
class Item:
    """One image with everything that is asked about it. The same object comes to `ground` and `describe`.

    record: the image's record.  file: where the image lies.  load: reads it (see `image`).
    expressions: of the image, in the order of the split.  object_sets: annotation ids, sorted, of every set to describe.
    done: keys that an earlier run answered; the open questions are the others. What they are asked beside may matter to a batch, so that
    done ones are listed, too.
    complete: false where a user pointed at some objects, as masks or boxes alone: the image may hold others that the record does not list.
    """

    record: ImageRecord
    file: Path
    load: Callable[[], np.ndarray]
    expressions: list[ExpressionRecord] = field(default_factory=list)
    object_sets: list[ObjectSet] = field(default_factory=list)
    done: Collection[str] = ()
    complete: bool = True

    @property
    def open_expressions(self) -> list[ExpressionRecord]:
        """Expressions to ground; the key of an answer is the expression_id."""
        return [record for record in self.expressions if record.expression_id not in self.done]

    @property
    def open_sets(self) -> list[ObjectSet]:
        """Object sets to describe; the key of an answer is `set_key(record.image_id, targets)`."""
        return [targets for targets in self.object_sets if set_key(self.record.image_id, targets) not in self.done]

    @cached_property
    def image(self) -> np.ndarray:
        """uint8 [H0, W0, 3], read when it is first asked for.

        Raises:
            GrexError: an unreadable image, or one that does not fit its record.
        """
        return self.load()

    @cached_property
    def instances(self) -> list[Instance]:
        """The N instances that can be in an object set."""
        return selectable_instances(self.record)

    @cached_property
    def masks(self) -> np.ndarray:
        """bool [N, H0, W0]: the masks of `instances`; the filled box where one has none.

        Raises:
            GrexError: a segmentation of another size than the image, or a malformed one; names the image and the annotation.
        """
        record = self.record
        masks = np.zeros((len(self.instances), record.height, record.width), bool)
        whole = Geometry(record.height, record.width, record.height, record.width)
        for n, instance in enumerate(self.instances):
            try:
                masks[n] = instance_mask(instance, whole)
            except GrexError as error:
                place = f"{IMAGES}, image {record.image_id}, annotation {instance.annotation_id}, field segmentation"
                raise GrexError(f"{place}: {error}") from None
        return masks


@dataclass
class Answer:
    """The answer to one open question.

    key: see `Item`.  grounding: of an expression.  masks: false for a predictor that answers with boxes alone; its masks are not scored.
    expression: of an object set.  status: one of STATUSES; all but ok count as wrong.  reason: why the status is not ok.
    fields: further fields of the prediction line (eval/README.md), such as candidates, listener, round_trip.
    """

    key: str
    grounding: Grounding | None = None
    expression: str | None = None
    status: str = "ok"
    reason: str = ""
    masks: bool = True
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass
class Abilities:
    """What a predictor can do, and how it does it.

    tasks: of TASKS.  truth: what it reads of the ground truth beside the object sets that it is to describe: "" | "objects" | "targets";
    the lines of its answers name it.
    how: ends the message "predicted SPLIT ...".  remarks: from all records of the split, lines to print after it.
    ahead: None = images are read when asked for; a number = all of them are read ahead, by so many processes (0 = by this one).
    config: of a predictor that has one; it takes the command line's overrides, and synthetic data is drawn by it.
    takes: first names of the overrides that are the predictor's own (--ask.prompt=..., --server.concurrency=...).
    asks_again: questions that ended in an error are open again when an interrupted run goes on.
    finish: called once, after the last answer or when the run stops.  preview: what it would send, instead of answers (`--dry-run`).
    lacks: task -> why it cannot do it, where that is known.
    """

    tasks: tuple[str, ...] = ("ground",)
    truth: str = ""
    how: str = ""
    ahead: int | None = None
    config: Config | None = None
    remarks: Callable[[list[ExpressionRecord]], list[str]] = lambda _: []
    takes: tuple[str, ...] = ()
    asks_again: bool = False
    finish: Callable[[], None] = lambda: None
    preview: Callable[[Iterable[Item], list[str]], dict[str, Any]] | None = None
    lacks: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Options:
    """What the command line asks of a predictor.

    overrides: of its configuration, as --a.b=c.  listener: number of the listener's candidates, 0 = none.
    precision, threshold (of "no target"): None = as configured.  speech: further options of `GrexModel.describe`, where they are given.
    asked: options of one kind of predictor alone, by their names on the command line (base_url), where they are given.
    data, image_root, out: of `grex predict`: the dataset folder, for examples of its train split, and the file to write; None = nothing is
    written, as in a dry run.
    """

    device: str = "auto"
    overrides: list[str] = field(default_factory=list)
    listener: int = 0
    precision: str | None = None
    threshold: float | None = None
    speech: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, str] = field(default_factory=dict)
    data: str | None = None
    image_root: str | None = None
    out: Path | None = None


class Predictor(Protocol):
    """See the head of this file."""

    can: Abilities

    def fingerprint(self) -> str:
        """Name everything that decides the answers, so that an interrupted run goes on with the same predictor only."""

    def ground(self, items: Iterable[Item]) -> Iterator[Answer]:
        """Answer every open expression of every item."""

    def describe(self, items: Iterable[Item]) -> Iterator[Answer]:
        """Write an expression for every open object set of every item."""


def set_key(image_id: str, targets: Collection[str]) -> str:
    """Return the key of an object set."""
    return f"set:{image_id}:{','.join(targets)}"


def costs_file(predictions: Path) -> Path:
    """Return where a model that is asked in words leaves what its answers took: runs/x.jsonl -> runs/x.costs.jsonl."""
    return predictions.with_name(f"{predictions.stem}.costs.jsonl")


def object_sets(expressions: Iterable[ExpressionRecord]) -> list[ObjectSet]:
    """Return the distinct object sets that the expressions of an image refer to, in order; annotation ids sorted."""
    return list(dict.fromkeys(tuple(sorted(e.targets)) for e in expressions if e.targets))
