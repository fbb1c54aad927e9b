"""What is kept of an image, at most 20,000 bytes, and how an expression is scored against many images at once.

A decoder says what that is: `compact(image features)` returns it as tensors, `restore` makes image features of them from which its language
part answers everything but masks. Image encoders that read the expression have nothing to keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as tree

from grex_mllm.data.transforms import resize_image
from grex_mllm.errors import fault
from grex_mllm.models.answer import above_threshold
from grex_mllm.models.grex import GrexModel, check_expression
from grex_mllm.types import NUM_COUNTS, GroundingOutput, TextFeatures

MAX_ROW_BYTES = 20_000
PAIRS_AT_ONCE = 512  # of an image and an expression
WIDTHS = {"float32": 4, "float16": 2, "int8": 1}
MAX_INT8 = 127
# power of how sure the answer is of its number and of each region; chosen on drawn scenes of the split val
SURENESS = 0.25


@dataclass(frozen=True)
class Part:
    """A tensor of a row: name, shape of one image's, and how it is kept: float32, float16, or int8 with a float16 scale for each vector."""

    name: str
    shape: tuple[int, ...]
    kept: str

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * WIDTHS[self.kept] + (prod(self.shape[:-1]) * WIDTHS["float16"] if self.kept == "int8" else 0)


@dataclass
class Scores:
    """Answers for E expressions about B images, float32 or bool [E, B].

    score: how sure the model is of a whole answer that has a target, see `_probabilities`.  no_target_prob: 0 where the model has no such
    head.  region_score: probability of the best region.
    """

    score: np.ndarray
    no_target_prob: np.ndarray
    region_score: np.ndarray
    no_target: np.ndarray


def check_model(model: GrexModel) -> None:
    """Refuse a model of which nothing can be kept.

    Raises:
        GrexError: an image encoder that reads the expression, a decoder without a compact form, or answers by pixels alone.
    """
    config, decoder = model.config.model, model.grounding.decoder
    if model.grounding.fuses_language:
        given = f"a model whose image encoder reads the expression (model.vision.fusion: {config.vision.fusion})"
        raise fault(given, "one without fusion: every image would be encoded anew for every expression", "train it with fusion: none")
    if not (hasattr(decoder, "compact") and hasattr(decoder, "restore")):
        size = f"its language part reads {language_free_numbers(model):,} numbers of each image, a byte each at the least"
        given = f"model.decoder.name {config.decoder.name}, which has no compact form of an image (compact, restore): {size}"
        raise fault(given, f"one that keeps an image in {MAX_ROW_BYTES:,} bytes", "take a model whose decoder has one, or grex predict")


def layout_of(model: GrexModel) -> tuple[Part, ...]:
    """Return how a row is made up; all images have the same. Half precision becomes int8 where the row would be too long.

    Raises:
        GrexError: too long all the same.
    """
    check_model(model)
    side = model.config.data.image_size
    kept = compact(model, [np.zeros((side, side, 3), np.uint8)])
    for half in ("float16", "int8"):
        named = {torch.float32: "float32", torch.float16: half}
        parts = tuple(Part(name, tuple(tensor.shape[1:]), named[tensor.dtype]) for name, tensor in kept.items())
        if row_bytes(parts) <= MAX_ROW_BYTES:
            return parts
    raise fault(f"{row_bytes(parts):,} bytes an image", f"at most {MAX_ROW_BYTES:,}", "take a model of fewer or narrower regions")


@torch.inference_mode()
def language_free_numbers(model: GrexModel) -> int:
    """Return how many numbers the language part of a model without language fusion reads of one image."""
    side = model.config.data.image_size
    features = model.grounding.encode_image(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=model.device))
    return sum(leaf.numel() for leaf in tree.tree_leaves(features.decoded) if isinstance(leaf, Tensor))


def row_bytes(parts: Sequence[Part]) -> int:
    """Return the length of a row."""
    return sum(part.num_bytes for part in parts)


@torch.inference_mode()
def compact(model: GrexModel, images: Sequence[np.ndarray]) -> dict[str, Tensor]:
    """Return what is kept of B images uint8 [H, W, 3], float16 or float32 [B, ...]."""
    config = model.config.data
    resized = [resize_image(image, config.image_size, config.resize) for image in images]
    pixels = torch.stack([torch.from_numpy(image.copy()).permute(2, 0, 1) for image, _ in resized]).to(model.device)
    features = model.grounding.encode_image(pixels, [geometry.seen_size for _, geometry in resized])
    return model.grounding.decoder.compact(features.decoded)


def to_rows(kept: dict[str, Tensor], parts: Sequence[Part]) -> np.ndarray:
    """Return uint8 [B, row_bytes].

    Raises:
        GrexError: numbers that are not finite.
    """
    pieces = []
    for part in parts:
        values = kept[part.name].cpu()
        if not torch.isfinite(values).all():
            raise fault(f"{part.name} of an image that is not finite in half precision", "numbers below 65,504", "check the model")
        if part.kept == "int8":
            scale = (values.float().abs().amax(dim=-1, keepdim=True) / MAX_INT8).clamp(min=1e-7).half()
            pieces.append(_bytes((values.float() / scale.float()).round().clamp(-MAX_INT8, MAX_INT8).to(torch.int8)))
            values = scale
        pieces.append(_bytes(values))
    return np.concatenate(pieces, axis=1)


def from_rows(rows: np.ndarray, parts: Sequence[Part]) -> dict[str, Tensor]:
    """Return what `to_rows` kept of B images."""
    kept, place = {}, 0

    def take(shape: tuple[int, ...], kind: str) -> Tensor:
        nonlocal place
        length = prod(shape) * WIDTHS[kind]
        piece = np.ascontiguousarray(rows[:, place : place + length]).view(kind)
        place += length
        return torch.from_numpy(piece.reshape(len(rows), *shape))

    for part in parts:
        values = take(part.shape, part.kept)
        kept[part.name] = values.float() * take((*part.shape[:-1], 1), "float16").float() if part.kept == "int8" else values
    return kept


@torch.inference_mode()
def encode_expressions(model: GrexModel, expressions: Sequence[str]) -> TextFeatures:
    """Return the text features of E expressions.

    Raises:
        GrexError: no expression, or one that no model answers.
    """
    if not expressions:
        raise fault("no expression", "at least one", "write what to look for")
    for expression in expressions:
        check_expression(expression)
    ids, mask = model.encode_text(list(expressions))
    return model.grounding.encode_text(ids.to(model.device), mask.to(model.device))


@torch.inference_mode()
def score_images(model: GrexModel, text: TextFeatures, kept: dict[str, Tensor]) -> Scores:
    """Score E expressions against B images, all with all. kept: what `from_rows` gave."""
    regions = model.grounding.decoder.restore({name: tensor.to(model.device) for name, tensor in kept.items()})
    num_images, num_expressions = len(next(iter(kept.values()))), len(text.tokens)
    at_once = max(1, PAIRS_AT_ONCE // num_images)
    found: list[tuple[Tensor, ...]] = []
    for start in range(0, num_expressions, at_once):
        some = slice(start, start + at_once)
        tokens, mask = (t[some].repeat_interleave(num_images, dim=0) for t in text)
        index = torch.arange(num_images, device=model.device).repeat(len(text.tokens[some]))
        output = model.grounding.decoder.language_part(regions, index, TextFeatures(tokens, mask))
        found.append(_probabilities(output, model.config.predict.no_target_threshold))
    columns = [torch.cat(values).unflatten(0, (num_expressions, num_images)).cpu().numpy() for values in zip(*found, strict=True)]
    return Scores(*columns)


def in_batches(number: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` that cover range(number)."""
    for start in range(0, number, size):
        yield slice(start, min(start + size, number))


def _probabilities(output: GroundingOutput, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return score, no_target_prob, region_score and no_target of pairs. Products are of logarithms, so that small ones stay apart.

    The score is the probability that there is a target, times that of the best region, times, to the power SURENESS, that of the number of
    chosen regions and of every region's being chosen or not. A model trained on expressions that fit hesitates where one fits nearly: at
    "the four circles" before five.
    """
    if output.box_logits is not None:
        regions = output.box_logits.float()
    elif output.minimap_logits is not None:
        regions = (output.minimap_logits[..., 1] - output.minimap_logits[..., 0]).float()
    else:
        regions = torch.full((len(output.mask_logits), 1), torch.inf)
    best, logit = regions.amax(dim=-1), output.no_target_logits
    sure = F.logsigmoid(regions.abs()).sum(dim=-1)
    if output.count_logits is not None:
        number = (regions > 0).sum(dim=-1, keepdim=True).clamp(max=NUM_COUNTS - 1)
        sure = sure + output.count_logits.float().log_softmax(dim=-1).gather(1, number).squeeze(1)
    score = F.logsigmoid(best) + SURENESS * sure
    if logit is None:
        return score.exp(), torch.zeros_like(best), best.sigmoid(), best <= 0
    there = (logit[:, 0] - logit[:, 1]).float()
    return (score + F.logsigmoid(there)).exp(), torch.sigmoid(-there), best.sigmoid(), above_threshold(logit, threshold)


def _bytes(values: Tensor) -> Any:
    return values.contiguous().flatten(1).numpy().view(np.uint8)
