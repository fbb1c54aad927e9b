"""Synthetic scenes as samples, drawn on the fly from (seed, split, index)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping

from grex_mllm.data.synthetic.expressions import draw_kind, sample_expression, word_expression
from grex_mllm.data.synthetic.scenes import DrawnScene, bits, draw_scene, held_out_pairs, scene_seed
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.data.synthetic.shapes import SHAPES
from grex_mllm.errors import fault
from grex_mllm.types import ExpressionRecord, ImageRecord, Instance, Sample

_CROWDED = 40  # repeats of one text in a poor scene before it is let through


class SyntheticDataset:
    """Samples of one split; sample i holds `expressions_per_image` expressions with different texts where the scene allows.

    Equal arguments make equal samples in any process and order; sample i with fewer expressions has a prefix of those with more.

    Raises:
        GrexError: unknown split or kind, or settings out of range.
    """

    def __init__(
        self, config: SyntheticConfig, split: str, length: int, expressions_per_image: int, kind_weights: Mapping[str, float] | None = None
    ) -> None:
        check_config(config)
        scene_seed(config, split, 0)
        held_out_pairs(config)
        draw_kind(lambda: 0.0, kind_weights)
        if length < 1 or expressions_per_image < 0:
            raise fault(
                f"{length} scenes with {expressions_per_image} expressions", "at least 1 scene and 0 expressions", "fix the numbers"
            )
        self.config, self.split, self.length = config, split, length
        self.expressions_per_image = expressions_per_image
        self.kind_weights = dict(kind_weights) if kind_weights is not None else None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        drawn = draw_scene(self.config, self.split, index)
        image_id = f"{self.split}-{index}"
        return Sample(drawn.image, _image_record(drawn, image_id), self._expressions(drawn, image_id, index))

    def _expressions(self, drawn: DrawnScene, image_id: str, index: int) -> list[ExpressionRecord]:
        words = scene_seed(self.config, self.split, index)
        rng = random.Random((int(words[2]) << 64) | int(words[3]))
        held = held_out_pairs(self.config)
        records: list[ExpressionRecord] = []
        texts: set[str] = set()
        repeats = 0
        while len(records) < self.expressions_per_image:
            tree, kind, mask = sample_expression(drawn.scene, rng, self.config.no_target_share, self.kind_weights, held)
            text = word_expression(tree, rng)
            if text is None:
                continue
            if text in texts and repeats < _CROWDED:
                repeats += 1
                continue
            texts.add(text)
            name = f"{image_id}#{len(records)}"
            targets = [f"{image_id}:{k}" for k in bits(mask)]
            tags = [kind] if mask else [kind, "no_target"]
            records.append(ExpressionRecord(name, name, image_id, text, text, targets, self.split, "synthetic", tags))
        return records


def check_config(config: SyntheticConfig) -> None:
    """Raise where a setting is out of range.

    Raises:
        GrexError: names the field.
    """
    checks = [
        ("image_size", config.image_size, 64 <= config.image_size <= 256, "64 to 256 pixels"),
        ("min_objects", config.min_objects, 2 <= config.min_objects <= config.max_objects, "2 to max_objects"),
        ("max_objects", config.max_objects, config.max_objects <= 12, "at most 12"),
        ("min_visible", config.min_visible, 0.1 <= config.min_visible <= 1.0, "0.1 to 1"),
        ("noise", config.noise, 0 <= config.noise <= 14, "0 to 14 grey levels"),
        ("no_target_share", config.no_target_share, 0.0 <= config.no_target_share < 1.0, "0 up to, but not, 1"),
        ("seed", config.seed, config.seed >= 0, "0 or more"),
    ]
    for name, value, holds, expected in checks:
        if not holds:
            raise fault(f"data.sources.synthetic.{name} is {value}", expected, "fix the configuration")


def _image_record(drawn: DrawnScene, image_id: str) -> ImageRecord:
    scene = drawn.scene
    instances = []
    for k, item in enumerate(scene.objects):
        shape, colour, size, texture = item.values
        x1, y1, x2, y2 = item.box
        box = [float(x1), float(y1), float(x2), float(y2)]
        attributes = {"shape": shape, "colour": colour, "size": size, "texture": texture, "scale": item.scale}
        instances.append(Instance(f"{image_id}:{k}", SHAPES[shape], box, mask=drawn.masks[k], attributes=attributes))
    return ImageRecord(image_id, f"images/{image_id}.png", scene.height, scene.width, instances)


def corpus(config: SyntheticConfig, num_lines: int) -> Iterator[str]:
    """Yield `num_lines` expressions of train scenes, no-target ones included: text for tokenizers and language-model training."""
    dataset = SyntheticDataset(config, "train", 1 << 40, 8)
    scenes = (dataset._expressions(draw_scene(config, "train", i), f"train-{i}", i) for i in itertools.count())
    yield from itertools.islice((record.expression for records in scenes for record in records), num_lines)
