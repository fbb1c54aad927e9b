"""The knobs of the decoder that selects instances, and the weights of its losses."""

from __future__ import annotations

from dataclasses import dataclass, field

from grex_mllm.models.hard_examples import HardConfig


@dataclass
class InstanceLossConfig:
    """Weights of the loss terms: regions against all objects, then the choice of targets."""

    heat: float = 1.0
    cell_box_l1: float = 5.0
    cell_box_giou: float = 1.0
    objectness: float = 2.0
    box_l1: float = 5.0
    box_giou: float = 2.0
    mask_bce: float = 2.0
    mask_dice: float = 2.0
    attribute: float = 0.5  # each scene attribute, where the model has heads for them
    words: float = 3.0  # which words of expressions mean a region, where `words` of the decoder is not 0
    target: float = 1.0
    no_target: float = 0.5
    count: float = 0.5
    hard: HardConfig = field(default_factory=HardConfig)  # hard pixels and objects count more; of `mask_bce`


@dataclass
class InstanceSelectionConfig:
    """Sizes and heads."""

    name: str = "instance_selection"
    width: int = 256
    num_heads: int = 8
    feedforward: int = 2048
    minimap_side: int = 10  # of the pictures only
    count: bool = True
    image_layers: int = 2
    language_layers: int = 3
    kept_regions: int = 20
    heat_width: int = 96
    roi_size: int = 5
    roi_channels: int = 32
    num_levels: int = 2
    mask_upsample: int = 2
    # whose masks make the answer: threshold (regions of a target probability over 0.5) | count (where a target is predicted, the
    # predicted number of best regions, as of the boxes) | overlap (there, the pixels of the largest expected IoU, all regions weighed);
    # with count and overlap regions that repeat a surer one are left out of masks and boxes
    answer: str = "threshold"
    # added to the target logits before `overlap` weighs regions: those that cover a target in part were taught to be none
    overlap_bias: float = 0.0
    attribute_classes: dict[str, int] = field(default_factory=dict)  # scene metadata: name -> number of classes; {} = none used
    # tokens that regions learn to be called by, from expressions alone, and that language reads: those that training says most; 0 = none
    words: int = 0
    loss: InstanceLossConfig = field(default_factory=InstanceLossConfig)
