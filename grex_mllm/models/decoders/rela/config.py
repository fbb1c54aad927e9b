"""The knobs of ReLA and the weights of its losses."""

from __future__ import annotations

from dataclasses import dataclass, field

from grex_mllm.models.grex_losses import GrexLossConfig


@dataclass
class RelaLossConfig(GrexLossConfig):
    """The loss of GREx, and what ReLA adds."""

    class_weights: list[float] = field(default_factory=lambda: [0.9, 1.1])  # of background and target in the cross-entropies
    deep_supervision: float = 0.0  # weight of each earlier layer's terms beside the last layer's; 0 = only the last layer answers


@dataclass
class RelaConfig:
    """Sizes and variants of ReLA."""

    name: str = "rela"
    width: int = 256
    num_heads: int = 8
    num_layers: int = 9
    feedforward: int = 2048
    minimap_side: int = 10
    # P by the image: 4, 8 and 16, say, the largest as minimap_side; empty = minimap_side for all. The next side is taken where the share of
    # pixels on an edge passes the next limit of `complexity`; the defaults part 80 COCO photographs at 480 pixels into thirds
    region_sides: list[int] = field(default_factory=list)
    complexity: list[float] = field(default_factory=lambda: [0.09, 0.15])
    boxes: bool = True
    count: bool = True
    ria: str = "attention"  # attention | pooled (hard split in the decoder); the hard split of the image is model.vision.patches
    rla: str = "both"  # both | region | language | none (point-wise product with the mean language feature)
    language_every_layer: bool = False  # as in the paper; the released code has language in the first layer only
    mask_language_padding: bool = False  # the released code attends to padding tokens
    language_scale: float = 0.1
    loss: RelaLossConfig = field(default_factory=RelaLossConfig)
