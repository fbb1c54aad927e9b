"""What a model says about the objects of one image: which there are, and how surely each belongs to what an expression means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from grex_mllm.data.transforms import input_masks
from grex_mllm.models.answer import EncodedImage, answers
from grex_mllm.models.describe import SURE, found_objects
from grex_mllm.models.grex import GrexModel
from grex_mllm.types import Grounding

SAME_PLACE = 0.85  # of the smaller area: objects that cover each other by more are one (an object may lie before another one)
SMALLEST_PIECE = 0.02  # of the largest piece's area: smaller pieces of a mask are crumbs


@torch.inference_mode()
def proposed(model: GrexModel, encoded: EncodedImage, least: float = SURE) -> np.ndarray | None:
    """Return bool [N, H0, W0]: the objects that the decoder finds without an expression; None where it finds none by itself.

    least: objectness from 0 to 1.
    """
    if model.grounding.proposals(encoded.features) is None:
        return None
    kept: list[np.ndarray] = []
    for mask in found_objects(model, encoded, least):
        area = np.count_nonzero(mask)  # far faster than sum()
        if all(np.count_nonzero(mask & other) < SAME_PLACE * min(area, np.count_nonzero(other)) for other in kept):
            kept.append(mask)
    return np.stack(kept) if kept else np.zeros((0, encoded.geometry.height, encoded.geometry.width), bool)


@torch.inference_mode()
def ask(
    model: GrexModel, encoded: EncodedImage, texts: Sequence[str], objects: np.ndarray, threshold: float | None = None
) -> tuple[list[Grounding], np.ndarray]:
    """Ground expressions; return the answers and float [E, N]: the mean probability of each object's pixels to belong to each of them.

    objects: bool [N, H0, W0].  threshold: as in `GrexModel.ground`.
    """
    rules = model.config.predict if threshold is None else replace(model.config.predict, no_target_threshold=threshold)
    output = model.look(encoded, texts)
    found = answers(output, list(texts), [encoded.geometry] * len(texts), encoded.canvas, rules)
    for result in found:
        result.image = encoded.original
    if not len(objects):
        return found, np.zeros((len(texts), 0))
    logits = F.interpolate(output.mask_logits.float(), size=encoded.canvas, mode="bilinear", align_corners=False)
    height, width = encoded.features.input_size
    prob = (logits[:, 1] - logits[:, 0]).sigmoid()[:, :height, :width].flatten(1)
    pixels = input_masks(objects, encoded.geometry, encoded.features.input_size).to(prob.device).flatten(1).float()
    return found, ((prob @ pixels.T) / pixels.sum(1).clamp(min=1)).cpu().numpy()


def pieces(mask: np.ndarray) -> np.ndarray:
    """Return bool [n, H, W]: the connected pieces of a mask, the largest first, without crumbs."""
    labels, number = ndimage.label(mask, structure=np.ones((3, 3)))
    parts = sorted((labels == n for n in range(1, number + 1)), key=lambda part: -int(part.sum()))
    kept = [part for part in parts if part.sum() >= SMALLEST_PIECE * parts[0].sum()]
    return np.stack(kept) if kept else np.zeros((0, *mask.shape), bool)


def overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return float [N, M]: the intersection over union of masks bool [N, H, W] and [M, H, W]."""
    one, other = (masks.reshape(len(masks), first.shape[1] * first.shape[2]).astype(np.float32) for masks in (first, second))
    both = one @ other.T
    either = one.sum(1)[:, None] + other.sum(1)[None] - both
    return both / np.maximum(either, 1)
