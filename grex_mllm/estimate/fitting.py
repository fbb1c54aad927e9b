"""The smallest change to a training that fits a GPU: fewer changes first, and of equally many the cheaper ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

from grex_mllm.estimate.count import Counted
from grex_mllm.estimate.memory import Memory, Plan, memory

LEFT_FREE = 1.5 * 2**30  # bytes for CUDA itself, the kernels' workspaces and fragmentation: an assumption, not a measurement


@dataclass(frozen=True)
class Change:
    """name: as a user writes it.  price: a rank, small = costs little time and changes no result."""

    name: str
    price: int


CHECKPOINTING = Change("--model.generator.gradient_checkpointing=true", 1)
ZERO2 = Change("--train.deepspeed=deepspeed_configs/zero2.json", 2)
HALF_BATCH = Change("half of --train.batch_images, twice --train.accumulation", 3)
QUARTER_BATCH = Change("a quarter of --train.batch_images, four times --train.accumulation", 4)
NF4 = Change("--model.generator.quantisation=nf4", 6)
ZERO3 = Change("--train.deepspeed=deepspeed_configs/zero3.json", 9)
OFFLOAD2 = Change("--train.deepspeed=deepspeed_configs/zero2_offload.json", 14)
OFFLOAD3 = Change("--train.deepspeed=deepspeed_configs/zero3_offload.json", 20)
CHANGES = (CHECKPOINTING, ZERO2, HALF_BATCH, QUARTER_BATCH, NF4, ZERO3, OFFLOAD2, OFFLOAD3)
ENGINES = {ZERO2: (2, "none"), ZERO3: (3, "none"), OFFLOAD2: (2, "optimizer"), OFFLOAD3: (3, "all")}


@dataclass(frozen=True)
class Case:
    """A training as it is configured. with_checkpointing: counted with the LM's checkpointing, without_checkpointing: without it."""

    plan: Plan
    gpus: int
    images: int
    checkpointing: bool
    has_lm: bool
    with_checkpointing: Counted
    without_checkpointing: Counted


def smallest_change(case: Case, gpu_memory_bytes: float) -> tuple[tuple[Change, ...], Memory] | None:
    """Return the changes that fit a GPU, none where it fits already, and what is needed then; None where nothing here fits.

    Activations are taken to shrink with the images of a batch.
    """
    chosen = sorted(
        (some for number in range(5) for some in combinations(CHANGES, number) if _possible(some, case)),
        key=lambda some: (len(some), sum(change.price for change in some)),
    )
    for some in chosen:
        need = memory_with(case, some)
        if need.total + LEFT_FREE <= gpu_memory_bytes:
            return some, need
    return None


def memory_with(case: Case, changes: tuple[Change, ...]) -> Memory:
    """Return the memory of a GPU after some changes."""
    plan = replace(case.plan, quantisation="nf4") if NF4 in changes else case.plan
    for change in changes:
        if change in ENGINES:
            stage, offload = ENGINES[change]
            plan = replace(plan, stage=stage, offload=offload)
    checkpointing = case.checkpointing or CHECKPOINTING in changes
    need = memory(case.with_checkpointing if checkpointing else case.without_checkpointing, plan, case.gpus)
    share = 4 if QUARTER_BATCH in changes else 2 if HALF_BATCH in changes else 1
    return replace(need, activations=need.activations // share)


def _possible(changes: tuple[Change, ...], case: Case) -> bool:
    engines = [change for change in changes if change in ENGINES]
    stage = ENGINES[engines[0]][0] if engines else case.plan.stage
    batches = [change for change in changes if change in (HALF_BATCH, QUARTER_BATCH)]
    share = 4 if QUARTER_BATCH in batches else 2
    quantised = NF4 in changes or case.plan.quantisation != "none"
    return not (
        len(engines) > 1
        or len(batches) > 1
        or (batches and case.images % share)
        or (stage == 3 and quantised)
        or (CHECKPOINTING in changes and (case.checkpointing or not case.has_lm))
        or (NF4 in changes and (case.plan.quantisation != "none" or not case.has_lm))
        or any(case.gpus == 1 and change in (ZERO2, ZERO3) for change in engines)
    )
