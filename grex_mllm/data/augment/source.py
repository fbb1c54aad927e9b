"""A dataset folder whose training samples are varied: what is varied at a position is a pure function of (seed, position)."""

from __future__ import annotations

from functools import partial

import numpy as np

from grex_mllm.augmentation import AugmentConfig
from grex_mllm.data.augment import Surroundings, augment
from grex_mllm.data.augment.truth import TemplateScene
from grex_mllm.data.augment.words import has_place_word, mirrored_expression
from grex_mllm.data.dataset import FolderDataset
from grex_mllm.data.judges import find_judge
from grex_mllm.data.templates.judge import TemplateJudge
from grex_mllm.errors import fault
from grex_mllm.types import Sample

STREAM = 5  # keeps these draws apart from other uses of the seed
DONORS = 4  # photographs that are looked at for one of the same source


class Augmented:
    """The training samples of a folder, augmented; positions and epochs are those of the folder.

    image_size: S of the network's input.

    Raises:
        GrexError: a setting out of range.
    """

    def __init__(self, source: FolderDataset, config: AugmentConfig, seed: int, image_size: int) -> None:
        check_augmentation(config)
        self.source, self.config, self.seed = source, config, seed
        judge = find_judge(source.dataset.folder, source.dataset.info)
        scene = partial(TemplateScene, judge) if isinstance(judge, TemplateJudge) else None
        self.around = Surroundings(scene, partial(_donor, source), image_size)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> Sample:
        return augment(self.source[position], self.config, np.random.default_rng([self.seed, STREAM, position]), self.around)

    def describe(self) -> str:
        """Return a line that says what is varied, and which expressions keep their sample from it."""
        config, expressions = self.config, [expression for group in self.source.groups for expression in group]
        parts = []
        if config.flip:
            fixed = sum(mirrored_expression(expression) is None for expression in expressions)
            parts.append(f"flip ({fixed:,} of {len(expressions):,} expressions cannot be mirrored: their samples are not)")
        if config.crop and self.around.scene is not None:
            parts.append("crop (what is no longer true is left out)")
        elif config.crop:
            placed = sum(has_place_word(expression.raw) for expression in expressions)
            parts.append(f"crop (nothing judges expressions here: none of {placed:,} expressions that name a place in it)")
        if config.colour:
            parts.append("colour")
        if config.scale[0] < 1:
            parts.append(f"size down to {config.scale[0]:g}")
        if config.paste:
            parts.append("paste" if self.around.scene is not None else "no paste (nothing judges expressions here)")
        return f"augmentation of {self.source.dataset.folder}: {', '.join(parts) or 'none'}"


def check_augmentation(config: AugmentConfig) -> None:
    """Raise on settings that mean nothing.

    Raises:
        GrexError: a share outside [0, 1], a size that is no pair around 1, or windows that could not enlarge.
    """
    for name, share in (("flip", config.flip), ("crop", config.crop), ("colour", config.colour), ("paste", config.paste)):
        if not 0 <= share <= 1:
            raise fault(f"data.augment.{name} is {share}", "the share of samples, in [0, 1]", f"fix data.augment.{name}")
    if len(config.scale) != 2 or not 0 < config.scale[0] <= 1 <= config.scale[1] < float("inf"):
        raise fault(f"data.augment.scale is {config.scale}", "[smallest, largest] around 1, like [0.5, 2]", "fix data.augment.scale")
    if (config.crop > 0) != (config.scale[1] > 1):
        given = f"data.augment.crop is {config.crop} with data.augment.scale {config.scale}"
        raise fault(given, "crop above 0 with a largest size above 1, or neither", "set both: crop makes what is larger")


def _donor(source: FolderDataset, sample: Sample, rng: np.random.Generator) -> Sample | None:
    """Draw another image of the split, of the same source as the sample's expressions."""
    for place in rng.integers(len(source.groups), size=DONORS):
        group = source.groups[int(place)]
        if group[0].source == sample.expressions[0].source and group[0].image_id != sample.record.image_id:
            return source.sample_of(group)
    return None
