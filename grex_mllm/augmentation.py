"""The knobs of augmentation (`data.augment`); what they do is in `grex_mllm/data/augment/`."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class AugmentConfig:
    """How the samples of dataset folders are varied in training. Expressions stay true; by default nothing is varied.

    flip, crop, colour, paste: share of the samples that are mirrored (left and right change places in the words, too), cut to a window
    around the targets, changed in colour, and given objects of another photograph of the same source; in [0, 1].
    scale: smallest and largest size of things against the plain sample. Below 1 the image takes a part of the network's input; above 1 it
    is how far a window of `crop` enlarges, so the second number matters with `crop` only.
    """

    flip: float = 0.0
    crop: float = 0.0
    colour: float = 0.0
    paste: float = 0.0
    scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
