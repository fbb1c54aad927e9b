"""Memory of one GPU by ZeRO stage, offload, quantisation: arithmetic on what `count` found.

Weights that train, their gradients and Adam's moments are float32 under every engine of ours (`training.step` autocasts). ZeRO: Rajbhandari
et al. 2020, with what DeepSpeed adds to the paper: a float32 copy of each process's share of the weights, and buckets.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from grex_mllm.errors import fault
from grex_mllm.estimate.count import Counted

STAGES = (None, 1, 2, 3)
OFFLOADS = ("none", "optimizer", "all")
NUMBER = 4  # bytes of a number in float32
BLOCK, OUTER_BLOCK = 64, 256  # of NF4 with double quantisation (Dettmers et al. 2023): one 8-bit scale a block, one float32 for 256 of them
BYTES = {"nf4": 0.5 + 1 / BLOCK + NUMBER / (BLOCK * OUTER_BLOCK), "int8": 1.0}  # of a quantised parameter


@dataclass(frozen=True)
class Plan:
    """How a model is trained. stage: of ZeRO, None = plain.  offload: none | optimizer | all (weights, too: stage 3).

    quantisation: none | nf4 | int8.  bucket: numbers of a gradient bucket.  overlap: a second bucket while the first is sent.
    prefetch: numbers that stage 3 fetches ahead.  live: numbers that it keeps gathered at most, besides a layer that is at work.
    """

    stage: int | None = None
    offload: str = "none"
    quantisation: str = "none"
    bucket: int = 200_000_000
    overlap: bool = True
    prefetch: int = 50_000_000
    live: int = 500_000_000

    def check(self) -> None:
        """Raise GrexError for a plan that no training can have."""
        if self.stage not in STAGES:
            raise fault(f"ZeRO stage {self.stage}", "1, 2 or 3, or none", "fix it")
        if (self.offload == "optimizer" and self.stage is None) or (self.offload == "all" and self.stage != 3):
            raise fault(f"offload {self.offload} with ZeRO stage {self.stage}", "stage 1 to 3 for the optimizer, 3 for all", "fix it")
        if self.quantisation != "none" and self.stage == 3:
            raise fault(f"quantisation {self.quantisation} with ZeRO-3", "whole weights on each GPU", "take stage 2")


@dataclass
class Memory:
    """Bytes of one GPU at the fullest moment, and of one process's part of the machine's memory (cpu)."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    buffers: int = 0
    cpu: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


ROWS = tuple(f.name for f in fields(Memory))


def memory(counted: Counted, plan: Plan, gpus: int) -> Memory:
    """Return the memory of one of `gpus` processes.

    Raises:
        GrexError: a plan that no training can have.
    """
    plan.check()
    found = Memory()
    sharded = gpus if plan.stage is not None else 1
    base = counted.frozen + quantised_change(counted, plan.quantisation)
    found.weights = base + counted.trainable
    share = 1.0 / gpus if plan.stage in (2, 3) else 1.0  # of the gradients that stays on a process
    found.gradients = int(counted.gradients * share)
    in_passes = (1 - share) * counted.peak_without_gradients + share * counted.peak
    in_update = found.gradients + counted.update / sharded
    found.activations = int(max(in_passes, in_update)) - found.gradients
    if plan.quantisation != "none":
        found.activations += counted.largest_matrix  # of which a whole copy is made for each product
    found.optimizer = counted.state // sharded
    if plan.stage is None:
        found.buffers = counted.gradients if gpus > 1 else 0  # plain data parallelism adds them up in buckets that stay
        return found
    found.optimizer += counted.trainable // sharded  # the float32 copy
    found.buffers = min(plan.bucket * NUMBER, counted.gradients) * (2 if plan.overlap else 1)
    if plan.stage == 3:
        whole = found.weights
        found.weights = whole // gpus
        numbers = sum(part.total for part in counted.parts.values())
        gathered = max(plan.live * whole // max(numbers, 1), 2 * counted.largest_layer)
        found.buffers += min(whole - found.weights, plan.prefetch * NUMBER + gathered)
    if plan.offload != "none":
        found.cpu += found.optimizer + found.gradients
        found.optimizer = 0
    if plan.offload == "all":
        found.cpu += found.weights
        found.weights = 0
    return found


def quantised_change(counted: Counted, quantisation: str) -> int:
    """Return by how many bytes the frozen weights grow: the language model's matrices shrink, the rest of it stays."""
    if quantisation == "none":
        return 0
    return int(counted.quantisable_parameters * BYTES[quantisation]) - counted.quantisable
