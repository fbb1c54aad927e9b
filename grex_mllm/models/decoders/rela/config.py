"""The knobs of ReLA and the weights of its losses."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RelaLossConfig:
    """Weights of the named loss terms; 0 switches a term off. The defaults are the article's joint weights (2, 5, 0.2, 1)."""

    mask: float = 2.0
    minimap: float = 0.2
    no_target: float = 0.2
    box_l1: float = 5.0
    box_giou: float = 5.0
    box_score: float = 2.0
    count: float = 1.0
    class_weights: list[float] = field(default_factory=lambda: [0.9, 1.1])  # of background and target in the cross-entropies
    minimap_target: str = "area"  # area (share of the cell, a soft target) | truncated (as released: 1 where all sampled pixels are)
    box_score_kind: str = "focal"  # focal | bce
    deep_supervision: float = 0.0  # weight of each earlier layer's terms beside the last layer's; 0 = only the last layer answers
    match_score: float = 2.0  # weights of the pairing cost of boxes and queries
    match_l1: float = 5.0
    match_giou: float = 2.0


@dataclass
class RelaConfig:
    """Sizes and variants of ReLA."""

    name: str = "rela"
    width: int = 256
    num_heads: int = 8
    num_layers: int = 9
    feedforward: int = 2048
    minimap_side: int = 10
    boxes: bool = True
    count: bool = True
    ria: str = "attention"  # attention | pooled (hard split in the decoder); the hard split of the image is model.vision.patches
    rla: str = "both"  # both | region | language | none (point-wise product with the mean language feature)
    language_every_layer: bool = False  # as in the paper; the released code has language in the first layer only
    mask_language_padding: bool = False  # the released code attends to padding tokens
    language_scale: float = 0.1
    loss: RelaLossConfig = field(default_factory=RelaLossConfig)
