"""The knobs of drawn scenes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SyntheticConfig:
    """Synthetic scenes. held_out: pairs "colour shape" or "texture shape" that only the split `compositional` shows.

    min_visible: least visible share of every object.  noise: strongest noise in grey levels, drawn anew for each scene.
    """

    seed: int = 0
    image_size: int = 96
    min_objects: int = 2
    max_objects: int = 12
    min_visible: float = 0.45
    noise: int = 10
    no_target_share: float = 0.22
    easy_share: float = 0.0  # first part of the training in which the easy kinds come more often
    held_out: list[str] = field(
        default_factory=lambda: ["red star", "blue triangle", "green ring", "yellow square", "purple circle", "orange cross", "dotted bar"]
    )


@dataclass
class DialogueConfig(SyntheticConfig):
    """Synthetic scenes with dialogues. follow_up_share: of the expressions, those that become a dialogue of two turns as one text."""

    follow_up_share: float = 0.5
