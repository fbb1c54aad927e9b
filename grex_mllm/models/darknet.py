"""Darknet-53, the image encoder of the thesis's first systems (Redmon and Farhadi 2018, table 1), with the names of timm's `darknet53`.

The published systems start from weights of COCO detection without the images of RefCOCO's test splits, and feed values in [0, 1] without
mean and deviation. Those weights are not to be had; timm's are of ImageNet, with its mean and deviation and a slope of 0.01 where the
original has 0.1. The slope follows the weights that exist.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.config import VisionConfig
from grex_mllm.errors import fault
from grex_mllm.models.resnet import build_norm
from grex_mllm.ops.recompute import run_block
from grex_mllm.types import TextFeatures

SLOPE = 0.01
NUM_STAGES, NUM_MAPS = 5, 4  # the first stage, at stride 2, is given to nobody
LEFT_OUT = ("head.", "fc.")  # of timm's model: the classifier


class ConvNorm(nn.Module):
    """Convolution, norm, leaky ReLU."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
        self.bn = build_norm(norm, after)
        nn.init.kaiming_normal_(self.conv.weight, a=SLOPE, mode="fan_out", nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.bn(self.conv(x)), SLOPE)


class Block(nn.Module):
    """Add a 1x1 convolution of half the width and a 3x3 one to the input."""

    def __init__(self, width: int, norm: str) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width, width // 2, 1, 1, norm)
        self.conv2 = ConvNorm(width // 2, width, 3, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))


class Stage(nn.Module):
    """Halve the map by a strided 3x3 convolution of twice the width, then blocks."""

    def __init__(self, before: int, depth: int, norm: str, recompute: bool) -> None:
        super().__init__()
        self.conv_down = ConvNorm(before, 2 * before, 3, 2, norm)
        self.blocks = nn.Sequential(*(Block(2 * before, norm) for _ in range(depth)))
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_down(x)
        for block in self.blocks:
            x = run_block(block, x, recompute=self.recompute)
        return x


class Darknet(nn.Module):
    """Four maps at strides 4, 8, 16 and 32; of the published size they have 128, 256, 512 and 1024 channels."""

    fuses_language = False
    strides = (4, 8, 16, 32)

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        if len(config.darknet_depths) != NUM_STAGES:
            raise fault(f"model.vision.darknet_depths {config.darknet_depths}", f"{NUM_STAGES} numbers", "fix the list")
        if config.darknet_width % 2:
            raise fault(f"model.vision.darknet_width {config.darknet_width}", "an even number", "change it")
        width = config.darknet_width
        self.stem = nn.Sequential()
        self.stem.add_module("conv1", ConvNorm(3, width, 3, 1, config.norm))
        self.stages = nn.Sequential(
            *(Stage(width * 2**i, depth, config.norm, config.gradient_checkpointing) for i, depth in enumerate(config.darknet_depths))
        )
        self.channels = tuple(width * 2 ** (i + 1) for i in range(NUM_STAGES - NUM_MAPS, NUM_STAGES))

    @staticmethod
    def own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of timm's `darknet53` that have a place here: all but the classifier and the counters of batches."""
        return {key: value for key, value in state.items() if not key.startswith(LEFT_OUT) and not key.endswith("num_batches_tracked")}

    def forward(self, image: Tensor, text: TextFeatures | None = None) -> list[Tensor]:
        """Return four maps, fine to coarse, of normalised images [B, 3, H, W]; `text` is unread."""
        x, maps = self.stem(image), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[-NUM_MAPS:]
