"""From the logits of a decoder to the answer at the original image size.

Mask: argmax of the two classes after bilinear upsampling (a tie is background). No target: a probability above a threshold; at 0.5, the
default, that is the argmax of the no-target head (a tie is "has a target"), as the released ReLA decides. Boxes: the papers select the N_O
best boxes (GREx article, count head); the benchmark keeps boxes above a score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from grex_mllm.config import PredictConfig
from grex_mllm.data.transforms import boxes_to_original, mask_to_original
from grex_mllm.errors import GrexError, fault
from grex_mllm.models.grounding import ImageFeatures
from grex_mllm.types import MORE_THAN_FIVE, Geometry, Grounding, GroundingOutput

BOX_RULES = ("count", "threshold", "both")
NO_TARGET_RULES = ("head", "pixels")
DEFAULT_THRESHOLD = PredictConfig.no_target_threshold


@dataclass
class EncodedImage:
    """One image, encoded once for many expressions and object sets.

    canvas: (H, W) of the network input, padding included.  original: uint8 [H0, W0, 3].  mirrored: those of its mirror image, which lies in
    the same place (`predict.mirror`), once an expression was asked.
    """

    features: ImageFeatures
    geometry: Geometry
    canvas: tuple[int, int]
    original: np.ndarray | None = None
    mirrored: ImageFeatures | None = None


def answers(
    output: GroundingOutput, expressions: list[str], geometries: list[Geometry], canvas: tuple[int, int], config: PredictConfig
) -> list[Grounding]:
    """Return one Grounding per expression. With `config.masks` false all masks are empty and decide nothing.

    geometries: of each expression's image.  canvas: (H, W) that the mask logits [E, 2, h, w] cover, padding included.
    """
    check_rules(config)
    no_target_prob, says_none = np.zeros(len(expressions)), np.zeros(len(expressions), bool)
    by_pixels = config.no_target == "pixels" or (output.no_target_logits is None and config.masks)
    if output.no_target_logits is not None:
        no_target_prob = output.no_target_logits.float().softmax(dim=-1)[:, 1].cpu().numpy()
        says_none = above_threshold(output.no_target_logits, config.no_target_threshold).cpu().numpy()
    results = []
    for e, (expression, geometry) in enumerate(zip(expressions, geometries, strict=True)):
        mask_input, mask = _no_masks(geometry)
        if config.masks:
            mask_input, mask = masks_at(output.mask_logits[e].float(), geometry, canvas, config.mask_threshold)
        if by_pixels:
            says_none[e] = mask.sum() < config.min_mask_pixels
            no_target_prob[e] = float(says_none[e])
        no_target = bool(says_none[e]) or (config.masks and not mask.any())
        boxes, scores, count = boxes_of(output, e, geometry, canvas, config)
        if no_target:
            mask, count = np.zeros_like(mask), None if count is None else 0
            boxes, scores = (None if values is None else values[:0] for values in (boxes, scores))
        minimap = output.minimap_prob[e].float().cpu().numpy() if output.minimap_prob is not None else None
        results.append(
            Grounding(expression, mask, mask_input, boxes, scores, count, no_target, float(no_target_prob[e]), minimap, bool(says_none[e]))
        )
    return results


def above_threshold(no_target_logits: Tensor, threshold: float) -> Tensor:
    """Return bool [E]: is the probability of "no target" above the threshold? Logits float [E, 2].

    The logits' difference is compared, not the rounded probability: 0.5 is exactly the argmax, 0 always says "no target", 1 never.
    """
    logits = no_target_logits.double()
    if threshold in (0, 1):
        return torch.full_like(logits[:, 0], int(threshold == 0), dtype=torch.bool)  # int: ONNX has no other
    return logits[:, 1] - logits[:, 0] > math.log(threshold) - math.log1p(-threshold)


def check_rules(config: PredictConfig) -> None:
    """Raise on a rule that does not exist, that reads masks where there are none, or a threshold that decides nothing.

    Raises:
        GrexError: names the field, the value and the rules that exist.
    """
    for name, value, known in (("predict.boxes", config.boxes, BOX_RULES), ("predict.no_target", config.no_target, NO_TARGET_RULES)):
        if value not in known:
            raise GrexError(f'{name} is "{value}"; expected one of {", ".join(known)}; fix the configuration')
    threshold = config.no_target_threshold
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise fault(
            f"a no-target threshold (predict.no_target_threshold) of {threshold}",
            "a probability from 0 to 1 (0.5 = the likelier of the two)",
            "give another one",
        )
    if not 0 < config.mask_threshold < 1:
        raise fault(f"predict.mask_threshold of {config.mask_threshold}", "a probability between 0 and 1", "give another one")
    if config.no_target == "pixels" and threshold != DEFAULT_THRESHOLD:
        raise fault(
            f"a no-target threshold of {threshold} with predict.no_target: pixels",
            "a model whose no-target head decides",
            "set predict.no_target to head, or leave the threshold out",
        )
    if config.mirror and config.oracle != "none":
        raise fault(f"predict.mirror with predict.oracle {config.oracle}", "answers of the model alone", "set one of them back")
    if config.no_target == "pixels" and not config.masks:
        raise GrexError(
            "predict.no_target is pixels and predict.masks is false; expected masks to count pixels of; set predict.no_target to head"
        )


def _no_masks(geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((geometry.input_height, geometry.input_width), bool), np.zeros((geometry.height, geometry.width), bool)


def masks_at(
    logits: Tensor, geometry: Geometry, canvas: tuple[int, int], threshold: float = PredictConfig.mask_threshold
) -> tuple[np.ndarray, np.ndarray]:
    """Return bool masks at the network input size (padding and margins cut off) and at the original size, from logits float [2, h, w].

    threshold: probability above which a pixel belongs to the mask; 0.5 is exactly the argmax.

    The original-size mask is sampled from the logits in one bilinear step, not from the thresholded input mask.
    """
    difference = logits[1] - logits[0] - (math.log(threshold) - math.log1p(-threshold))
    at_input = F.interpolate(difference[None, None], size=canvas, mode="bilinear", align_corners=False)[0, 0]
    at_input = at_input[geometry.inner]
    return (at_input > 0).cpu().numpy(), mask_to_original(difference, geometry, canvas).cpu().numpy()


def boxes_of(
    output: GroundingOutput, e: int, geometry: Geometry, canvas: tuple[int, int], config: PredictConfig
) -> tuple[np.ndarray | None, np.ndarray | None, int | None]:
    """Return boxes float32 [n, 4] xyxy at original size, scores float32 [n] (best first), and the count (6 = more than five).

    None for what the decoder has no head for; the count then is that of the boxes, if there are any.
    """
    if output.boxes_norm is None or output.box_logits is None:
        return None, None, int(output.count_logits[e].argmax()) if output.count_logits is not None else None
    scores, order = output.box_logits[e].float().sigmoid().sort(descending=True, stable=True)
    above = int((scores >= config.box_threshold).sum())
    count = int(output.count_logits[e].argmax()) if output.count_logits is not None else min(above, MORE_THAN_FIVE)
    best = max(MORE_THAN_FIVE, above) if count >= MORE_THAN_FIVE else count
    keep = {"count": best, "threshold": above, "both": min(best, above)}[config.boxes]
    boxes = boxes_to_original(output.boxes_norm[e].float()[order[:keep]], geometry, canvas)
    return boxes.cpu().numpy(), scores[:keep].cpu().numpy(), count
