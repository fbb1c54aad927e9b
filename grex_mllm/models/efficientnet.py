"""EfficientNet-Lite0, the small image encoder whose ImageNet weights come as a package (`data_prep/weights.py`).

Tan and Le 2019, in the "Lite" form for edge devices: no squeeze-and-excitation, ReLU6, a stem of fixed width. Convolutions pad as
TensorFlow's "same" does (more at the right and bottom where the padding is odd), and batch norm has an epsilon of 1e-3, because the
published weights were trained so. Names of parameters are those of timm's `tf_efficientnet_lite0`, without its classifier and the
convolution before it, which no feature map reads.

Batch norm keeps the statistics of ImageNet, in training too: batches of a few photographs would spoil them. Scales and shifts train.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.config import VisionConfig
from grex_mllm.ops.recompute import run_block
from grex_mllm.types import TextFeatures

STEM_WIDTH = 32
EPSILON = 1e-3
# of ImageNet's normalisation (`models/grounding.py`), which the input has, and of the published weights
GIVEN_MEAN, GIVEN_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OWN_MEAN, OWN_STD = 0.5, 0.5


class Stage(NamedTuple):
    """Equal blocks. kernel, stride: of the depthwise convolution (the stride of the first block alone).  expansion: inner width / input."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    width: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
GIVEN_AFTER = (1, 2, 4, 6)  # the last stages at strides 4, 8, 16, 32


class KeptBatchNorm(nn.Module):
    """Batch norm that uses its stored statistics in training as well and never changes them; scale and shift train."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=EPSILON)


class SameConv(nn.Conv2d):
    """A convolution without bias whose output has ceil(size / stride) rows and columns; an odd padding is larger at the end."""

    def __init__(self, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(before, after, kernel, stride, kernel // 2 if stride == 1 else 0, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] > 1:
            x = F.pad(x, (*self._sides(x.shape[-1]), *self._sides(x.shape[-2])))
        return super().forward(x)

    def _sides(self, size: int) -> tuple[int, int]:
        stride, kernel = self.stride[0], self.kernel_size[0]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        return total // 2, total - total // 2


class Block(nn.Module):
    """An inverted residual: expand (where the inner width differs), depthwise convolution, project; added where shapes agree."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = before * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and before == after
        if self.expands:
            self.conv_pw, self.bn1 = SameConv(before, inner, 1), KeptBatchNorm(inner)
            self.conv_dw, self.bn2 = SameConv(inner, inner, kernel, stride, inner), KeptBatchNorm(inner)
            self.conv_pwl, self.bn3 = SameConv(inner, after, 1), KeptBatchNorm(after)
        else:
            self.conv_dw, self.bn1 = SameConv(inner, inner, kernel, stride, inner), KeptBatchNorm(inner)
            self.conv_pw, self.bn2 = SameConv(inner, after, 1), KeptBatchNorm(after)

    def forward(self, x: Tensor) -> Tensor:
        if self.expands:
            y = F.relu6(self.bn1(self.conv_pw(x)))
            y = F.relu6(self.bn2(self.conv_dw(y)))
            y = self.bn3(self.conv_pwl(y))
        else:
            y = F.relu6(self.bn1(self.conv_dw(x)))
            y = self.bn2(self.conv_pw(y))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """Four maps at strides 4, 8, 16 and 32 with 24, 40, 112 and 320 channels."""

    fuses_language = False
    strides = (4, 8, 16, 32)
    channels = tuple(STAGES[stage].width for stage in GIVEN_AFTER)
    scale: Tensor
    shift: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.recompute = config.gradient_checkpointing
        self.conv_stem, self.bn1 = SameConv(3, STEM_WIDTH, 3, 2), KeptBatchNorm(STEM_WIDTH)
        width, stages = STEM_WIDTH, []
        for stage in STAGES:
            blocks = []
            for number in range(stage.repeats):
                blocks.append(Block(width, stage.width, stage.kernel, stage.stride if number == 0 else 1, stage.expansion))
                width = stage.width
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        given_mean, given_std = torch.tensor(GIVEN_MEAN).view(3, 1, 1), torch.tensor(GIVEN_STD).view(3, 1, 1)
        self.register_buffer("scale", given_std / OWN_STD, persistent=False)
        self.register_buffer("shift", (given_mean - OWN_MEAN) / OWN_STD, persistent=False)

    def forward(self, image: Tensor, text: TextFeatures | None = None) -> list[Tensor]:
        """Return four maps, fine to coarse, of normalised images [B, 3, H, W]; `text` is unread."""
        x = F.relu6(self.bn1(self.conv_stem(image * self.scale + self.shift)))
        maps = []
        for number, stage in enumerate(self.blocks):
            for block in stage:
                x = run_block(block, x, recompute=self.recompute and self.training)
            if number in GIVEN_AFTER:
                maps.append(x)
        return maps
