"""Residual convolutional image encoder: the ResNet-50 of the released ReLA, and small ones for training from scratch.

He et al. 2016; the stride lies in the 3x3 convolution of a bottleneck. The frozen batch norm is the released one: constants, no statistics.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.config import VisionConfig
from grex_mllm.errors import fault
from grex_mllm.ops.recompute import run_block
from grex_mllm.types import TextFeatures

GROUPS = 8
STAGE_STRIDES = (1, 2, 2, 2)


class FrozenBatchNorm(nn.Module):
    """Scale and shift every channel by stored constants: batch norm at test time, whose numbers never train."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps = 1e-5

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels) - self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps)


def build_norm(kind: str, channels: int) -> nn.Module:
    """Return the normalisation of `channels` maps: frozen_batch | group.

    Raises:
        GrexError: unknown kind, or channels that cannot be split into groups.
    """
    if kind == "frozen_batch":
        return FrozenBatchNorm(channels)
    if kind == "group":
        if channels % GROUPS:
            raise fault(f"{channels} channels with norm group", f"a multiple of {GROUPS}", "change model.vision.widths or norm")
        return nn.GroupNorm(GROUPS, channels)
    raise fault(f'model.vision.norm "{kind}"', "frozen_batch or group", "fix the name")


class Shortcut(nn.Module):
    """Bring the input of a block to its output's width and stride."""

    def __init__(self, in_width: int, out_width: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_width, out_width, 1, stride, bias=False)
        self.norm = build_norm(norm, out_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Block(nn.Module):
    """Add convolutions to the input: two of 3x3 (the first strided), or with an inner width 1x1, 3x3 (strided), 1x1."""

    def __init__(self, in_width: int, out_width: int, inner_width: int | None, stride: int, norm: str) -> None:
        super().__init__()
        convolutions = [(in_width, out_width, 3, stride), (out_width, out_width, 3, 1)]
        if inner_width is not None:
            convolutions = [(in_width, inner_width, 1, 1), (inner_width, inner_width, 3, stride), (inner_width, out_width, 1, 1)]
        self.numbers = range(1, len(convolutions) + 1)
        for i, (before, after, size, step) in zip(self.numbers, convolutions, strict=True):
            self.add_module(f"conv{i}", nn.Conv2d(before, after, size, step, size // 2, bias=False))
            self.add_module(f"norm{i}", build_norm(norm, after))
        same = in_width == out_width and stride == 1
        self.shortcut = None if same else Shortcut(in_width, out_width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in self.numbers:
            y = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(y if i == 1 else F.relu_(y)))
        return F.relu_(y + (x if self.shortcut is None else self.shortcut(x)))


class Stage(nn.Sequential):
    """Blocks one after the other; recompute: their insides are not kept for the backward pass."""

    def __init__(self, *blocks: Block, recompute: bool) -> None:
        super().__init__(*blocks)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = run_block(block, x, recompute=self.recompute)
        return x


class Stem(nn.Module):
    """conv7: 7x7 convolution of stride 2, norm, ReLU, 3x3 max pool of stride 2.  conv3: 3x3 convolution of stride 2, norm, ReLU."""

    def __init__(self, kind: str, in_channels: int, width: int, norm: str) -> None:
        super().__init__()
        if kind not in ("conv7", "conv3"):
            raise fault(f'model.vision.stem "{kind}"', "conv7 or conv3", "fix the name")
        size = 7 if kind == "conv7" else 3
        self.pooled = kind == "conv7"
        self.conv = nn.Conv2d(in_channels, width, size, 2, size // 2, bias=False)
        self.norm = build_norm(norm, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.norm(self.conv(x)))
        return F.max_pool2d(x, 3, 2, 1) if self.pooled else x


class ResNet(nn.Module):
    """Encode an image into four maps, fine to coarse: strides 4, 8, 16, 32 with the conv7 stem, 2, 4, 8, 16 with conv3."""

    fuses_language = False

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        if not len(config.widths) == len(config.depths) == len(STAGE_STRIDES):
            raise fault(
                f"model.vision.widths {config.widths} and depths {config.depths}", f"{len(STAGE_STRIDES)} numbers in each", "fix the lists"
            )
        self.coordinates = config.coordinates
        self.stem = Stem(config.stem, 5 if config.coordinates else 3, config.stem_width, config.norm)
        first = 4 if config.stem == "conv7" else 2
        self.strides = tuple(first * 2**i for i in range(4))
        self.channels = tuple(config.widths)
        if config.block not in ("basic", "bottleneck"):
            raise fault(f'model.vision.block "{config.block}"', "basic or bottleneck", "fix the name")
        self.stages = nn.ModuleList()
        width = config.stem_width
        for i, (out_width, depth, stride) in enumerate(zip(config.widths, config.depths, STAGE_STRIDES, strict=True)):
            inner = config.bottleneck_widths[i] if config.block == "bottleneck" else None
            blocks = [Block(out_width if j else width, out_width, inner, 1 if j else stride, config.norm) for j in range(depth)]
            self.stages.append(Stage(*blocks, recompute=config.gradient_checkpointing))
            width = out_width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor, text: TextFeatures | None = None) -> list[Tensor]:
        """Return the maps of normalised images.

        image: float [B, 3, H, W].  text: unread; language enters later.
        Returns float [B, C_i, H / stride_i, W / stride_i], fine to coarse.
        """
        x = append_coordinates(image) if self.coordinates else image
        # Channels last is a fifth faster on CPU for the large nets. But the backward pass of torch 2.13 corrupts memory in that layout
        # (double free; small channel counts, float32, two threads).
        x = self.stem(x if torch.is_grad_enabled() else x.contiguous(memory_format=torch.channels_last))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def append_coordinates(image: Tensor) -> Tensor:
    """Append two channels with the x and y of every pixel centre in (-1, 1): [B, C, H, W] -> [B, C + 2, H, W] (Liu et al. 2018)."""
    batch, _, height, width = image.shape
    y = (torch.arange(height, device=image.device, dtype=image.dtype) * 2 + 1) / height - 1
    x = (torch.arange(width, device=image.device, dtype=image.dtype) * 2 + 1) / width - 1
    grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)])
    return torch.cat([image, grid.expand(batch, 2, height, width)], dim=1)
