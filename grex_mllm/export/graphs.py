"""The grounding model as graphs of plain tensors: an image part once per image and a language part for its expressions, or one for both.

Flattened, the features of an image are a list of tensors, whatever tuples a decoder puts them in; all else in them is a constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as tree

from grex_mllm.errors import fault
from grex_mllm.models.grounding import GroundingModel, ImageFeatures
from grex_mllm.types import GroundingOutput

ANSWERS = ("mask_logits", "no_target_logits", "boxes_norm", "box_logits", "count_logits")
IS_TENSOR = object()  # in a list of leaves: a tensor stands here
IMAGE, TEXT_IDS, TEXT_MASK = "image", "text_ids", "text_mask"
MASKS, CHOSEN, SEEN = "masks", "chosen", "seen"  # of a generator: objects, sets of them, the size of the image without padding
Graph = tuple[str, nn.Module, tuple[Tensor, ...], list[str], list[str]]  # name, module, example, inputs, outputs


class ImageGraph(nn.Module):
    """One normalised image float [1, 3, H, W] -> the tensors of its features, or the `kept` ones among them. The first call
    sets `rest`: while it is recorded, torch gives sizes as tensors, too."""

    def __init__(self, model: GroundingModel) -> None:
        super().__init__()
        self.model = model
        self.spec: Any = None
        self.rest: list[Any] = []
        self.kept: list[int] | None = None

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features = self.model.encode_normalised(ImageFeatures(image, (0, 0)))
        leaves, spec = tree.tree_flatten(features.decoded)
        if self.spec is None:
            self.spec, self.rest = spec, [IS_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        tensors = [leaf for leaf, kind in zip(leaves, self.rest, strict=True) if kind is IS_TENSOR]
        return tuple(tensors if self.kept is None else [tensors[i] for i in self.kept])


class LanguageGraph(nn.Module):
    """E tokenised expressions and the tensors of `ImageGraph` -> the answers that the decoder has, in the order of ANSWERS."""

    def __init__(self, image_graph: ImageGraph) -> None:
        super().__init__()
        self.model = image_graph.model
        self.spec, self.rest = image_graph.spec, image_graph.rest

    def forward(self, text_ids: Tensor, text_mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if leaf is IS_TENSOR else leaf for leaf in self.rest]
        decoded = tree.tree_unflatten(leaves, self.spec)
        text = self.model.encode_text(text_ids, text_mask)
        return answers_of(self.model.decoder.language_part(decoded, torch.zeros_like(text_ids[:, 0]), text))


class WholeGraph(nn.Module):
    """One normalised image and one tokenised expression -> the answers: for image encoders that read the expression."""

    def __init__(self, model: GroundingModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, ...]:
        features = self.model.encode_normalised(ImageFeatures(image, (0, 0)))
        return answers_of(self.model.ground(features, torch.zeros_like(text_ids[:, 0]), text_ids, text_mask))


def answers_of(output: GroundingOutput) -> tuple[Tensor, ...]:
    """Return the answers that are there, in the order of ANSWERS."""
    return tuple(getattr(output, name) for name in ANSWERS if getattr(output, name) is not None)


def names_of(output: GroundingOutput) -> list[str]:
    """Return the names of the answers that are there, in their order."""
    return [name for name in ANSWERS if getattr(output, name) is not None]


def check_exportable(model: Any) -> None:
    """Raise on a model whose decoder needs what a graph does not get.

    Raises:
        GrexError: a decoder that reads the ground truth or the pixels themselves.
    """
    if model.config.predict.oracle != "none":
        raise fault(
            f"predict.oracle: {model.config.predict.oracle}", "none: there is no ground truth outside", "set predict.oracle to none"
        )
