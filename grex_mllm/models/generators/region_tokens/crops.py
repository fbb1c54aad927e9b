"""A closer look: every object's crop of the image, enlarged and read by a frozen image encoder that keeps what pre-training taught it.

A small object is a few cells of the feature maps of a whole image, and training on little data makes an image encoder forget what it does
not need for masks. The maps of a crop are pooled under the object's mask, beside those of the whole image. As in Mao et al. 2016, who
describe an object by features of its crop and of the whole image; here the mask leaves out the surroundings that the crop shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.encoders import VisionConfig
from grex_mllm.errors import fault
from grex_mllm.models.vision import build_vision
from grex_mllm.ops.recordable import area_pool

LEAST_SIDE = 12.0  # pixels of the network input; of smaller objects more is shown around them
AT_ONCE = 32  # crops
LEAST_SIZE = 32  # pixels a side, of which the coarsest map is one cell


@dataclass
class CropsConfig:
    """size: pixels a side of a crop, 0 = none.  margin: side of the crop / longer side of the object's box.  vision: what reads it."""

    size: int = 0
    margin: float = 1.3
    vision: VisionConfig = field(default_factory=VisionConfig)


class Crops(nn.Module):
    """Read crops of objects. None of its parameters ever learns.

    Raises:
        GrexError: crops smaller than LEAST_SIZE, a margin below 1, an encoder that reads expressions.
    """

    def __init__(self, config: CropsConfig) -> None:
        super().__init__()
        if config.size < LEAST_SIZE or config.margin < 1:
            given = f"model.generator.crops with size {config.size} and margin {config.margin:g}"
            raise fault(given, f"a size of at least {LEAST_SIZE} (or 0: no crops) and a margin of at least 1", "change them")
        self.size, self.margin = config.size, config.margin
        if config.vision.name == "swin" and config.vision.fusion != "none":
            given = f"model.generator.crops.vision with fusion {config.vision.fusion}"
            raise fault(given, "an image encoder that reads no expression", "set its fusion to none")
        self.vision: Any = build_vision(config.vision, 0)
        self.requires_grad_(False)

    @property
    def channels(self) -> list[int]:
        """Channels of what `forward` returns: all maps of the encoder but the finest, which shows edges."""
        return list(self.vision.channels[1:])

    def train(self, mode: bool = True) -> Crops:
        """Stay in evaluation: no dropout, stored statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor, masks: list[Tensor], boxes: Tensor) -> list[Tensor]:
        """Return float [B, N, C_i] for each map: what is seen of every object in its crop; zeros for an object without a pixel.

        image: float [B, 3, H', W'], normalised, padded at the right and bottom.  masks: B x bool [N_b, H, W], with or without that padding.
        boxes: float [B, N, 4] xyxy in pixels.
        """
        found: list[list[Tensor]] = [[] for _ in self.channels]
        for b, mask in enumerate(masks):
            rows: list[list[Tensor]] = [[] for _ in self.channels]
            for start in range(0, len(mask), AT_ONCE):
                some = slice(start, start + AT_ONCE)
                for level, values in zip(rows, self._read(image[b], mask[some], boxes[b, : len(mask)][some]), strict=True):
                    level.append(values)
            for level, parts in zip(found, rows, strict=True):
                level.append(torch.cat(parts) if parts else image.new_zeros(0, 1))
        num = boxes.shape[1]
        return [
            torch.stack([F.pad(v, (0, width - v.shape[1], 0, num - len(v))) for v in level])
            for level, width in zip(found, self.channels, strict=True)
        ]

    def _read(self, image: Tensor, mask: Tensor, boxes: Tensor) -> list[Tensor]:
        """Return float [n, C_i] of n objects of one image."""
        places, own = (self._places(boxes.float(), tensor.shape[1:]) for tensor in (image, mask))
        n, side = len(mask), self.size
        with torch.autocast(image.device.type, enabled=False):
            tall = F.grid_sample(image.float()[None], places.flatten(0, 1)[None], padding_mode="zeros", align_corners=False)
            shown = F.grid_sample(mask.float()[:, None], own, padding_mode="zeros", align_corners=False)
        crops = tall[0].unflatten(1, (n, side)).transpose(0, 1).to(image.dtype)
        pooled = []
        for level in self.vision(crops, None)[1:]:
            weight = area_pool(shown, (level.shape[-2], level.shape[-1])).flatten(2)  # [n, 1, h * w]
            weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-6)
            pooled.append(torch.bmm(weight.to(level.dtype), level.flatten(2).transpose(1, 2))[:, 0])
        return pooled

    def _places(self, boxes: Tensor, size: torch.Size) -> Tensor:
        """Return float32 [n, S, S, 2]: where the pixels of the crops lie in the image, x and y, from -1 to 1 between its borders."""
        height, width = size
        low, high = boxes[:, :2], boxes[:, 2:]
        side = (high - low).amax(1).clamp(min=LEAST_SIDE) * self.margin
        step = (torch.arange(self.size, device=boxes.device) + 0.5) / self.size - 0.5
        across, down = ((low + high)[:, axis, None] / 2 + side[:, None] * step for axis in (0, 1))
        n = len(boxes)
        x, y = (2 * across / width - 1)[:, None].expand(n, self.size, -1), (2 * down / height - 1)[..., None].expand(n, -1, self.size)
        return torch.stack([x, y], -1)
