"""What passes between the rooms, and the shape legend of the whole package.

Sizes: B images, E expressions of a batch (each belongs to one of the B images), L tokens, Q region queries, N instances,
C channels, D language-model width, H W network input, h w feature map, P side of the minimap (Q = P * P where it has one).
Boxes are `xyxy` in absolute pixels unless a name ends in `_norm` (then `cxcywh` in [0, 1] of the network input).
This file imports no torch at run time, so that records can be read without it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MORE_THAN_FIVE = 6  # the count class ">5"
NUM_COUNTS = 7  # count classes {0, 1, 2, 3, 4, 5, >5}


@dataclass
class Instance:
    """One object of an image, as published (`shared` facts: data formats, "Our dataset folder").

    segmentation: list of polygons (flat x, y lists), COCO RLE dict {"size": [H, W], "counts": str | list}, or None (box-only data).
    mask: bool [H, W] visible pixels, set by generated scenes in place of `segmentation`; never written to JSON.
    attributes: scene metadata (synthetic data only): name -> class index. Used only by the optional auxiliary loss.
    """

    annotation_id: str
    category: str
    box_xyxy: list[float]
    segmentation: Any = None
    iscrowd: bool = False
    mask: np.ndarray | None = None
    attributes: dict[str, int] | None = None


@dataclass
class ImageRecord:
    """One line of `images.jsonl`. `file` is relative to the image root."""

    image_id: str
    file: str
    height: int
    width: int
    instances: list[Instance] = field(default_factory=list)


@dataclass
class ExpressionRecord:
    """One line of `expressions.jsonl`. `targets` lists annotation ids; empty = no target."""

    expression_id: str
    ref_id: str
    image_id: str
    expression: str
    raw: str
    targets: list[str]
    split: str
    source: str
    tags: list[str] = field(default_factory=list)


@dataclass
class Sample:
    """One image with expressions that belong to it, at original size, before resizing and tokenisation.

    image: uint8 [H0, W0, 3] RGB, EXIF orientation applied.  scale: share of the network input's side that it takes, in (0, 1].
    view: name of these very pixels, where they come again in every epoch; else None.
    """

    image: np.ndarray
    record: ImageRecord
    expressions: list[ExpressionRecord]
    scale: float = 1.0
    view: str | None = None


@dataclass
class Geometry:
    """How an original image lies in the network input: x_in = x * scale_x + left, y_in = y * scale_y + top, then padding right and bottom.

    height, width: original size. input_height, input_width: size of the resized image without padding and margins.
    top, left, bottom, right: margins around the image that are part of what the network sees (letterbox).
    """

    height: int
    width: int
    input_height: int
    input_width: int
    top: int = 0
    left: int = 0
    bottom: int = 0
    right: int = 0

    @property
    def scale_x(self) -> float:
        return self.input_width / self.width

    @property
    def scale_y(self) -> float:
        return self.input_height / self.height

    @property
    def seen_size(self) -> tuple[int, int]:
        """Height and width of the image with its margins, without padding."""
        return self.top + self.input_height + self.bottom, self.left + self.input_width + self.right

    @property
    def inner(self) -> tuple[slice, slice]:
        """Rows and columns of the image itself within the network input."""
        return slice(self.top, self.top + self.input_height), slice(self.left, self.left + self.input_width)


@dataclass
class Batch:
    """Training or evaluation batch of B images: a grounding part of E expressions and, where a generator learns, a generation part.

    image: uint8 [B, 3, H, W] RGB, padded right and bottom; the model normalises, and then sets what `geometries` leaves out to zero.
    instance_masks: B tensors bool [N_b, H, W].  instance_boxes_norm: B tensors float32 [N_b, 4] cxcywh.
    instance_attributes: name -> B tensors int64 [N_b], -100 = unknown; None when the data carries no scene metadata.
    image_index: int64 [E], image of each expression.
    text_ids, text_mask: int64 [E, L] tokens of the grounding text encoder, 1 = real token.
    gt_masks: bool [E, H, W] union of the targets (all False for no target); None for box-only data.
    gt_boxes_norm: E tensors float32 [n_e, 4] cxcywh.
    gt_count: int64 [E].  no_target: bool [E].
    target_index: E tensors int64 [n_e], positions of the targets among the image's instances.
    generation: what the generator's own `collate` made; None without a generator.
    too_long: ids of expressions that the generator would have learned from, but for their length.
    geometries: B.  expression_ids, expressions: E, the latter as the text encoder reads them.  image_ids: B.
    views: B names, see `Sample`, or empty.
    """

    image: Tensor
    image_index: Tensor
    text_ids: Tensor
    text_mask: Tensor
    gt_masks: Tensor | None
    gt_boxes_norm: list[Tensor]
    gt_count: Tensor
    no_target: Tensor
    target_index: list[Tensor]
    instance_masks: list[Tensor]
    instance_boxes_norm: list[Tensor]
    geometries: list[Geometry]
    expression_ids: list[str]
    image_ids: list[str]
    instance_attributes: dict[str, list[Tensor]] | None = None
    generation: Any = None
    too_long: list[str] = field(default_factory=list)
    views: list[str | None] = field(default_factory=list)
    expressions: list[str] = field(default_factory=list)

    @property
    def input_sizes(self) -> list[tuple[int, int]]:
        """Height and width of each image without its padding."""
        return [g.seen_size for g in self.geometries]


@dataclass
class GenerationImage:
    """An image of a batch, as a generator's `collate` gets it. original: uint8 [H0, W0, 3].  record: its instances.

    geometry: how the original lies in the network input.  instance_masks: bool [N, H, W] of the selectable instances, on that input.
    """

    original: np.ndarray
    record: ImageRecord
    geometry: Geometry
    instance_masks: np.ndarray


@dataclass
class GenerationItem:
    """One expression that the generator learns. image: position in the batch.  targets: int64 [n >= 1], positions among its instances."""

    image: int
    targets: np.ndarray
    expression: str
    expression_id: str


class TextFeatures(NamedTuple):
    """What a text encoder gives for E expressions. Row 0 stands for the sentence, the words follow.

    tokens: float [E, L, C_text] last hidden state, padding rows included.  mask: int64 [E, L], 1 = real token.
    """

    tokens: Tensor
    mask: Tensor


class PixelFeatures(NamedTuple):
    """Output of the pixel decoder for B images (or E, when the image encoder fuses language).

    mask_features: float [B, C, h, w] at the finest stride.  levels: float [B, C, h_l, w_l], coarse to fine.
    """

    mask_features: Tensor
    levels: list[Tensor]


class GroundingOutput(NamedTuple):
    """What a decoder returns for E expressions. Only the masks must be there; None = the decoder has no such head.

    Two-way logits: 0 = background or has a target, 1 = target or no target.
    mask_logits: float [E, 2, h, w] (0 background, 1 target).
    minimap_logits: float [E, Q, 2].  no_target_logits: float [E, 2] (1 = no target).
    boxes_norm: float [E, Q, 4] cxcywh.  box_logits: float [E, Q].  count_logits: float [E, 7] over {0..5, >5}.
    minimap_prob: float [E, P, P] for pictures.
    extra: a named tuple of the decoder's own, which only its `Criterion` reads.
    active_regions: bool [E, Q], which of the Q rows are regions: the first P_e * P_e of an expression with a grid of its own; None = all.
    target_prob: float [E, h, w], how likely each pixel is of a target, of decoders whose `decide` makes the masks of it.
    """

    mask_logits: Tensor
    minimap_logits: Tensor | None = None
    no_target_logits: Tensor | None = None
    boxes_norm: Tensor | None = None
    box_logits: Tensor | None = None
    count_logits: Tensor | None = None
    minimap_prob: Tensor | None = None
    extra: Any = None
    active_regions: Tensor | None = None
    target_prob: Tensor | None = None


class Proposals(NamedTuple):
    """Objects that a decoder finds in B images without any expression; K of each.

    mask_logits: float [B, K, h, w].  boxes_norm: float [B, K, 4] cxcywh.  scores: float [B, K] in [0, 1].
    """

    mask_logits: Tensor
    boxes_norm: Tensor
    scores: Tensor


class DecoderInputs(NamedTuple):
    """Sizes of what a decoder reads.

    channels: of the image encoder's maps, fine to coarse.  width, mask_width: of the pixel decoder's levels and mask features.
    text_width: of a text token.
    """

    channels: tuple[int, ...]
    width: int
    mask_width: int
    text_width: int


@dataclass
class Grounding:
    """Answer for one expression at the original image size (public: `GrexModel.ground`).

    mask: bool [H0, W0].  mask_input: bool at network input size before any emptying (for the official protocol).
    boxes_xyxy: float32 [n, 4] absolute pixels.  box_scores: float32 [n].  count: int, 6 means ">5". Boxes, or boxes and count, are None
    where the model has no head for them.
    no_target_prob: float.  no_target: bool, the final answer.  minimap: float32 [P, P] or None.
    head_no_target: what the no-target head alone says (the official protocol reads it).
    image: uint8 [H0, W0, 3] that was asked about, where it is at hand: what a notebook shows the answer on (else on grey).
    """

    expression: str
    mask: np.ndarray
    mask_input: np.ndarray | None
    boxes_xyxy: np.ndarray | None
    box_scores: np.ndarray | None
    count: int | None
    no_target: bool
    no_target_prob: float
    minimap: np.ndarray | None = None
    head_no_target: bool = False
    image: np.ndarray | None = field(default=None, repr=False, compare=False)

    def _repr_png_(self) -> bytes:
        """Return the answer as a PNG picture, as notebooks ask for it."""
        from grex_mllm.draw import grounding_png

        return grounding_png(self)
