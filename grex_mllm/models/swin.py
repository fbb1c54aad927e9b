"""Swin transformer image encoder (Liu et al. 2021), with language fused after every stage as in the released ReLA.

The fusion is the pixel-word attention of LAVT (Yang et al. 2022).

Differences from other Swins: the map is padded before it is rolled; odd blocks shift even where the map is smaller than the window.
Work that padding tokens do not need is skipped: they are constants before attention (normalised zeros), and are dropped after it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.config import VisionConfig
from grex_mllm.errors import fault
from grex_mllm.models.pwam import PixelWordAttention
from grex_mllm.models.windows import from_windows, to_windows, window_layout
from grex_mllm.ops.feedforward import feedforward
from grex_mllm.ops.recompute import run_block
from grex_mllm.types import TextFeatures

PATCH = 4
MLP_RATIO = 4
INIT_STD = 0.02


class PatchEmbedding(nn.Module):
    """Embed 4x4 patches and normalise: [B, 3, H, W] -> [B, C, h, w]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:
        image = F.pad(image, (0, -image.shape[-1] % PATCH, 0, -image.shape[-2] % PATCH))
        return self.norm(self.proj(image).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class WindowAttention(nn.Module):
    """Self-attention within windows, with a learned relative position bias."""

    def __init__(self, width: int, num_heads: int, window: int) -> None:
        super().__init__()
        if width % num_heads:
            raise fault(f"swin width {width} with {num_heads} heads", "heads that divide the width", "fix model.vision.swin_heads")
        self.num_heads, self.window = num_heads, window
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=INIT_STD)

    def forward(self, x: Tensor, height: int, width: int, shift: int) -> Tensor:
        """Attend within the windows of B maps.

        x: float [B, height * width, C], normalised.  Padding tokens are zeros here, so their query, key and value are the bias of `qkv`.
        """
        batch, _, channels = x.shape
        layout = window_layout(batch, height, width, self.window, shift, x.device)
        size = self.window**2
        slots = to_windows(self.qkv(x.reshape(-1, channels)), layout, self.qkv.bias)
        slots = slots.view(-1, size, 3, self.num_heads, channels // self.num_heads)
        parts = []
        # split, not slices: the gradient of a slice is a tensor as large as all slots
        for kind, windows in zip(layout.kinds, slots.split([kind.last - kind.first for kind in layout.kinds]), strict=True):
            query, key, value = windows.permute(2, 0, 3, 1, 4)
            asking = query if kind.real == size else query[:, :, : kind.real]
            scores = self.relative_position_bias_table[kind.pairs].view(kind.real, size, -1).permute(2, 0, 1)
            if kind.mask is not None:
                scores = scores + kind.mask.to(scores.dtype)
            scores = scores.to(query.dtype).contiguous()[None]
            attended = F.scaled_dot_product_attention(asking, key, value, attn_mask=scores)
            parts.append(attended.transpose(1, 2).reshape(-1, channels))
        return self.proj(from_windows(torch.cat(parts) if len(parts) > 1 else parts[0], layout)).view(batch, -1, channels)


class Mlp(nn.Module):
    """Two linear layers with exact GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return feedforward(x, self.fc1, self.fc2, "gelu")


class SwinBlock(nn.Module):
    """x += WindowAttention(LN x); x += Mlp(LN x); both paths are dropped per sample in training with probability `drop_path`."""

    def __init__(self, width: int, num_heads: int, window: int, shift: int, drop_path: float) -> None:
        super().__init__()
        self.shift, self.drop_path = shift, drop_path
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, num_heads, window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x + self._drop(self.attn(self.norm1(x), height, width, self.shift))
        return x + self._drop(self.mlp(self.norm2(x)))

    def _drop(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        return x * ((torch.rand(len(x), 1, 1, device=x.device) < keep).to(x.dtype) / keep)


class PatchMerging(nn.Module):
    """Halve the map: concatenate 2x2 tokens (down the column first), normalise, project to twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """x: float [B, height * width, C] -> [B, ceil(height / 2) * ceil(width / 2), 2 C]."""
        grid = x.view(len(x), height, width, -1)
        grid = F.pad(grid, (0, 0, 0, width % 2, 0, height % 2))
        quarters = [grid[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(quarters, dim=-1).flatten(1, 2)))


class SwinStage(nn.Module):
    """Blocks, then the language fusion and its gate, then the halving; the last stage has no gate and no halving."""

    def __init__(self, config: VisionConfig, stage: int, drop_paths: list[float], text_width: int) -> None:
        super().__init__()
        width = config.embed_width * 2**stage
        self.blocks = nn.ModuleList(
            SwinBlock(width, config.swin_heads[stage], config.window, (i % 2) * (config.window // 2), p) for i, p in enumerate(drop_paths)
        )
        last = stage == len(config.swin_depths) - 1
        fused = config.fusion == "pwam"
        self.fusion = PixelWordAttention(width, text_width) if fused else None
        self.gate = None
        if fused and not last:
            self.gate = nn.Sequential(nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, width, bias=False), nn.Tanh())
        self.downsample = None if last else PatchMerging(width)
        self.recompute = config.gradient_checkpointing

    def run_blocks(self, x: Tensor, height: int, width: int) -> Tensor:
        """Run the blocks alone: float [B, height * width, C] -> the same."""
        for block in self.blocks:
            x = run_block(block, x, height, width, recompute=self.recompute)
        return x


class SwinTransformer(nn.Module):
    """Encode an image, and with fusion the expression too, into four maps at strides 4, 8, 16, 32, fine to coarse.

    With fusion pwam the maps are the fused M of every stage; without text (generation) they are the stages' own tokens.
    """

    strides = (4, 8, 16, 32)

    def __init__(self, config: VisionConfig, text_width: int) -> None:
        super().__init__()
        if config.fusion not in ("none", "pwam"):
            raise fault(f'model.vision.fusion "{config.fusion}"', "none or pwam", "fix the name")
        if not len(config.swin_depths) == len(config.swin_heads) == len(self.strides):
            raise fault(f"swin_depths {config.swin_depths}, swin_heads {config.swin_heads}", "four numbers in each", "fix the lists")
        self.fuses_language = config.fusion == "pwam"
        self.patch_embed = PatchEmbedding(config.embed_width)
        blocks = sum(config.swin_depths)
        drops = [config.drop_path * i / max(blocks - 1, 1) for i in range(blocks)]
        starts = [sum(config.swin_depths[:i]) for i in range(4)]
        self.stages = nn.ModuleList(
            SwinStage(config, i, drops[start : start + depth], text_width)
            for i, (start, depth) in enumerate(zip(starts, config.swin_depths, strict=True))
        )
        self.channels = tuple(config.embed_width * 2**i for i in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self._start_fusion(config.fusion_start)

    def _start_fusion(self, start: str) -> None:
        """Initialise fusion and gates as the released ReLA (gates closed) or as LAVT (gates as all matrices, projections as torch does)."""
        if start not in ("closed", "open"):
            raise fault(f'model.vision.fusion_start "{start}"', "closed or open", "fix the name")
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and start == "open" and ".fusion." in name:
                module.reset_parameters()
            elif isinstance(module, nn.Linear) and start == "closed" and ".gate." in name:
                nn.init.zeros_(module.weight)

    def leave_out(self, number: int) -> None:
        """Drop the norms of the finest maps, which nothing reads; without a reader they would get no gradient."""
        for i in range(number):
            self.norms[i] = nn.Identity()

    def encode_prefix(self, image: Tensor) -> Tensor:
        """Do the work before the first fusion once per image: patches and the first stage's blocks. Returns float [B, C, h, w]."""
        x = self.patch_embed(image)
        height, width = x.shape[-2:]
        first: Any = self.stages[0]
        tokens = first.run_blocks(x.flatten(2).transpose(1, 2), height, width)
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    def finish(self, prefix: Tensor, image_index: Tensor | None, text: TextFeatures | None) -> list[Tensor]:
        """Continue from `encode_prefix` for E expressions.

        image_index: int64 [E], image of each expression; None = expression i belongs to image i.
        Returns float [E, C_i, h_i, w_i], fine to coarse.
        """
        height, width = prefix.shape[-2:]
        x = prefix.flatten(2).transpose(1, 2)
        # one image needs no copies: the first fusion makes a map per expression of it
        spread = len(x) == 1 and text is not None and self.fuses_language
        if image_index is not None and not spread:
            x = x.index_select(0, image_index)
        maps = []
        stage: Any
        for i, (stage, norm) in enumerate(zip(self.stages, self.norms, strict=True)):
            if i > 0:
                x = stage.run_blocks(x, height, width)
            fused = stage.fusion is not None and text is not None
            out = stage.fusion(x, text) if fused else x
            maps.append(norm(out).transpose(1, 2).unflatten(2, (height, width)))
            if stage.downsample is not None:
                if fused:
                    x = x + stage.gate(out) * out
                x = stage.downsample(x, height, width)
                height, width = (height + 1) // 2, (width + 1) // 2
        return maps

    def forward(self, image: Tensor, text: TextFeatures | None = None) -> list[Tensor]:
        """Return the maps of normalised images [B, 3, H, W]; `text`, one row per image, is read only with fusion."""
        return self.finish(self.encode_prefix(image), None, text if self.fuses_language else None)
