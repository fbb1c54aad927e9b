"""ISFP: a feature and a mask for every cell of a grid, and the cell of the object that is meant (thesis, chapter 3).

Three levels of the pixel decoder are multiplied with the sentence (equation 3.1). One branch brings them to S x S instance-specific
features, whose relations a recurrence models; a 1x1 convolution says for each cell whether it is a target. The other branch makes S^2
masks. The chosen mask is refined with the image. What needs no language is the pixel decoder and the product's visual side.

Beyond the thesis, which knows single targets: `selection: union`, and the heads of GREx over the propagated features. Where it has batch
norm, maps here have group norm (or `model.map_norm: batch`) and cells layer norm, so that an answer does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.errors import fault
from grex_mllm.models.decoders.isfp.config import IsfpConfig
from grex_mllm.models.decoders.isfp.propagation import SLOPE, Propagation
from grex_mllm.models.decoders.isfp.truth import Truth, cells_of_centres, nearest_centres
from grex_mllm.models.feature_pyramid import NUM_LEVELS, upsample_to
from grex_mllm.models.grex_heads import GrexHeads, GrexHeadsConfig, HeadAnswers, dense_answer
from grex_mllm.models.norms import map_norm
from grex_mllm.models.resnet import append_coordinates
from grex_mllm.types import DecoderInputs, GroundingOutput, PixelFeatures, TextFeatures

IDENTIFICATIONS = ("propagation", "convolution", "none")
SELECTIONS = ("union", "argmax")
REFINED_AT = 4  # the stride at which the refinement reads image and mask
SURE = 10.0  # logit of what the ground truth says


class IsfpImages(NamedTuple):
    """The language-free part of B images. levels: f_v W_v, float [B, C, h, w], coarse to fine.  image: float [B, 3, H / 4, W / 4]."""

    levels: list[Tensor]
    image: Tensor


class IsfpExtra(NamedTuple):
    """What only the criterion reads. cell_logits: float [E, S^2], or None.  cell_masks: float [E, S^2 or 1, h, w].  coarse: float
    [E, h, w], the selected mask before the refinement."""

    cell_logits: Tensor | None
    cell_masks: Tensor
    coarse: Tensor


def convolution(before: int, after: int, kernel: int = 3, dilation: int = 1) -> nn.Sequential:
    """Return convolution, normalisation, leaky ReLU."""
    padding = kernel // 2 * dilation
    conv = nn.Conv2d(before, after, kernel, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(conv, map_norm(after), nn.LeakyReLU(SLOPE))


class ImagePart(nn.Module):
    """The visual side of equation 3.1 for three levels, and the image as the refinement reads it."""

    def __init__(self, config: IsfpConfig, inputs: DecoderInputs) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Conv2d(inputs.width, config.width, 1, bias=False) for _ in range(NUM_LEVELS))

    def forward(self, maps: list[Tensor], pixels: PixelFeatures, image: Tensor) -> IsfpImages:
        """Do the language-free work of B images once. image: float [B, 3, H, W] normalised."""
        levels = [project(level) for project, level in zip(self.project, pixels.levels, strict=True)]
        return IsfpImages(levels, F.avg_pool2d(image, REFINED_AT).to(levels[0].dtype))


class Pathway(nn.Module):
    """Join levels one after the other: bring to the next one's size, concatenate, 1x1 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.join = nn.ModuleList(convolution(2 * width, width, 1) for _ in range(NUM_LEVELS - 1))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        x = levels[0]
        for join, level in zip(self.join, levels[1:], strict=True):
            finer = level.shape[-1] > x.shape[-1]
            x = upsample_to(x, level) if finer else F.interpolate(x, size=level.shape[-2:], mode="area")
            x = join(torch.cat([x, level], dim=1))
        return x


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling (Chen et al. 2017): 1x1, dilated 3x3 convolutions and the image's mean, joined by a 1x1."""

    def __init__(self, width: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.branches = nn.ModuleList([convolution(width, width, 1), *(convolution(width, width, 3, rate) for rate in rates)])
        self.pooled = nn.Sequential(nn.Conv2d(width, width, 1), nn.LeakyReLU(SLOPE))  # one cell: nothing to normalise over
        self.join = convolution((len(rates) + 2) * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.pooled(x.mean(dim=(-2, -1), keepdim=True)).expand_as(x)
        return self.join(torch.cat([*(branch(x) for branch in self.branches), mean], dim=1))


class Identification(nn.Module):
    """Instance-specific features on the grid, their relations, and the logit of each cell."""

    def __init__(self, config: IsfpConfig) -> None:
        super().__init__()
        width = config.width
        self.side, self.coordinates = config.minimap_side, config.coordinates
        self.down = Pathway(width)
        first = convolution(width + 2 * config.coordinates, width)
        self.body = nn.Sequential(first, *(convolution(width, width) for _ in range(3)))
        self.propagation = Propagation(width, config.minimap_side, config.alpha) if config.identification == "propagation" else None
        self.convolution = None if config.identification == "propagation" else nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.LayerNorm(width)
        self.target = nn.Linear(width, 1)

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return features [E, S^2, C] and logits [E, S^2] of fused levels, coarse to fine."""
        x = F.interpolate(self.down(levels[::-1]), size=(self.side, self.side), mode="bilinear", align_corners=False)
        features = self.body(append_coordinates(x) if self.coordinates else x)
        own = features.flatten(2).transpose(1, 2)
        if self.propagation is not None:
            related = self.norm(self.propagation(own))
        else:
            assert self.convolution is not None
            related = F.leaky_relu(self.norm(self.convolution(features).flatten(2).transpose(1, 2)), SLOPE)
        state = own + related
        return state, self.target(state).squeeze(-1)


class Segmentation(nn.Module):
    """A mask logit for every cell, at the finest level's size: channel i * S + j belongs to row i, column j."""

    def __init__(self, config: IsfpConfig, masks: int) -> None:
        super().__init__()
        width = config.segmentation_width
        self.coordinates = config.coordinates
        self.up = Pathway(config.width)
        first = convolution(config.width + 2 * config.coordinates, width)
        self.body = nn.Sequential(first, *(convolution(width, width) for _ in range(3)), Pyramid(width, config.aspp_rates))
        self.masks = nn.Conv2d(width, masks, 1)

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return features [E, C', h, w] and masks [E, S^2, h, w] of fused levels, coarse to fine."""
        x = self.up(levels)
        features = self.body(append_coordinates(x) if self.coordinates else x)
        return features, self.masks(features)


class Refinement(nn.Module):
    """Add details: image and mask at stride 4, three 3x3 convolutions with doubling between, added to the enlarged mask."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = convolution(4, width), convolution(width, width)
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, image: Tensor, coarse: Tensor) -> Tensor:
        """image: float [E, 3, h, w].  coarse: float [E, h', w'].  Returns float [E, 4 h, 4 w]."""
        x = self.first(torch.cat([image, upsample_to(coarse[:, None], image)], dim=1))
        for layer in (self.second, self.last):
            x = layer(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))
        return (x + upsample_to(coarse[:, None], x))[:, 0]


class LanguagePart(nn.Module):
    """Everything that the sentence touches."""

    def __init__(self, config: IsfpConfig, inputs: DecoderInputs) -> None:
        super().__init__()
        self.config = config
        self.sentence = nn.Linear(inputs.text_width, config.width, bias=False)  # W_t
        identifies = config.identification != "none"
        self.identification = Identification(config) if identifies else None
        self.segmentation = Segmentation(config, config.minimap_side**2 if identifies else 1)
        self.refinement = Refinement(config.refinement_width) if config.refinement else None
        heads = GrexHeadsConfig(config.minimap_side, False, config.no_target, config.boxes, config.count)
        self.heads = GrexHeads(heads, config.width if identifies else config.segmentation_width, config.width)
        self.truth: Truth | None = None  # see `Isfp.given`

    def forward(self, images: IsfpImages, image_index: Tensor, text: TextFeatures) -> GroundingOutput:
        """Ground E expressions. image_index: int64 [E]."""
        sentence = self.sentence(text.tokens[:, 0])[:, :, None, None]
        levels = [level.index_select(0, image_index) * sentence for level in images.levels]
        features, masks = self.segmentation(levels)
        state, logits = (features, None) if self.identification is None else self.identification(levels)
        coarse = masks[:, 0] if logits is None else self._select(masks, logits)
        final = coarse
        if self.truth is not None and self.truth.kind == "mask":
            assert logits is not None
            final = self._true_masks(masks, logits)
        elif self.refinement is not None:
            final = self.refinement(images.image.index_select(0, image_index), coarse)
        answers, extra = self.heads(state), IsfpExtra(logits, masks, coarse)
        if logits is not None:
            side = self.config.minimap_side
            minimap, prob = torch.stack([torch.zeros_like(logits), logits], dim=-1), logits.sigmoid().unflatten(1, (side, side))
            _, no_target, boxes, scores, count, _ = answers
            answers = HeadAnswers(minimap, no_target, boxes, scores, count, prob)
        return dense_answer(final, answers, extra)

    def _select(self, masks: Tensor, logits: Tensor) -> Tensor:
        """Return the mask float [E, h, w] of the chosen cells."""
        if self.truth is not None and self.truth.kind == "location":
            return self._at_true_cells(masks)
        if self.config.selection == "argmax":
            return masks[torch.arange(len(masks), device=masks.device), logits.argmax(dim=1)]
        # identification is taught by its own loss alone, as where the likeliest cell is chosen
        return torch.minimum(masks, logits.detach()[:, :, None, None].to(masks.dtype)).amax(dim=1)

    def _at_true_cells(self, masks: Tensor) -> Tensor:
        """Return the union of the masks at the cells of the targets' centres."""
        assert self.truth is not None
        coarse = torch.full_like(masks[:, 0], -SURE)
        for e, targets in enumerate(self.truth.targets):
            if len(targets):
                coarse[e] = masks[e, cells_of_centres(self.truth.instance_masks[targets], self.config.minimap_side)].amax(dim=0)
        return coarse

    def _true_masks(self, masks: Tensor, logits: Tensor) -> Tensor:
        """Return the union of the true masks of the objects at the chosen cells, at input size; a cell away from all objects has none."""
        assert self.truth is not None
        true, side = self.truth.instance_masks, self.config.minimap_side
        owner = nearest_centres(true, side).to(logits.device)
        size = true.shape[-2:]
        final = masks.new_full((len(masks), *size), -SURE)
        for e, own in enumerate(logits):
            cells = own.argmax()[None] if self.config.selection == "argmax" else (own > 0).nonzero().flatten()
            objects = owner[cells].unique()
            objects = objects[objects >= 0]
            if len(objects):
                final[e][true[objects.to(true.device)].any(dim=0).to(final.device)] = SURE
        return final


class Isfp(nn.Module):
    """See the module's docstring."""

    reads_image = True
    oracles = ("location", "mask")  # table 3.2: the ground truth in place of a branch

    def __init__(self, config: IsfpConfig, inputs: DecoderInputs) -> None:
        super().__init__()
        for field, value, known in (
            ("identification", config.identification, IDENTIFICATIONS), ("selection", config.selection, SELECTIONS),
        ):  # fmt: skip
            if value not in known:
                raise fault(f'model.decoder.{field} is "{value}"', " or ".join(known), "choose one of them")
        self.answers_boxes = config.boxes
        self.image_part = ImagePart(config, inputs)
        self.language_part = LanguagePart(config, inputs)

    @staticmethod
    def check(model: Any) -> None:
        """Refuse a pixel decoder with a map that nothing reads.

        Raises:
            GrexError: names both settings.
        """
        if model.pixel_decoder.name != "fpn_levels":
            raise fault(
                f"model.pixel_decoder.name is {model.pixel_decoder.name} with model.decoder.name isfp",
                "fpn_levels: it reads the last three levels of the pyramid alone",
                "set model.pixel_decoder.name to fpn_levels",
            )

    @contextmanager
    def given(self, kind: str, instance_masks: Tensor, targets: list[Tensor]) -> Iterator[None]:
        """Answer within the block with the ground truth of one image in place of a branch (thesis, table 3.2).

        kind: location (the identification branch's) | mask (the segmentation branch's).  instance_masks: bool [N, H, W] at the
        input's size.  targets: of each expression that comes, int64 positions in them.
        """
        if kind not in self.oracles or self.language_part.identification is None:
            raise fault(f'the ground truth "{kind}" for isfp', f"{' or '.join(self.oracles)}, with an identification branch", "change it")
        self.language_part.truth = Truth(kind, instance_masks, targets)
        try:
            yield
        finally:
            self.language_part.truth = None
