"""The knobs of M3Att and the weights of its losses. Defaults: the thesis (chapter 5) where it says a value, else our reading."""

from __future__ import annotations

from dataclasses import dataclass, field

from grex_mllm.models.grex_heads import GrexHeadsConfig
from grex_mllm.models.grex_losses import GrexLossConfig


@dataclass
class M3AttLossConfig(GrexLossConfig):
    """The loss of GREx (its mask term with equal class weights is the paper's binary cross-entropy), and language reconstruction."""

    class_weights: list[float] = field(default_factory=lambda: [1.0, 1.0])  # of background and target in the cross-entropies
    reconstruction: float = 0.1  # Eq. 5.5; 0 = no language feature reconstruction, and no layers for it


@dataclass
class M3AttConfig:
    """Sizes and variants of M3Att."""

    name: str = "m3att"
    width: int = 256
    num_heads: int = 8  # of self- and cross-attention; mutual attention has one
    feedforward: int = 1024
    encoder_layers: int = 2
    num_layers: int = 3  # of the mutual decoder
    grid_side: int = 30  # cells of a side: 480 / 16 (416 / 16 = 26)
    maps: str = "four"  # summed on the grid: four (all of the pixel decoder's) | three (the coarser ones, as the thesis)
    max_words: int = 20  # kernels of the mask decoder: one for each word, zero where there is none
    attention: str = "shared"  # shared (one matrix for both softmaxes) | independent | vision_only ("generic": words gather vision alone)
    iterate: str = "transformed"  # language between the layers: none | same (unchanged words) | transformed
    interaction: float = 0.1  # what w^n starts at, the weight of the language that comes in between the layers
    mask_decoder: str = "kernels"  # kernels (of a 1x1 convolution on the encoded map) | concatenate | responses (VLT's, ICCV)
    mask_widths: list[int] = field(default_factory=lambda: [512, 256, 128])  # of the mask decoder's convolutions before the last
    # no gradient into the target of the reconstruction. Without it the target learns, too; the normalisation before its ReLU keeps it from
    # collapsing to one vector, and the term "target_spread" of the log tells whether it does
    detach: bool = False
    heads: GrexHeadsConfig = field(default_factory=GrexHeadsConfig)
    loss: M3AttLossConfig = field(default_factory=M3AttLossConfig)
