"""Samples to one `Batch` of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grex_mllm.data.transforms import Prepared, prepare
from grex_mllm.errors import GrexError, fault
from grex_mllm.types import Batch, ExpressionRecord, GenerationImage, GenerationItem, Instance, Sample

Encode = Callable[[list[str]], tuple[Tensor, Tensor]]  # E texts -> ids int64 [E, L], mask int64 [E, L] (1 = real token)
# images and expressions -> a generator's part of a batch, and the ids of expressions that it leaves out
CollateGeneration = Callable[[Sequence[GenerationImage], Sequence[GenerationItem]], tuple[Any, list[str]]]
UNKNOWN_ATTRIBUTE = -100  # what cross entropy ignores


def collate(
    samples: Sequence[Sample],
    encode_text: Encode,
    collate_generation: CollateGeneration | None = None,
    *,
    image_size: int,
    resize: str = "squash",
    num_generation_targets: int | None = None,
    targets_only: bool = False,
) -> Batch:
    """Return the batch of B samples with all their E expressions, at S x S = image_size.

    The text encoder gets `raw` (as the released ReLA does), a generator `expression`. collate_generation: the generator's own `collate`;
    it gets the expressions with a target, at most num_generation_targets of an image, maybe none. gt_masks is None where a target has no
    mask (box-only data).  targets_only: leave out the instances that are no target of these expressions, where nothing reads them.

    Raises:
        GrexError: no or an empty expression, or a target that is no selectable instance of its image.
    """
    pairs = [_with_targets_alone(sample) if targets_only else sample for sample in _kept(samples)]
    expressions = [expression for sample in pairs for expression in sample.expressions]
    prepared = [prepare(sample, image_size, resize) for sample in pairs]
    targets = [_target_index(expression, ready) for ready, sample in zip(prepared, pairs, strict=True) for expression in sample.expressions]
    owners = [index for index, sample in enumerate(pairs) for _ in sample.expressions]
    texts = [expression.raw for expression in expressions]
    text_ids, text_mask = encode_text(texts)
    batch = Batch(
        image=torch.from_numpy(np.ascontiguousarray(np.stack([ready.image for ready in prepared]).transpose(0, 3, 1, 2))),
        image_index=torch.tensor(owners, dtype=torch.int64),
        text_ids=text_ids,
        text_mask=text_mask,
        gt_masks=_union_of_targets(prepared, owners, targets, image_size),
        gt_boxes_norm=[torch.from_numpy(prepared[owner].instance_boxes_norm[index]) for owner, index in zip(owners, targets, strict=True)],
        gt_count=torch.tensor([len(index) for index in targets], dtype=torch.int64),
        no_target=torch.tensor([len(index) == 0 for index in targets], dtype=torch.bool),
        target_index=[torch.from_numpy(index) for index in targets],
        instance_masks=[torch.from_numpy(ready.instance_masks) for ready in prepared],
        instance_boxes_norm=[torch.from_numpy(ready.instance_boxes_norm) for ready in prepared],
        geometries=[ready.geometry for ready in prepared],
        expression_ids=[expression.expression_id for expression in expressions],
        image_ids=[sample.record.image_id for sample in pairs],
        instance_attributes=_attributes([ready.instances for ready in prepared]),
        views=[sample.view for sample in pairs],
        expressions=texts,
    )
    if collate_generation is not None:
        images = [GenerationImage(s.image, s.record, p.geometry, p.instance_masks) for s, p in zip(pairs, prepared, strict=True)]
        items = _generation_items(expressions, owners, targets, num_generation_targets)
        batch.generation, batch.too_long = collate_generation(images, items)
    return batch


def _kept(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples that have expressions."""
    kept = [sample for sample in samples if sample.expressions]
    if not kept:
        raise fault("a batch without any expression", "at least one", "read another split, or larger batches")
    for expression in (expression for sample in kept for expression in sample.expressions):
        if not expression.raw.strip():
            raise fault(f"expression {expression.expression_id} is empty", "text", "fix field raw in expressions.jsonl")
    return kept


def _with_targets_alone(sample: Sample) -> Sample:
    wanted = {target for expression in sample.expressions for target in expression.targets}
    instances = [instance for instance in sample.record.instances if instance.annotation_id in wanted]
    return replace(sample, record=replace(sample.record, instances=instances))


def _generation_items(
    expressions: list[ExpressionRecord], owners: list[int], targets: list[np.ndarray], most: int | None
) -> list[GenerationItem]:
    """Return the expressions that the generator learns from: those with a target, at most so many of an image."""
    chosen: list[GenerationItem] = []
    taken: dict[int, int] = {}
    for expression, owner, index in zip(expressions, owners, targets, strict=True):
        if len(index) and (most is None or taken.get(owner, 0) < most):
            taken[owner] = taken.get(owner, 0) + 1
            chosen.append(GenerationItem(owner, index, expression.expression, expression.expression_id))
    return chosen


def _target_index(expression: ExpressionRecord, ready: Prepared) -> np.ndarray:
    places = {instance.annotation_id: place for place, instance in enumerate(ready.instances)}
    missing = [target for target in expression.targets if target not in places]
    if missing:
        raise GrexError(
            f"expression {expression.expression_id}: targets {missing} are no instances of image {expression.image_id}; expected "
            "annotation ids of the image that are no crowd regions; fix field targets (`grex data check` lists every fault)"
        )
    return np.asarray([places[target] for target in expression.targets], np.int64)


def _union_of_targets(prepared: list[Prepared], owners: list[int], targets: list[np.ndarray], image_size: int) -> Tensor | None:
    union = np.zeros((len(owners), image_size, image_size), bool)
    for row, (owner, index) in enumerate(zip(owners, targets, strict=True)):
        if not prepared[owner].has_mask[index].all():
            return None
        for place in index:
            np.logical_or(union[row], prepared[owner].instance_masks[place], out=union[row])
    return torch.from_numpy(union)


def _attributes(images: list[list[Instance]]) -> dict[str, list[Tensor]] | None:
    names = sorted({name for instances in images for instance in instances for name in instance.attributes or ()})
    if not names:
        return None
    return {
        name: [
            torch.tensor([(instance.attributes or {}).get(name, UNKNOWN_ATTRIBUTE) for instance in instances], dtype=torch.int64)
            for instances in images
        ]
        for name in names
    }
