"""The source "synthetic": an endless training stream over drawn scenes, easy kinds first."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from grex_mllm.config import DataConfig
from grex_mllm.data.synthetic.canonical import canonical_expression
from grex_mllm.data.synthetic.dataset import SyntheticDataset, corpus
from grex_mllm.data.synthetic.export import NUM_SCENES, export_once
from grex_mllm.data.synthetic.expressions import KINDS
from grex_mllm.data.synthetic.meaning import scene_from_record
from grex_mllm.data.synthetic.settings import SyntheticConfig as Config
from grex_mllm.types import Sample

__all__ = ["Config", "TrainingStream", "export_for_prediction", "text", "training_samples"]

ENDLESS = 1 << 40
PRETRAINING_OFFSET = 1 << 37  # a pre-training sees other scenes
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


def training_samples(data: DataConfig, config: Config, purpose: str, positions: int, generates: bool) -> TrainingStream:
    """Return the stream of a training or pre-training; see `grex_mllm.data.sources.training_samples`."""
    pretrains = purpose == "pretraining"
    drawn = replace(config, no_target_share=0.0) if pretrains else config
    weights = {kind: EASY_WEIGHT if kind in EASY else 1.0 for kind in KINDS}
    easy = SyntheticDataset(drawn, data.train_split, ENDLESS, data.expressions_per_image, weights)
    full = SyntheticDataset(drawn, data.train_split, ENDLESS, data.expressions_per_image)
    offset = PRETRAINING_OFFSET if pretrains else 0
    return TrainingStream(easy, full, round(config.easy_share * positions), offset, CANONICAL_SHARE if generates else 0.0)


def text(data: DataConfig, config: Config, num_lines: int, generation: bool) -> list[str]:
    """Return lines of the grammar; generation: as the generator shall write them, from scenes of the pre-training."""
    if not generation:
        return list(corpus(config, num_lines))
    samples = training_samples(data, config, "pretraining", 0, True)
    lines: list[str] = []
    while len(lines) < num_lines:
        lines += [record.expression for record in samples[len(lines)].expressions]
    return lines


def export_for_prediction(config: Config, split: str, length: int | None, folder: Path) -> None:
    """Write scenes to predict into `folder`, or find these very scenes there. length: how many; None = as many as the demo's test split.

    Raises:
        GrexError: the folder holds anything else; an unknown split; settings out of range.
    """
    export_once(config, split, length or NUM_SCENES, folder)
