"""The features of pictures, computed once for all chats that show them, and embeddings of the caller's own in a chat.

Both enter by the model's own forward pass, so that it counts its positions (M-RoPE), fills its image tokens and adds Qwen3-VL's deepstack
features itself: a sequence of embeddings alone would lose these.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grex_mllm.errors import fault

READ = ("pixel_values", "image_grid_thw", "image_sizes", "batch_num_images", "pixel_attention_mask")
FEATURES = "mm_encoder_outputs"  # the argument by which a model takes features in place of pixels


class PictureFeatures(NamedTuple):
    """tokens: float [T, D], the image tokens of some pictures one after the other.  layers: what is added in the first layers, [T, D] each.

    stacked: the model wants them as one tensor.  kind: class of the model's own output.
    """

    tokens: Tensor
    layers: list[Tensor]
    stacked: bool
    kind: type


def check_features(model: Any) -> None:
    """Raise where a model does not take features in place of pixels.

    Raises:
        GrexError: this one does not.
    """
    if FEATURES not in inspect.signature(model.forward).parameters:
        raise fault(
            f"multimodal model of type {model.config.model_type}, which takes pictures as pixels only",
            f"a model whose forward pass has {FEATURES}",
            "use transformers 5.24 or later, or another model",
        )


def encode(model: Any, tensors: dict[str, Tensor]) -> PictureFeatures:
    """Return the features of pictures. tensors: of `Chat.pictures`, on the model's device."""
    core = model.model
    part = getattr(core, "visual", None) or getattr(core, "vision_tower", None) or core.vision_model
    learns = any(p.requires_grad for name, p in core.named_parameters() if not name.startswith(("language_model.", "text_model.")))
    dtype = next(part.parameters()).dtype
    dtype = dtype if dtype.is_floating_point else model.dtype
    given = {name: tensors[name].to(dtype) if tensors[name].is_floating_point() else tensors[name] for name in READ if name in tensors}
    with nullcontext() if learns else torch.no_grad():
        out = core.get_image_features(**given, return_dict=True)
        found = out.pooler_output
        layers = [_flat(layer) for layer in getattr(out, "deepstack_features", None) or []]
        return PictureFeatures(_flat(found), layers, isinstance(found, Tensor), type(out))


def features_input(features: PictureFeatures, index: Tensor) -> dict[str, Any]:
    """Return the model's input for chats whose image tokens, one after the other, are those at `index` (int64 [n]) of the features."""
    tokens = features.tokens[index]
    given: dict[str, Any] = {"pooler_output": tokens[None] if features.stacked else (tokens,)}
    if features.layers:
        given["deepstack_features"] = [(layer[index],) for layer in features.layers]
    return {FEATURES: {"image": features.kind(**given)}}


@contextmanager
def embedded(model: Any, spaces: Tensor, values: Tensor) -> Iterator[None]:
    """Let `values` (float [n, D]) stand at the n positions of a batch where `spaces` (bool [B, L]) is True, in their order."""

    def put(_module: Any, _given: Any, output: Tensor) -> Tensor | None:
        if output.shape[:2] != spaces.shape:
            return None
        return output.masked_scatter(spaces[..., None], values.to(output.dtype))

    hook = model.get_input_embeddings().register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()


def _flat(features: Any) -> Tensor:
    """Return float [T, D] of a tensor [pictures, tokens, D] or a list of [tokens, D]."""
    return torch.cat([part.flatten(0, -2) for part in features])
