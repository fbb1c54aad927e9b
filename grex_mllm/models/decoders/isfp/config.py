"""The knobs of ISFP and the weights of its losses."""

from __future__ import annotations

from dataclasses import dataclass, field

from grex_mllm.models.grex_losses import GrexLossConfig


@dataclass
class IsfpLossConfig(GrexLossConfig):
    """The thesis's loss (equation 3.4) and the terms of GREx, with the article's weights.

    The thesis gives 10, 0.03 and 0.5 and no reduction. Read as sums at stride 8, they weigh 10 x 169, 0.03 x 9 x 52^2 and 0.5 x 52^2: as
    means 1, 0.43 and 0.8, which keep that balance at any size.
    """

    identification: float = 1.0
    segmentation: float = 0.43
    refinement: float = 0.8
    mask: float = 0.0  # of the final mask, beside `refinement`
    minimap: float = 0.0  # of the cells' logits, beside `identification`
    class_weights: list[float] = field(default_factory=lambda: [1.0, 1.0])  # of background and target in the cross-entropies
    least_iou: float = 0.3  # theta: of the selected mask, above which the refinement learns


@dataclass
class IsfpConfig:
    """Sizes and variants of ISFP."""

    name: str = "isfp"
    width: int = 256  # of fused, identification and propagated features: C_f = C of the thesis, which says nothing of it
    segmentation_width: int = 128  # of the segmentation branch
    minimap_side: int = 13  # S: every cell stands for the object whose centre of gravity lies in it
    # propagation (RAM) | convolution (one instead of RAM) | none (no identification branch, and a single mask)
    identification: str = "propagation"
    alpha: float = 0.3  # forget rate of equation 3.2; states grow without bound from 1/3 on
    refinement: bool = True
    refinement_width: int = 32
    aspp_rates: list[int] = field(default_factory=lambda: [6, 12, 18])
    coordinates: bool = False  # x and y as two more channels of what both branches read; the thesis is silent, SOLO does it
    # whose masks make the answer: union (every cell by its probability: any number of targets, or none) | argmax (of the likeliest cell, as
    # the thesis: always one target)
    selection: str = "union"
    no_target: bool = True
    boxes: bool = True
    count: bool = True
    loss: IsfpLossConfig = field(default_factory=IsfpLossConfig)
