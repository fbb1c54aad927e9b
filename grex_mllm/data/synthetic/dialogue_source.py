"""The source "dialogue": the stream of "synthetic", in which a share of the expressions are follow-ups after what was said before.

The text encoder gets both turns as one text ("the two circles | not the red one", see `data/history.py`), and the targets are those of the
follow-up. A generator learns to write the plainest expression for them.
"""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

from grex_mllm.config import DataConfig
from grex_mllm.data.history import SEPARATOR, joined
from grex_mllm.data.synthetic.canonical import canonical_expression
from grex_mllm.data.synthetic.dialogues import OPERATIONS, RESTRICTION, draw_dialogue
from grex_mllm.data.synthetic.meaning import scene_from_record
from grex_mllm.data.synthetic.scenes import bits, held_out_pairs
from grex_mllm.data.synthetic.settings import DialogueConfig as Config
from grex_mllm.data.synthetic.source import TrainingStream
from grex_mllm.data.synthetic.source import export_for_prediction as export_scenes
from grex_mllm.data.synthetic.source import text as text_of_scenes
from grex_mllm.data.synthetic.source import training_samples as samples_of_scenes
from grex_mllm.errors import fault
from grex_mllm.types import Sample

__all__ = ["HISTORY", "Config", "DialogueStream", "export_for_prediction", "text", "training_samples"]

HISTORY = True  # a model that was trained on this source reads what was said before
NOTHING_LEFT = 0.3  # of the restrictions: no selected object fits


class DialogueStream:
    """Samples by position, as those of a `TrainingStream`, with `share` of the expressions replaced by dialogues. A pure function of it."""

    def __init__(self, stream: TrainingStream, config: Config, generates: bool) -> None:
        if not 0 <= config.follow_up_share <= 1:
            given = f"data.sources.dialogue.follow_up_share is {config.follow_up_share}"
            raise fault(given, "a share from 0 to 1", "fix the configuration")
        self.stream, self.config, self.generates = stream, config, generates

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, position: int) -> Sample:
        sample = self.stream[position]
        scene, rng, held = scene_from_record(sample.record), random.Random(position), held_out_pairs(self.config)
        for record in sample.expressions:
            if rng.random() >= self.config.follow_up_share:
                continue
            operation = OPERATIONS[int(rng.random() * len(OPERATIONS))]
            drawn = draw_dialogue(scene, rng, operation, held, operation == RESTRICTION and rng.random() < NOTHING_LEFT)
            plain = canonical_expression(scene, bits(drawn.result)) if drawn is not None and self.generates else None
            if drawn is None or (self.generates and drawn.result and plain is None):
                continue
            record.raw = joined([drawn.first, drawn.follow_up])  # what the text encoder reads
            record.expression = record.raw if plain is None else plain
            record.targets = [f"{record.image_id}:{k}" for k in bits(drawn.result)]
            record.tags = [operation] if drawn.result else [operation, "no_target"]
        return sample


def training_samples(data: DataConfig, config: Config, purpose: str, positions: int, generates: bool) -> DialogueStream | TrainingStream:
    """Return the stream of a training or pre-training; see `grex_mllm.data.sources.training_samples`. A pre-training has no dialogues."""
    stream = samples_of_scenes(data, config, purpose, positions, generates)
    return stream if purpose == "pretraining" else DialogueStream(stream, config, generates)


def text(data: DataConfig, config: Config, num_lines: int, generation: bool) -> list[str]:
    """Return lines of the grammar, half of them dialogues; generation: as the generator shall write them, without any."""
    lines = text_of_scenes(data, config, num_lines, generation)
    if generation:
        return lines
    stream = DialogueStream(samples_of_scenes(data, config, "training", 0, False), config, False)
    spoken = (record.raw for position in range(num_lines) for record in stream[position].expressions if SEPARATOR in record.raw)
    return [*lines[: num_lines - num_lines // 2], *islice(spoken, num_lines // 2)]


def export_for_prediction(config: Config, split: str, length: int | None, folder: Path) -> None:
    """Write scenes to predict into `folder`, as the source "synthetic" does: their expressions are single ones."""
    export_scenes(config, split, length, folder)
