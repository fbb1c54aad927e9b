"""The endless training stream over synthetic scenes, easy kinds first."""

from __future__ import annotations

import random
from dataclasses import replace

from grex_mllm.config import DataConfig
from grex_mllm.data.synthetic.canonical import canonical_expression
from grex_mllm.data.synthetic.dataset import SyntheticDataset
from grex_mllm.data.synthetic.expressions import KINDS
from grex_mllm.data.synthetic.meaning import scene_from_record
from grex_mllm.types import Sample

ENDLESS = 1 << 40
GENERATION_OFFSET = 1 << 36  # generation batches see other scenes than grounding batches
PRETRAINING_OFFSET = 1 << 37  # the attribute pre-training others again
EASY = ("category", "attribute", "shared_attribute", "separate_attributes", "extreme", "negation")
CANONICAL_SHARE = 0.9  # of the expressions that the generator learns from
EASY_WEIGHT = 3.0  # how much more often they come than the rest in the first part


class TrainingStream:
    """Samples by position 0, 1, 2, ...; the first `easy_positions` favour the easy kinds. A pure function of the position."""

    def __init__(
        self, easy: SyntheticDataset, full: SyntheticDataset, easy_positions: int, offset: int, canonical_share: float = 0.0
    ) -> None:
        self.easy, self.full, self.easy_positions, self.offset, self.canonical_share = easy, full, easy_positions, offset, canonical_share

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, position: int) -> Sample:
        sample = (self.easy if position < self.easy_positions else self.full)[self.offset + position]
        if self.canonical_share > 0:
            _make_canonical(sample, self.canonical_share, position)
        return sample


def _make_canonical(sample: Sample, share: float, position: int) -> None:
    """Replace a share of the expressions by the plainest ones for the same targets."""
    scene, draw = scene_from_record(sample.record), random.Random(position)
    for record in sample.expressions:
        if draw.random() < share:
            text = canonical_expression(scene, [int(target.rpartition(":")[2]) for target in record.targets])
            if text is not None:
                record.expression = text  # the grounding text encoder reads `raw`


def training_stream(
    data: DataConfig, split: str, num_positions: int, targeted_only: bool, generation: bool, offset: int | None = None
) -> TrainingStream:
    """Return the stream of one task. num_positions: how many the whole training will read; targeted_only: no no-target expressions.

    generation: the generator learns from these batches.  offset: of the scenes' indices; by default each task has its own scenes.
    """
    config = replace(data.synthetic, no_target_share=0.0) if targeted_only else data.synthetic
    weights = {kind: EASY_WEIGHT if kind in EASY else 1.0 for kind in KINDS}
    easy = SyntheticDataset(config, split, ENDLESS, data.expressions_per_image, weights)
    full = SyntheticDataset(config, split, ENDLESS, data.expressions_per_image)
    if offset is None:
        offset = GENERATION_OFFSET if targeted_only else 0
    return TrainingStream(easy, full, round(data.easy_share * num_positions), offset, CANONICAL_SHARE if generation else 0.0)
