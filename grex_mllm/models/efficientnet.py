"""EfficientNet-Lite0, the small image encoder whose ImageNet weights come as a package (`data_prep/weights.py`).

Tan and Le 2019, in the "Lite" form for edge devices: no squeeze-and-excitation, ReLU6, a stem of fixed width. Convolutions pad as
TensorFlow's "same" does (more at the right and bottom where the padding is odd), and batch norm has an epsilon of 1e-3, because the
published weights were trained so. The classifier and the convolution before it are left out: no feature map reads them.

Batch norm keeps the statistics of ImageNet, in training too: batches of a few photographs would spoil them. Scales and shifts train.
"""

from __future__ import annotations

from contextlib import nullcontext
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
# timm's names and ours
OUTER = ("conv_stem", "bn1")
FIELDS = {"weight": "scale", "bias": "shift", "running_mean": "mean", "running_var": "var"}
FIRST_PARTS = {"conv_dw": "depthwise", "bn1": "depthwise", "conv_pw": "project", "bn2": "project"}
PARTS = {"conv_pw": "expand", "bn1": "expand", "conv_dw": "depthwise", "bn2": "depthwise", "conv_pwl": "project", "bn3": "project"}


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


class ConvNorm(nn.Module):
    """A convolution and its batch norm in one pass, with "same" padding: ceil(size / stride) rows and columns.

    The stored statistics serve in training as well and never change, so scale and shift of the norm, which train, fold into the kernel
    and a bias: equal but for rounding, and one pass over the map less, forward and backward.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.stride, self.groups = stride, groups
        self.weight = nn.Parameter(torch.empty(after, before // groups, kernel, kernel))
        nn.init.kaiming_normal_(self.weight, mode="fan_out")
        self.scale, self.shift = nn.Parameter(torch.ones(after)), nn.Parameter(torch.zeros(after))
        self.register_buffer("mean", torch.zeros(after))
        self.register_buffer("var", torch.ones(after))

    def forward(self, x: Tensor) -> Tensor:
        factor = self.scale * (self.var + EPSILON).rsqrt()
        padding = self.weight.shape[-1] // 2
        if self.stride > 1:
            x, padding = F.pad(x, (*self._sides(x.shape[-1]), *self._sides(x.shape[-2]))), 0
        kernel, bias = self.weight * factor[:, None, None, None], self.shift - self.mean * factor
        return F.conv2d(x, kernel, bias, self.stride, padding, groups=self.groups)

    def _sides(self, size: int) -> tuple[int, int]:
        kernel = self.weight.shape[-1]
        total = max((-(-size // self.stride) - 1) * self.stride + kernel - size, 0)
        return total // 2, total - total // 2


class Block(nn.Module):
    """An inverted residual: expand (where the inner width differs), depthwise convolution, project; added where shapes agree."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = before * expansion
        self.adds = stride == 1 and before == after
        self.expand = ConvNorm(before, inner, 1) if expansion > 1 else None
        self.depthwise = ConvNorm(inner, inner, kernel, stride, inner)
        self.project = ConvNorm(inner, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        y = self.project(F.relu6(self.depthwise(y), inplace=True))
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
        self.stem = ConvNorm(3, STEM_WIDTH, 3, 2)
        width, stages = STEM_WIDTH, []
        for stage in STAGES:
            blocks = []
            for number in range(stage.repeats):
                blocks.append(Block(width, stage.width, stage.kernel, stage.stride if number == 0 else 1, stage.expansion))
                width = stage.width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        given_mean, given_std = torch.tensor(GIVEN_MEAN).view(3, 1, 1), torch.tensor(GIVEN_STD).view(3, 1, 1)
        self.register_buffer("scale", given_std / OWN_STD, persistent=False)
        self.register_buffer("shift", (given_mean - OWN_MEAN) / OWN_STD, persistent=False)

    @staticmethod
    def own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of timm's `tf_efficientnet_lite0` under the names of this module, without those that it does not have.

        Names that are not timm's stay as they are.
        """
        named = {}
        for key, value in state.items():
            words = key.split(".")
            if words[0] in ("conv_head", "bn2", "classifier") or words[-1] == "num_batches_tracked":
                continue
            if words[0] in OUTER and len(words) == 2:
                key = f"stem.{words[1] if words[0] == 'conv_stem' else FIELDS.get(words[1], words[1])}"
            elif words[0] == "blocks" and len(words) == 5:
                part = (FIRST_PARTS if words[1] == "0" else PARTS).get(words[3], words[3])
                field = words[4] if words[3].startswith("conv") else FIELDS.get(words[4], words[4])
                key = f"stages.{words[1]}.{words[2]}.{part}.{field}"
            named[key] = value
        return named

    def forward(self, image: Tensor, text: TextFeatures | None = None) -> list[Tensor]:
        """Return four maps, fine to coarse, of normalised images [B, 3, H, W]; `text` is unread."""
        x, maps = image * self.scale + self.shift, list[Tensor]()
        # What is frozen at the beginning needs no gradient and runs in the layout that is a third faster on a CPU; the backward pass of
        # torch 2.13 corrupts memory in it (see resnet.py).
        learns = [torch.is_grad_enabled() and any(p.requires_grad for p in part.parameters()) for part in (self.stem, *self.stages)]
        first = learns.index(True) if True in learns else len(learns)
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            x = self._run(0, first, x.contiguous(memory_format=torch.channels_last), maps)
        x, maps = x.contiguous(), [m.contiguous() for m in maps]
        self._run(first, len(learns), x, maps)
        return maps

    def _run(self, start: int, stop: int, x: Tensor, maps: list[Tensor]) -> Tensor:
        """Run the stem (0) and stages (from 1 on), and add the maps that are given out."""
        for number in range(start, stop):
            if number == 0:
                x = F.relu6(self.stem(x), inplace=True)
                continue
            for block in self.stages[number - 1].children():
                x = run_block(block, x, recompute=self.recompute and self.training)
            if number - 1 in GIVEN_AFTER:
                maps.append(x)
        return x
