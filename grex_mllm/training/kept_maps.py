"""Maps of a frozen image encoder, computed once for each view of an image and kept in memory.

Every map is rounded to float16, the first time as well as when it comes from memory, so that what is learned does not depend on which maps
are kept. A view is an image as it enters the network each time it comes: the plain one, and the mirrored one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grex_mllm.errors import fault
from grex_mllm.models.grounding import GroundingModel, ImageFeatures
from grex_mllm.types import Batch

GIB = 1 << 30
ROUNDING = 0.02  # between an image alone and in a batch, relative to the largest value: rounding of bfloat16, far below one dropped path


class KeptMaps:
    """The maps of views by name, up to `gib` GiB; views that find no room, or have no name, are computed each time."""

    def __init__(self, gib: float) -> None:
        self.room, self.checked = int(gib * GIB), False
        self.kept: dict[str | int, list[Tensor]] = {}
        self.num_computed = 0  # images that went through the encoder

    def features(self, grounding: GroundingModel, batch: Batch) -> ImageFeatures:
        """Return the images of a batch with their maps [B, C_i, h_i, w_i], nothing else computed yet.

        Raises:
            GrexError: an image encoder that trains, reads expressions, or gives an image other maps each time.
        """
        features = grounding.normalised(batch.image, batch.input_sizes)
        views: list[str | int] = [view or i for i, view in enumerate(batch.views or [None] * len(batch.image))]
        missing = {view: i for i, view in enumerate(views) if view not in self.kept}  # an image may stand in a batch twice
        rows: dict[str | int, list[Tensor]] = {}
        if missing:
            image = features.image[list(missing.values())]
            if not self.checked:
                _check(grounding, image)
                self.checked = True
            with torch.no_grad():
                maps = [level.half() for level in grounding.vision(image, None)]
            self.num_computed += len(missing)
            rows = {view: [level[place] for level in maps] for place, view in enumerate(missing)}
            for view, levels in rows.items():
                self._keep(view, levels)
        device, kind = features.image.device, features.image.dtype
        found = [rows[view] if view in rows else self.kept[view] for view in views]
        features.maps = [torch.stack([level.to(device) for level in levels]).to(kind) for levels in zip(*found, strict=True)]
        return features

    def _keep(self, view: str | int, maps: list[Tensor]) -> None:
        size = sum(level.numel() * level.element_size() for level in maps)
        if isinstance(view, str) and size <= self.room:
            self.kept[view] = [level.to("cpu", copy=True) for level in maps]
            self.room -= size


def _check(grounding: GroundingModel, image: Tensor) -> None:
    where = "data.feature_cache is set"
    if grounding.fuses_language:
        raise fault(f"{where} with an image encoder that reads expressions", "one without fusion", "set data.feature_cache to 0")
    parameters = list(grounding.vision.parameters())
    if any(parameter.requires_grad for parameter in parameters):
        action = "set train.optim.frozen to [grounding.vision], or data.feature_cache to 0"
        raise fault(f"{where}, but the image encoder trains", "a frozen one", action)
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        raise fault(f"{where} with ZeRO-3", "whole weights on every process", "set data.feature_cache to 0, or use ZeRO-2")
    with torch.no_grad():
        together, alone = grounding.vision(image, None), grounding.vision(image[:1], None)
    for first, second in zip(together, alone, strict=True):
        difference = float((first[:1] - second).abs().max()) / max(float(second.abs().max()), 1e-6)
        if not difference <= ROUNDING or not bool(torch.isfinite(first.half()).all()):
            given = f"{where}, but the image encoder gives an image other maps each time, or values beyond float16"
            raise fault(
                given, "no dropped paths, no statistics of the batch", "set model.vision.drop_path to 0, or data.feature_cache to 0"
            )
