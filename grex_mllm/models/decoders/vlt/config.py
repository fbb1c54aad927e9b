"""The knobs of VLT and the weights of its losses. Defaults: the thesis (chapter 4) where it says a value, else our reading."""

from __future__ import annotations

from dataclasses import dataclass, field

from grex_mllm.models.grex_heads import GrexHeadsConfig
from grex_mllm.models.grex_losses import GrexLossConfig


@dataclass
class VltLossConfig(GrexLossConfig):
    """The loss of GREx (its mask term with equal class weights is the papers' binary cross-entropy), and masked contrastive learning."""

    class_weights: list[float] = field(default_factory=lambda: [1.0, 1.0])  # of background and target in the cross-entropies
    contrastive: float = 0.1  # Eq. 4.8; 0 = no contrastive learning
    temperature: float = 0.1  # tau
    num_different: int = 3  # N_DO: other objects of the image that an expression is told from, at most (10 % of a batch of 32); 0 = all
    anchors: str = "all"  # all (every expression that another one of the batch shares its object with) | one (the first such of a batch)


@dataclass
class VltConfig:
    """Sizes and variants of VLT."""

    name: str = "vlt"
    width: int = 256
    num_heads: int = 8
    feedforward: int = 1024
    encoder_layers: int = 2
    decoder_layers: int = 2
    grid_side: int = 30  # cells of a side: 480 / 16 (416 / 16 = 26)
    maps: str = "four"  # summed on the grid: four (all of the pixel decoder's) | three (the coarser ones, as the thesis)
    fusion: str = "spatial"  # spatial (Eq. 4.1-4.3) | tile (the sentence at every cell) | tile_convolutions (and four convolutions)
    body: str = "transformer"  # transformer | convolutions (seven, in place of encoder, decoder, query generation and balance: table 4.1)
    queries: str = "generated"  # generated (Eq. 4.4-4.6) | learned | words (the first num_queries rows of the text)
    num_queries: int = 16
    coordinates: bool = False  # x and y as two more channels of what the queries are generated from
    balance: bool = True  # weigh each response by a confidence (query balance module)
    mask_widths: list[int] = field(default_factory=lambda: [128, 64, 32])  # of the mask decoder's three convolutions
    # a copy of each sentence, one word masked, that contrastive learning takes as one more expression of the same object: none | random |
    # threshold (random among the words of more than `word_threshold` times the mean attention) | weighted (drawn by attention)
    masked_words: str = "weighted"
    least_words: int = 3  # N_m: only sentences of more words are masked
    word_threshold: float = 1.0
    end_row: bool = True  # the last row of a sentence is no word (BERT's [SEP]) and never masked
    heads: GrexHeadsConfig = field(default_factory=GrexHeadsConfig)
    loss: VltLossConfig = field(default_factory=VltLossConfig)
