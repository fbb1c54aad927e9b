"""Samples to one `Batch` of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grex_mllm.data.transforms import Prepared, prepare
from grex_mllm.errors import GrexError, fault
from grex_mllm.types import Batch, ExpressionRecord, Instance, Sample

Encode = Callable[[list[str]], tuple[Tensor, Tensor]]  # E texts -> ids int64 [E, L], mask int64 [E, L] (1 = real token)
TASKS = ("ground", "generate")
UNKNOWN_ATTRIBUTE = -100  # what cross entropy ignores


def collate(
    samples: Sequence[Sample],
    encode_text: Encode,
    encode_lm: Encode | None = None,
    *,
    image_size: int,
    resize: str = "squash",
    task: str = "ground",
    num_generation_targets: int | None = None,
    max_lm_tokens: int | None = None,
) -> Batch:
    """Return the batch of B samples with all their E expressions, at S x S = image_size.

    The text encoder gets `raw` (as the released ReLA does), the generator's tokenizer `expression`. task "generate": only expressions
    with a target are kept and images left without any are dropped. With encode_lm, lm_ids, lm_mask and lm_index are set for the
    expressions with a target, at most num_generation_targets of an image. Those of more than max_lm_tokens tokens (with BOS and EOS) are
    left out and named in too_long; where a batch for generation holds no other, the shortest stays, cut and without EOS, so that every
    process trains the same weights in every step. gt_masks is None where a target has no mask (box-only data).

    Raises:
        GrexError: unknown task, no expression left, an empty expression, or a target that is no selectable instance of its image.
    """
    if task not in TASKS:
        raise fault(f'task "{task}"', " or ".join(TASKS), "fix the call")
    if task == "generate" and encode_lm is None:
        raise fault("task generate without encode_lm", "the generator's tokenizer", "pass encode_lm")
    pairs = _kept(samples, task)
    expressions = [expression for _, kept in pairs for expression in kept]
    prepared = [prepare(sample, image_size, resize) for sample, _ in pairs]
    targets = [_target_index(expression, ready) for ready, (_, kept) in zip(prepared, pairs, strict=True) for expression in kept]
    owners = [index for index, (_, kept) in enumerate(pairs) for _ in kept]
    text_ids, text_mask = encode_text([expression.raw for expression in expressions])
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
        image_ids=[sample.record.image_id for sample, _ in pairs],
        instance_attributes=_attributes([ready.instances for ready in prepared]),
    )
    chosen = _generation_targets(expressions, owners, num_generation_targets) if encode_lm is not None else []
    if encode_lm is not None and chosen:
        _add_text(batch, torch.tensor(chosen), encode_lm([expressions[e].expression for e in chosen]), max_lm_tokens, task)
    return batch


def _add_text(batch: Batch, index: Tensor, encoded: tuple[Tensor, Tensor], most: int | None, task: str) -> None:
    """Set lm_ids, lm_mask and lm_index from the encoded expressions `index` of the batch, without those of more than `most` tokens."""
    ids, mask = encoded
    lengths = mask.sum(1)
    if most is not None and (lengths > most).any():
        kept = (lengths <= most).nonzero().flatten()
        batch.too_long = [batch.expression_ids[e] for e in index[lengths > most].tolist()]
        if not len(kept):
            if task != "generate":
                return
            kept = lengths.argmin()[None]
        longest = min(int(lengths[kept].max()), most)
        ids, mask, index = ids[kept, :longest], mask[kept, :longest], index[kept]
    batch.lm_ids, batch.lm_mask, batch.lm_index = ids, mask, index


def _kept(samples: Sequence[Sample], task: str) -> list[tuple[Sample, list[ExpressionRecord]]]:
    """Return each sample with the expressions that the task reads; samples without any are left out."""
    pairs = [(sample, [e for e in sample.expressions if e.targets or task == "ground"]) for sample in samples]
    pairs = [(sample, expressions) for sample, expressions in pairs if expressions]
    if not pairs:
        raise fault(
            f"a batch for task {task} without any expression", "at least one", "read the data with targeted_only=True, or larger batches"
        )
    for expression in (expression for _, kept in pairs for expression in kept):
        if not expression.raw.strip():
            raise fault(f"expression {expression.expression_id} is empty", "text", "fix field raw in expressions.jsonl")
    return pairs


def _generation_targets(expressions: list[ExpressionRecord], owners: list[int], most: int | None) -> list[int]:
    """Return the expressions that the generator learns from: those with a target, at most so many of an image."""
    chosen: list[int] = []
    taken: dict[int, int] = {}
    for e, (expression, owner) in enumerate(zip(expressions, owners, strict=True)):
        if expression.targets and (most is None or taken.get(owner, 0) < most):
            taken[owner] = taken.get(owner, 0) + 1
            chosen.append(e)
    return chosen


def batch_to(batch: Batch, device: torch.device | str) -> Batch:
    """Return the batch with every tensor on the device."""
    return Batch(**{f.name: _to(getattr(batch, f.name), device) for f in fields(batch)})


def _to(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, list):
        return [_to(item, device) for item in value]
    if isinstance(value, dict):
        return {name: _to(item, device) for name, item in value.items()}
    return value


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
