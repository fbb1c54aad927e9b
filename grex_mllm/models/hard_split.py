"""RIA's ablation "hard split, input" (GRES paper, table 2, model 1): the image is cut into P x P patches before the image encoder."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.types import TextFeatures


class PatchPrefix(NamedTuple):
    """What the encoder makes of the patches before its first fusion, and the size of the whole image."""

    prefix: Any
    size: tuple[int, int]


class HardSplit(nn.Module):
    """Encode every cell of a P x P grid as an image of its own, and lay the maps together again.

    The paper does not say how cells that are no multiple of the stride are treated; the image is enlarged until they are, and the maps are
    brought back to the sizes that the whole image would have given.
    """

    def __init__(self, net: Any, side: int) -> None:
        super().__init__()
        self.net = net
        self.side = side
        self.strides = self.net.strides
        self.channels = self.net.channels
        self.fuses_language = self.net.fuses_language

    def leave_out(self, number: int) -> None:
        """Let the encoder drop what belongs to its finest maps alone."""
        if hasattr(self.net, "leave_out"):
            self.net.leave_out(number)

    def forward(self, image: Tensor, text: TextFeatures | None = None) -> list[Tensor]:
        """Return the maps of normalised images [B, 3, H, W], fine to coarse; with fusion, `text` has one row per image."""
        rows = None if text is None else _repeat(text, self.side**2)
        return self._join(self.net(self._cut(image), rows), (int(image.shape[-2]), int(image.shape[-1])))

    def encode_prefix(self, image: Tensor) -> PatchPrefix:
        """Do the work before the first fusion once per image."""
        return PatchPrefix(self.net.encode_prefix(self._cut(image)), (int(image.shape[-2]), int(image.shape[-1])))

    def finish(self, prefix: PatchPrefix, image_index: Tensor, text: TextFeatures) -> list[Tensor]:
        """Continue for E expressions, one map each. image_index: int64 [E]."""
        cells = self.side**2
        index = (image_index[:, None] * cells + torch.arange(cells, device=image_index.device)).flatten()
        return self._join(self.net.finish(prefix.prefix, index, _repeat(text, cells)), prefix.size)

    def _cut(self, image: Tensor) -> Tensor:
        step = self.side * max(self.strides)
        size = [-(-int(n) // step) * step for n in image.shape[-2:]]
        image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
        height, width = size[0] // self.side, size[1] // self.side
        cells = image.unflatten(3, (self.side, width)).unflatten(2, (self.side, height))
        return cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)

    def _join(self, maps: list[Tensor], size: tuple[int, int]) -> list[Tensor]:
        joined = []
        for cells, stride in zip(maps, self.strides, strict=True):
            grid = cells.unflatten(0, (-1, self.side, self.side)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
            joined.append(F.interpolate(grid, size=(size[0] // stride, size[1] // stride), mode="bilinear", align_corners=False))
        return joined


def _repeat(text: TextFeatures, times: int) -> TextFeatures:
    return TextFeatures(text.tokens.repeat_interleave(times, 0), text.mask.repeat_interleave(times, 0))
