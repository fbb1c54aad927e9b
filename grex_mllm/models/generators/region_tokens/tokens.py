"""Region tokens: selected objects as inputs of a language model.

Every object of an image is pooled once, at every scale of the feature maps, whatever the number of object sets that mention it; an object
set then only gathers rows. A token = MLP(mask-pooled features of each scale, geometry code, small picture of the mask) + type embedding
(image, target, distractor). Targets stand left to right, so the order of the selection does not matter, and next to the expression, so
that they see the distractors and a language model's short-range heads see them. The mean of the targets, with their number, is the set's
summary, for the embedding that opens the expression: every later token of a causal LM attends to that one from the first step on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.errors import fault
from grex_mllm.models.generators.region_tokens.comparison import compare
from grex_mllm.models.generators.region_tokens.ranks import Kinds, Ranked, Said, rank
from grex_mllm.ops.paths import traced
from grex_mllm.ops.recordable import among_themselves, area_pool, stable_order
from grex_mllm.ops.selection import boxes_to_masks, mask_boxes

IMAGE, DISTRACTOR, TARGET = 0, 1, 2  # also the order in the prefix
MOST_COUNTED = 7  # targets; more count as this many
NUM_FREQUENCIES = 6
GEOMETRY_WIDTH = 7 + 2 * 4 * NUM_FREQUENCIES


@dataclass
class ObjectTokens:
    """All objects of B images, ready for any number of object sets. N is the largest number of objects of an image.

    tokens: float [B, N, D].  present: bool [B, N] (False: padding, or an object without a pixel).  order: int64 [B, N], positions from
    left to right, absent ones last.  area: float [B, N], share of the image.  image: float [B, G, D].  attribute_logits: name -> float
    [B, N, classes], for the heads that there are.  attribute_probs: float [B, N, sum of classes], softmax of those, None without heads.
    queries, word_logits, words: float [B, N, W], [B, N, V], [B, N, W], see `words.py`; None without words.
    boxes: float [B, N, 4] xyxy in [0, 1].  table: float [V, W], the words' embeddings.
    kind_queries, kind_logits, same: float [B, N, W], [B, N, V], [B, N, N], see `ranks.py`; None without ranks.
    """

    tokens: Tensor
    present: Tensor
    order: Tensor
    area: Tensor
    image: Tensor
    attribute_logits: dict[str, Tensor] = field(default_factory=dict)
    attribute_probs: Tensor | None = None
    queries: Tensor | None = None
    word_logits: Tensor | None = None
    words: Tensor | None = None
    boxes: Tensor | None = None
    table: Tensor | None = None
    kind_queries: Tensor | None = None
    kind_logits: Tensor | None = None
    same: Tensor | None = None


class RegionTokens(nn.Module):
    """Pool objects from multi-scale feature maps and arrange them as a prefix for a language model.

    channels: of each feature map.  width: D of the language model.  token_scale: standard deviation of the LM's own token embeddings,
    which the tokens start with.  attribute_classes: heads and embeddings for attributes of the objects, name -> classes.  words: how many
    may be said of an object.  ranks: show which objects come first among their kind.  closer: channels of what `look` gives.
    """

    def __init__(
        self,
        channels: Sequence[int],
        width: int,
        *,
        hidden: int = 256,
        image_grid: int = 2,
        max_distractors: int = 16,
        shape_side: int = 8,
        context_layers: int = 0,
        attribute_classes: dict[str, int] | None = None,
        distractor_dropout: float = 0.0,
        token_scale: float = 1.0,
        words: int = 0,
        ranks: bool = False,
        closer: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.image_grid, self.max_distractors, self.shape_side = image_grid, max_distractors, shape_side
        self.distractor_dropout = distractor_dropout
        channels = [*channels, *closer]
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in channels)
        inputs = sum(channels) + GEOMETRY_WIDTH + shape_side**2
        self.project = nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.LayerNorm(hidden))
        self.classes = dict(attribute_classes or {})
        self.position = nn.Sequential(nn.Linear(GEOMETRY_WIDTH, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.appearance = nn.Linear(hidden, hidden)
        if self.classes:
            self.attribute_head = nn.Linear(hidden, sum(self.classes.values()))
            self.attribute_embedding = nn.Linear(sum(self.classes.values()), hidden, bias=False)
            self.rivals = nn.Linear(3, hidden, bias=False)
            self.shared = nn.Linear(len(self.classes) + 1, hidden, bias=False)
            nn.init.zeros_(self.appearance.weight)  # the attributes say most; what they leave out is learned on top
            nn.init.zeros_(self.appearance.bias)
        self.word_query = nn.Linear(hidden, width) if words else None
        self.word_norm = nn.LayerNorm(width) if words else None
        self.kinds = Kinds(sum(channels), hidden, width, words) if ranks else None
        self.ranked = Ranked(hidden, width) if ranks else None
        self.norm = nn.LayerNorm(hidden)
        self.kind = nn.Embedding(3, hidden)
        self.count = nn.Embedding(MOST_COUNTED + 1, hidden)
        for table in (self.kind, self.count):  # else they would drown what is seen of the objects
            nn.init.normal_(table.weight, std=0.3)
        heads = next(h for h in (8, 4, 2, 1) if hidden % h == 0)
        self.context = nn.ModuleList(
            nn.TransformerEncoderLayer(hidden, heads, 2 * hidden, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(context_layers)
        )
        self.to_lm = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, width), nn.LayerNorm(width))
        self.summary_to_lm = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, width), nn.LayerNorm(width))
        self.set_token_scale(token_scale)

    def forward(
        self,
        features: list[Tensor],
        instance_masks: list[Tensor],
        valid_sizes: Tensor | None = None,
        instance_boxes_norm: list[Tensor] | None = None,
        look: Callable[[list[Tensor], Tensor], list[Tensor]] | None = None,
    ) -> ObjectTokens:
        """Pool every object of B images.

        features: float [B, C_i, h_i, w_i].  instance_masks: B x bool [N_b, H, W] on the network input.  valid_sizes: int64 [B, 2], height
        and width without padding (None: all of it).  instance_boxes_norm: B x float [N_b, 4] cxcywh, drawn where a mask is empty.
        look: from the masks and boxes [B, N, 4] xyxy in pixels to more of what is seen of every object, float [B, N, C_i] (`Crops`).

        Raises:
            GrexError: masks that do not fit the feature maps or each other.
        """
        masks = [m.bool() for m in instance_masks]
        height, width = check_masks(masks, features)
        if instance_boxes_norm is not None:
            masks = [_fill_empty(m, boxes) for m, boxes in zip(masks, instance_boxes_norm)]
        weight, device = self.kind.weight.dtype, features[0].device
        dtype = torch.promote_types(weight, torch.float32)  # bfloat16 weights must not round positions and areas
        if valid_sizes is None:
            valid_sizes = torch.tensor([[height, width]], device=device).expand(len(masks), 2)
        num = max(1, max(m.shape[0] for m in masks))
        boxes, area, present, shape = self.describe_masks(masks, num, dtype)
        weights = _downsample(masks, num, max(((f.shape[-2], f.shape[-1]) for f in features), key=math.prod), dtype)
        pooled = []
        for feature, norm in zip(features, self.norms):
            level = area_pool(weights, (feature.shape[-2], feature.shape[-1])).flatten(2)
            level = level / level.sum(-1, keepdim=True).clamp(min=1e-12)
            values = torch.bmm(level.to(feature.dtype), feature.flatten(2).transpose(1, 2))
            pooled.append(norm(values.to(weight)))
        if look is not None:
            pooled += [norm(v.to(weight)) for v, norm in zip(look(masks, boxes), self.norms[len(features) :], strict=True)]
        limits = valid_sizes.to(dtype).flip(-1).repeat(1, 2)[:, None]  # [B, 1, 4] width, height, width, height
        share = area / limits[..., :2].prod(-1)
        geometry = geometry_code(boxes / limits, share)
        seen = self.project(torch.cat([*pooled, geometry.to(weight), shape.to(weight)], -1))
        token, attribute_logits, probs = self.position(geometry.to(weight)) + self.appearance(seen), {}, None
        if self.classes:
            sizes = list(self.classes.values())
            attribute_logits = dict(zip(self.classes, self.attribute_head(seen).split(sizes, -1), strict=True))
            probs = torch.cat([logits.softmax(-1) for logits in attribute_logits.values()], -1)
            token = token + self.attribute_embedding(probs)
        order = left_to_right(boxes, area, present)
        image = self._image_tokens(features, valid_sizes.to(dtype), (height, width))
        queries = None if self.word_query is None else self.word_query(seen)
        kinds = None if self.kinds is None else self.kinds.query(torch.cat(pooled, -1))
        return ObjectTokens(
            self.norm(token), present, order, share, image, attribute_logits, probs, queries, boxes=boxes / limits, kind_queries=kinds
        )

    def select(
        self, objects: ObjectTokens, image_index: Tensor, member: Tensor, beside: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Said | None]:
        """Return the prefix of E object sets: tokens [E, G + P, D], their mask (bool), the sets' summaries [E, D], and words with ranks.

        Order: image tokens, distractors left to right, targets left to right, padding. member: bool [E, N], the targets of each set among
        its image's objects.  beside: bool [E, N], the objects that may stand beside them (None: all others).
        """
        order = objects.order[image_index]
        target = member.gather(1, order)
        other = objects.present[image_index] if beside is None else objects.present[image_index] & beside
        other = other.gather(1, order) & ~target
        area = objects.area[image_index].gather(1, order).masked_fill(~other, -1.0)
        largest = stable_order(stable_order(area, descending=True))
        if self.training and self.distractor_dropout > 0:
            other = other & (torch.rand(len(other), 1) >= self.distractor_dropout).to(other.device)
        every, other = other, other & (largest < self.max_distractors)
        kind = torch.where(target, TARGET, torch.where(other, DISTRACTOR, TARGET + 1))
        place = stable_order(kind)
        if not traced():  # a recorded prefix keeps its padding, which is masked: the length of this one would become a constant
            place = place[:, : int((kind <= TARGET).sum(1).max())]
        kind, source = kind.gather(1, place), order.gather(1, place)
        tokens = objects.tokens[image_index[:, None], source] + self.kind(kind.clamp(max=TARGET))
        among_others: Tensor | float = 0.0
        if objects.attribute_probs is not None:
            rivalry, sharing = compare(
                objects.attribute_probs, list(self.classes.values()), image_index, member, other.scatter(1, order, other)
            )
            tokens = tokens + self.rivals(rivalry.to(tokens.dtype)).gather(1, source[..., None].expand_as(tokens))
            among_others = self.shared(sharing.to(tokens.dtype))
        each = None
        if self.ranked is not None:
            assert objects.same is not None and objects.boxes is not None
            counts, of_set = rank(objects.same, objects.boxes, objects.area, image_index, member, every.scatter(1, order, every))
            each = self.ranked.objects(counts.to(tokens.dtype))
            tokens = tokens + each.gather(1, source[..., None].expand_as(tokens))
            among_others = among_others + self.ranked.sets(of_set.to(tokens.dtype))
        image = objects.image[image_index] + self.kind.weight[IMAGE]
        tokens = torch.cat([image.to(tokens.dtype), tokens], 1)
        mask = torch.cat([kind.new_ones(image.shape[:2], dtype=torch.bool), kind <= TARGET], 1)
        for layer in self.context:
            assert isinstance(layer, nn.TransformerEncoderLayer)
            tokens = among_themselves(layer, tokens, mask)
        selected = (kind == TARGET).to(tokens.dtype)[..., None]
        number = selected.sum(1)
        mean = (tokens[:, image.shape[1] :] * selected).sum(1) / number.clamp(min=1)
        gathered = mean + self.count(number[:, 0].long().clamp(max=MOST_COUNTED)) + among_others
        summary, placed, said = self.summary_to_lm(gathered), self.to_lm(tokens), None
        if objects.words is not None and self.word_norm is not None:
            words = objects.words[image_index[:, None], source]
            if self.ranked is not None and each is not None:
                said = self.ranked.say(objects, image_index, each, gathered)
                words = said.words.gather(1, source[..., None].expand(*source.shape, said.words.shape[-1]))
                summary = summary + self.word_norm(said.of_set.to(placed.dtype))
            words = self.word_norm(words.to(placed.dtype))
            summary = summary + self.word_norm((words * selected).sum(1) / number.clamp(min=1))
            placed = placed + F.pad(words, (0, 0, image.shape[1], 0))
        return placed * mask[..., None], mask, summary, said

    @torch.no_grad()
    def set_token_scale(self, token_scale: float) -> None:
        """Give the tokens and summaries this standard deviation."""
        for norm in (self.to_lm[-1], self.summary_to_lm[-1], *([] if self.word_norm is None else [self.word_norm])):
            assert isinstance(norm, nn.LayerNorm)
            norm.weight.fill_(token_scale)

    def describe_masks(self, masks: list[Tensor], num: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes xyxy [B, N, 4] in pixels, areas [B, N] in pixels, present [B, N], flattened small pictures [B, N, S * S]."""
        boxes, area, pictures = [], [], []
        for mask in masks:
            found = mask_boxes(mask).to(dtype)
            boxes.append(found)
            area.append(mask.sum((1, 2)).to(dtype))
            rows = interval_weights(found[:, 1], found[:, 3], self.shape_side, mask.shape[1])
            columns = interval_weights(found[:, 0], found[:, 2], self.shape_side, mask.shape[2])
            with torch.autocast(mask.device.type, enabled=False):
                pictures.append(torch.bmm(torch.bmm(rows, mask.to(dtype)), columns.transpose(1, 2)).flatten(1))
        areas = _together(area, num)
        return _together(boxes, num), areas, areas > 0, _together(pictures, num)

    def _image_tokens(self, features: list[Tensor], valid_sizes: Tensor, size: tuple[int, int]) -> Tensor:
        """Pool the unpadded part of the image over a grid: [B, G, hidden]."""
        grid, weight = self.image_grid, self.kind.weight.dtype
        num_images = len(valid_sizes)
        if grid == 0:
            return valid_sizes.new_zeros(num_images, 0, self.kind.embedding_dim, dtype=weight)
        pooled = []
        zero = valid_sizes.new_zeros(num_images)
        for feature, norm in zip(features, self.norms):
            cells = feature.shape[-2:]
            rows = interval_weights(zero, valid_sizes[:, 0] * cells[0] / size[0], grid, cells[0]).to(feature.dtype)
            columns = interval_weights(zero, valid_sizes[:, 1] * cells[1] / size[1], grid, cells[1]).to(feature.dtype)
            values = torch.einsum("bgh,bchw,bkw->bgkc", rows, feature, columns)
            pooled.append(norm(values.flatten(1, 2).to(weight)))
        step = torch.arange(grid, device=valid_sizes.device, dtype=valid_sizes.dtype) / grid
        top, left = torch.meshgrid(step, step, indexing="ij")
        boxes = torch.stack([left, top, left + 1 / grid, top + 1 / grid], -1).flatten(0, 1).expand(num_images, -1, 4)
        geometry = geometry_code(boxes, torch.full_like(boxes[..., 0], 1 / grid**2))
        shape = boxes.new_ones(num_images, grid**2, self.shape_side**2)
        cell = pooled[0].shape[:-1]  # has no crop
        closer = [norm.normalized_shape[0] for norm in self.norms[len(features) :] if isinstance(norm, nn.LayerNorm)]
        pooled += [pooled[0].new_zeros(*cell, width) for width in closer]
        return self.project(torch.cat([*pooled, geometry.to(weight), shape.to(weight)], -1))


def geometry_code(boxes_xyxy_norm: Tensor, area: Tensor) -> Tensor:
    """Return [..., GEOMETRY_WIDTH]: cxcywh, area, log aspect ratio, share of the box that is filled, and sine/cosine of the corners.

    boxes_xyxy_norm: float [..., 4] in [0, 1].  area: float [...] as a share of the image.
    """
    x1, y1, x2, y2 = boxes_xyxy_norm.unbind(-1)
    w, h = (x2 - x1).clamp(min=1e-6), (y2 - y1).clamp(min=1e-6)
    plain = torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, w, h, area.sqrt(), (w / h).log(), area / (w * h)], -1)
    frequency = math.pi * 2.0 ** torch.arange(NUM_FREQUENCIES, device=area.device, dtype=area.dtype)
    angle = (boxes_xyxy_norm[..., None] * frequency).flatten(-2)
    return torch.cat([plain, angle.sin(), angle.cos()], -1)


def interval_weights(start: Tensor, stop: Tensor, parts: int, cells: int) -> Tensor:
    """Return averaging weights [N, parts, cells] that sum to 1: how much of cell [i, i + 1] lies in each equal part of [start, stop]."""
    step = (stop - start)[:, None] / parts
    low = start[:, None] + step * torch.arange(parts, device=start.device, dtype=start.dtype)
    cell = torch.arange(cells, device=start.device, dtype=start.dtype)
    overlap = (torch.minimum((low + step)[..., None], cell + 1) - torch.maximum(low[..., None], cell)).clamp(min=0)
    return overlap / overlap.sum(-1, keepdim=True).clamp(min=1e-12)


def check_masks(masks: list[Tensor], features: list[Tensor]) -> tuple[int, int]:
    """Return (H, W) of instance masks [N_b, H, W] after checking that they belong to these feature maps.

    Raises:
        GrexError: another number of images, masks of several sizes, or a size that no stride leads to the feature maps' size.
    """
    if len(masks) != len(features[0]):
        raise fault(
            f"masks of {len(masks)} images", f"of {len(features[0])}, as the feature maps have", "pass one tensor of masks an image"
        )
    sizes = {tuple(m.shape[1:]) for m in masks if m.ndim == 3}
    if len(sizes) != 1 or any(m.ndim != 3 for m in masks):
        raise fault(
            f"instance masks of shapes {[tuple(m.shape) for m in masks]}", "[N, H, W] with one H, W", "pad all to the network input"
        )
    height, width = sizes.pop()
    for feature in features:
        h, w = feature.shape[-2:]
        stride = height / h
        if abs(width / stride - w) > 1 + w * 0.02 or height < h or width < w:
            raise fault(
                f"instance masks of {height}x{width} with feature maps of {h}x{w}",
                "one stride for height and width",
                "draw masks at the network input's size",
            )
    return height, width


def _fill_empty(masks: Tensor, boxes_norm: Tensor) -> Tensor:
    """Draw the box of every object whose mask has no pixel (box-only data, or an object lost in resizing)."""
    empty = ~masks.flatten(1).any(1)
    if not bool(empty.any()):
        return masks
    height, width = masks.shape[1:]
    cx, cy, w, h = boxes_norm[empty].double().unbind(1)
    scale = boxes_norm.new_tensor([width, height, width, height], dtype=torch.float64)
    filled = masks.clone()
    filled[empty] = boxes_to_masks(torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 1) * scale, height, width)
    return filled


def _downsample(masks: list[Tensor], num: int, cells: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return [B, N, h, w]: the covered share of every cell. Area-weighted, so an object smaller than a cell keeps a weight above zero."""
    return _together([area_pool(mask.to(dtype)[None], cells)[0] for mask in masks], num)


def _together(parts: list[Tensor], num: int) -> Tensor:
    """Return [B, num, ...] of B tensors [N_b, ...], filled up with zeros."""
    if len(parts) == 1 and parts[0].shape[0] == num:  # one image, also one that is recorded: the number of its objects may vary
        return parts[0][None]
    return torch.stack([F.pad(part, (0, 0) * (part.dim() - 1) + (0, num - part.shape[0])) for part in parts])


def left_to_right(boxes: Tensor, area: Tensor, present: Tensor) -> Tensor:
    """Return int64 [B, N]: objects by centre x, then centre y, then area; absent ones last."""
    order = stable_order(area)
    for key in (boxes[..., 1] + boxes[..., 3], (boxes[..., 0] + boxes[..., 2]).masked_fill(~present, math.inf)):
        order = order.gather(1, stable_order(key.gather(1, order)))
    return order
