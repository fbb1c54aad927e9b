"""What comes before and after a model, as graphs: the network's input of a picture, and the decision at the picture's own size.

A place is int64 [5, 2], height and width each: of the original picture, of what the resized one takes of the network's input, of the margin
before it (`grex_mllm.types.Geometry`), and of that input without and with its padding. The rules of `predict` become constants.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from grex_mllm.config import PredictConfig
from grex_mllm.data.transforms import GREY, fit
from grex_mllm.export.graphs import IMAGE, SEEN, Graph, names_of
from grex_mllm.models.answer import above_threshold
from grex_mllm.models.grounding import GroundingModel
from grex_mllm.ops.boxes import cxcywh_to_xyxy
from grex_mllm.ops.recordable import stable_order
from grex_mllm.types import MORE_THAN_FIVE, Geometry, GroundingOutput

PREPARE, DECIDE = "prepare", "decide"
EXAMPLE = (50, 70)  # height and width of a picture that graphs are recorded with
PICTURE, ORIGINAL, SIZE, PLACE = "picture", "original", "size", "place"
MASK, NO_TARGET, NO_TARGET_PROB, COUNT, BOXES, SCORES = DECISIONS = (
    "mask",
    "no_target",
    "no_target_prob",
    "count",
    "boxes_xyxy",
    "box_scores",
)


class PrepareGraph(nn.Module):
    """A resized picture uint8 [h, w, 3], the (width, height) int64 [2] that it had, and the side int64 [] of the network's input ->
    normalised and padded image float32 [1, 3, H, W], place, and height and width int64 [1, 2] of what is seen without padding."""

    mean: Tensor
    std: Tensor

    def __init__(self, grounding: GroundingModel, resize: str) -> None:
        super().__init__()
        self.resize, self.stride = resize, int(max(grounding.vision.strides))
        self.register_buffer("mean", grounding.pixel_mean.flatten())
        self.register_buffer("std", grounding.pixel_std.flatten())

    def forward(self, picture: Tensor, original: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        resized = torch.stack([torch.ones_like(line, dtype=torch.int64).sum() for line in (picture[:, 0, 0], picture[0, :, 0])])
        centred = self.resize == "letterbox"
        margin = torch.div(size - resized, 2, rounding_mode="floor") if centred else torch.zeros_like(resized)
        canvas = torch.div(size + self.stride - 1, self.stride, rounding_mode="floor") * self.stride
        pixel = _upto(canvas)[:, None] - margin
        inside = (pixel >= 0) & (pixel < resized)
        rows, columns = torch.minimum(pixel.clamp(min=0), resized - 1).unbind(1)
        within = _upto(canvas) < size
        around = torch.where((within[:, None] & within)[..., None], float(GREY), self.mean) if centred else self.mean  # the mean becomes 0
        pixels = torch.where((inside[:, :1] & inside[:, 1])[..., None], picture[rows][:, columns].float(), around)
        place = torch.stack([original.flip(0), resized, margin, size.expand(2), canvas.expand(2)])
        seen = resized if self.resize == "pad" else size.expand(2)
        return ((pixels - self.mean) / self.std).permute(2, 0, 1)[None], place, seen[None]


class DecisionGraph(nn.Module):
    """A place and a model's answers to one expression -> what `GrexModel.ground` says of it.

    names: of the answers that the model has, [1, ...] as in `GroundingOutput`.  `reads` are those that the rules need: the inputs behind
    the place, in this order.  `makes` are the outputs: mask bool [H0, W0], no_target bool [], no_target_prob float64 [] and, where the
    model has the heads, count int64 [], boxes_xyxy float32 [n, 4] and box_scores float32 [n], best first.
    """

    def __init__(self, names: list[str], rules: PredictConfig) -> None:
        super().__init__()
        self.rules = rules
        self.by_pixels = rules.no_target == "pixels" or ("no_target_logits" not in names and rules.masks)
        unread = [*([] if rules.masks else ["mask_logits"]), *(["no_target_logits"] if self.by_pixels else [])]
        self.reads = [name for name in names if name not in unread]
        boxes, counts = "boxes_norm" in names, "boxes_norm" in names or "count_logits" in names
        self.makes = [MASK, NO_TARGET, NO_TARGET_PROB, *([COUNT] if counts else []), *([BOXES, SCORES] if boxes else [])]

    def forward(self, place: Tensor, *answers: Tensor) -> tuple[Tensor, ...]:
        given, rules = {name: answer[0] for name, answer in zip(self.reads, answers, strict=True)}, self.rules
        if rules.masks:
            logits = given["mask_logits"].float()
            shift = math.log(rules.mask_threshold) - math.log1p(-rules.mask_threshold)
            mask = at_image(logits[1] - logits[0] - shift, place) > 0
        else:
            mask = torch.zeros_like(_upto(place[0, 0])[:, None] + _upto(place[0, 1]), dtype=torch.bool)
        no_target, probability = self._no_target(given, mask)
        made = {NO_TARGET_PROB: probability, **self._boxes(given, place, no_target)}
        return tuple(({MASK: mask & ~no_target, NO_TARGET: no_target} | made)[name] for name in self.makes)

    def _no_target(self, given: dict[str, Tensor], mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether there is no target, bool [], and its probability, float64 []."""
        pixels = mask.long().sum()
        if self.by_pixels:
            says = pixels < self.rules.min_mask_pixels
            probability = says.double()
        elif "no_target_logits" in given:
            logits = given["no_target_logits"].float()
            probability = logits.softmax(-1)[1].double()
            says = above_threshold(logits[None], self.rules.no_target_threshold)[0]
        else:
            says, probability = pixels < 0, pixels.double()  # without masks there are no pixels: False and 0
        return (says | (pixels == 0)) if self.rules.masks else says, probability

    def _boxes(self, given: dict[str, Tensor], place: Tensor, no_target: Tensor) -> dict[str, Tensor]:
        """Return the count, the boxes and their scores, as far as the model has heads for them."""
        counted = given["count_logits"].argmax() if "count_logits" in given else None
        if "boxes_norm" not in given:
            return {} if counted is None else {COUNT: counted.masked_fill(no_target, 0)}
        scores = given["box_logits"].double().sigmoid().float()
        order = stable_order(scores, descending=True)
        above = (scores >= self.rules.box_threshold).long().sum()
        count = above.clamp(max=MORE_THAN_FIVE) if counted is None else counted
        best = torch.where(count >= MORE_THAN_FIVE, above.clamp(min=MORE_THAN_FIVE), count)
        keep = {"count": best, "threshold": above, "both": torch.minimum(best, above)}[self.rules.boxes].masked_fill(no_target, 0)
        order = order[torch.cumsum(torch.ones_like(order), 0) <= keep]
        original, resized, margin, _, canvas = place.double().flip(-1).repeat(1, 2)  # x, y, x, y
        scale = resized / original
        boxes = cxcywh_to_xyxy(given["boxes_norm"].float()[order]) * (canvas / scale).float() - (margin / scale).float()
        boxes = torch.minimum(boxes.clamp(min=0), original.float())
        return {COUNT: count.masked_fill(no_target, 0), BOXES: boxes, SCORES: scores[order]}


class AtImageGraph(nn.Module):
    """Logits float [h, w] over the network's input, and a place -> the mask bool [H0, W0] where they exceed 0."""

    def forward(self, logits: Tensor, place: Tensor) -> Tensor:
        return at_image(logits, place) > 0


class AtInputGraph(nn.Module):
    """A mask bool [H0, W0] and a place -> the mask bool [S, S] on the network's input, by nearest neighbour; one that vanishes there keeps
    the pixel nearest to its middle (`grex_mllm.data.transforms.input_masks`)."""

    def forward(self, mask: Tensor, place: Tensor) -> Tensor:
        sources, insides, middles = [], [], []
        for axis in range(2):
            original, resized, margin, size, _ = place[:, axis].split(1)
            pixel = _upto(size[0]) - margin
            insides.append((pixel >= 0) & (pixel < resized))
            source = ((pixel.double() + 0.5) * original.double() / resized.double()).floor().long()
            sources.append(torch.minimum(source.clamp(min=0), original - 1))
            median = self._median(mask.long().sum(1 - axis))
            middles.append(pixel == torch.minimum((median * (resized.double() / original.double())).floor().long(), resized - 1))
        small = mask[sources[0]][:, sources[1]] & insides[0][:, None] & insides[1]
        return small | (middles[0][:, None] & middles[1] & (small.long().sum() == 0))

    @staticmethod
    def _median(counts: Tensor) -> Tensor:
        """Return the median, rounded down and float64 [1], of positions that occur so often."""
        upto, number = counts.cumsum(0), counts.sum(0, keepdim=True).double()
        low, high = ((upto < half + 1).double().sum(0, keepdim=True) for half in (((number - 1) / 2).floor(), (number / 2).floor()))
        return ((low + high) / 2).floor()


def at_image(values: Tensor, place: Tensor) -> Tensor:
    """Resample values [h, w] over the network's input to [H0, W0], bilinear: `grex_mllm.data.transforms.values_to_original`."""
    low, high, share = _cells(place[:, 0], values.shape[0])
    values = values[low] * (1 - share)[:, None] + values[high] * share[:, None]
    low, high, share = _cells(place[:, 1], values.shape[1])
    return values[:, low] * (1 - share) + values[:, high] * share


def _cells(place: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each pixel of the original its two neighbouring cells and the share of the second. place: int64 [5], of one axis.

    All numbers are tensors [1]: the recorder takes what is computed from tensors without a dimension for float32.
    """
    original, resized, margin, _, canvas = place.double().split(1)
    first = (margin * number / canvas).floor()
    last = (((margin + resized) * number / canvas).ceil() - 1).clamp(min=0)
    where = (_upto(place[0]).double() + 0.5) * (resized / original * number / canvas) - 0.5
    where = torch.minimum(torch.maximum(where + margin * number / canvas, first), last)
    low = where.floor()
    return low.long(), torch.minimum(low + 1, last).long(), (where - low).float()


def _upto(number: Tensor) -> Tensor:
    """Return int64 [number]: 0, 1, ... The number is a tensor, so that a recording has it open."""
    return torch.arange(number)  # type: ignore[call-overload, no-any-return]


def place_of(geometry: Geometry, size: int, canvas: tuple[int, int]) -> Tensor:
    """Return the place int64 [5, 2] of a picture in a network input of this side, canvas with its padding."""
    inner, margin = (geometry.input_height, geometry.input_width), (geometry.top, geometry.left)
    return torch.tensor([(geometry.height, geometry.width), inner, margin, (size, size), canvas])


def prepare_graph(model: Any) -> Graph:
    """Return `PrepareGraph` of a `GrexModel`, to be recorded."""
    size, resize = model.config.data.image_size, model.config.data.resize
    geometry = fit(*EXAMPLE, size, resize)
    picture = torch.full((geometry.input_height, geometry.input_width, 3), GREY, dtype=torch.uint8)
    example = (picture, torch.tensor(EXAMPLE[::-1]), torch.tensor(size))
    return PREPARE, PrepareGraph(model.grounding, resize).eval(), example, [PICTURE, ORIGINAL, SIZE], [IMAGE, PLACE, SEEN]


def decide_graph(model: Any, image: Tensor, said: GroundingOutput) -> Graph:
    """Return `DecisionGraph` of a `GrexModel`, to be recorded. image: normalised [1, 3, H, W].  said: the answers about it."""
    decide = DecisionGraph(names_of(said), model.config.predict).eval()
    example = (example_place(model, image), *(getattr(said, name)[:1] for name in decide.reads))
    return DECIDE, decide, example, [PLACE, *decide.reads], decide.makes


def example_place(model: Any, image: Tensor) -> Tensor:
    """Return the place of a picture in a normalised image [1, 3, H, W]."""
    size = model.config.data.image_size
    return place_of(fit(*EXAMPLE, size, model.config.data.resize), size, (int(image.shape[-2]), int(image.shape[-1])))


def rules_facts(rules: PredictConfig) -> dict[str, Any]:
    """Return the rules that became constants of the graph, by name."""
    decides = ("masks", "mask_threshold", "boxes", "box_threshold", "no_target", "no_target_threshold", "min_mask_pixels")
    return {name: getattr(rules, name) for name in decides}
