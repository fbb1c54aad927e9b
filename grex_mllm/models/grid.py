"""Parts of systems that work on one square grid of cells (VLT, M3Att): maps summed on the grid, attention layers, the way back to a mask.

The thesis has batch normalisation in all of these; here GroupNorm on maps, unless `model.map_norm` wants that of the batch, and LayerNorm
on tokens, because small batches, accumulation and padded words break batch statistics. Words that are padding are masked everywhere, which
the papers leave open.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.errors import fault
from grex_mllm.models.decoders.rela.network import Feedforward
from grex_mllm.models.norms import map_norm
from grex_mllm.models.positions import sine_positions
from grex_mllm.ops.attention import attend, split_heads
from grex_mllm.ops.upsampled_conv import upsampled_conv
from grex_mllm.types import DecoderInputs, PixelFeatures, TextFeatures

FOUR, THREE = MAPS = ("four", "three")


class ConvReluNorm(nn.Module):
    """Conv of VLT's equations: a convolution, ReLU, normalisation."""

    def __init__(self, channels: int, out: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2)
        self.norm = map_norm(out)

    def forward(self, x: Tensor, upsampled: bool = False) -> Tensor:
        """upsampled: upsample by two (nearest) first."""
        return self.norm(F.relu(upsampled_conv(x, self.conv.weight, self.conv.bias) if upsampled else self.conv(x)))


class ConvNormRelu(nn.Module):
    """A convolution, normalisation, ReLU."""

    def __init__(self, channels: int, out: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)
        self.norm = map_norm(out)

    def forward(self, x: Tensor, upsampled: bool = False) -> Tensor:
        """upsampled: upsample by two (nearest) first."""
        return F.relu_(self.norm(upsampled_conv(x, self.conv.weight) if upsampled else self.conv(x)))


class TokenReluNorm(nn.Module):
    """Conv of VLT's equations on a sequence: kernel 1 (a wider one would mix padding in, and has no second axis), ReLU, normalisation.

    shift: False for keys, where the same number for all words would change nothing.
    """

    def __init__(self, channels: int, out: int, shift: bool = True) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(channels, out), nn.LayerNorm(out, bias=shift)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.relu(self.linear(x)))


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017). Keys have no bias: it would add one number to all logits of a softmax."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise fault(f"decoder width {width} with {num_heads} heads", "heads that divide the width", "fix model.decoder")
        self.num_heads = num_heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, memory: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Attend from float [E, Q, C] to float [E, S, C]; allowed: bool, broadcastable to [E, heads, Q, S]."""
        q, k, v = (split_heads(t, self.num_heads) for t in (self.query(x), self.key(memory), self.value(memory)))
        return self.out(attend(q, k, v, allowed).transpose(1, 2).flatten(2))


class AttentionLayer(nn.Module):
    """LN(x + Attention(x, memory))."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention, self.norm = Attention(width, num_heads), nn.LayerNorm(width)

    def forward(self, x: Tensor, memory: Tensor, allowed: Tensor | None = None) -> Tensor:
        return self.norm(x + self.attention(x, memory, allowed))


class EncoderLayer(nn.Module):
    """Standard layer (Vaswani et al. 2017): self-attention and feed-forward, normalised after each residual."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attention, self.feedforward = AttentionLayer(width, num_heads), Feedforward(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.feedforward(self.self_attention(x, x))


class DecoderLayer(nn.Module):
    """Standard layer: attention among the queries, to the memory, feed-forward."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attention, self.cross_attention = AttentionLayer(width, num_heads), AttentionLayer(width, num_heads)
        self.feedforward = Feedforward(width, hidden)

    def forward(self, x: Tensor, memory: Tensor, allowed: Tensor | None = None) -> Tensor:
        """x: float [E, Q, C].  memory: float [E, S, C].  allowed: bool [E, 1, 1, Q], which queries are real."""
        return self.feedforward(self.cross_attention(self.self_attention(x, x, allowed), memory))


class Encoder(nn.Module):
    """Cells of a map and their fixed sine positions through standard layers."""

    def __init__(self, width: int, num_heads: int, hidden: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(width, num_heads, hidden) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """Return [E, h * w, C] of a map [E, C, h, w]."""
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + sine_positions(x.shape[-2], x.shape[-1], x.shape[1], x.device, x.dtype)
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens


class GridSum(nn.Module):
    """Sum the maps of an image on one square grid: F_vr of VLT, F_vis of M3Att (their last three maps, brought to one size and width).

    maps: four = with the finest map, which then trains too; three = as the papers. The grid is of a fixed side, because both have
    matrices with a row for each cell.
    """

    def __init__(self, maps: str, side: int, width: int, inputs: DecoderInputs) -> None:
        super().__init__()
        if maps not in MAPS:
            raise fault(f'model.decoder.maps is "{maps}"', " or ".join(MAPS), "choose one of them")
        if inputs.width != width:
            raise fault(f"model.decoder.width {width}, pixel decoder {inputs.width}", "the same width", "fix model.decoder.width")
        self.side = side
        self.fine = nn.Conv2d(inputs.mask_width, width, 1) if maps == FOUR else None

    def forward(self, pixels: PixelFeatures) -> Tensor:
        """Return float [B, C, side, side]."""
        size = (self.side, self.side)
        maps = [*pixels.levels, *([self.fine(pixels.mask_features)] if self.fine is not None else [])]
        total = torch.stack([F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in maps]).sum(dim=0)
        # what made the finest map has a gradient of zero rather than none, so that all processes wait for the same weights
        return total if self.fine is not None else total + pixels.mask_features.mean() * 0.0


class MaskUpsampler(nn.Module):
    """Convolutions with upsampling by two between, to a mask of one channel.

    last: kernel of the last convolution. VLT: three 3x3 convolutions, each followed by upsampling, then 1x1; M3Att: four of 3x3.
    """

    def __init__(self, channels: int, widths: list[int], last: int, block: type[ConvReluNorm] | type[ConvNormRelu]) -> None:
        super().__init__()
        if not widths:
            raise fault("model.decoder.mask_widths is empty", "a width for each convolution before the last", "name them")
        self.blocks = nn.ModuleList(block(a, b) for a, b in pairwise([channels, *widths]))
        self.last = nn.Conv2d(widths[-1], 1, last, padding=last // 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mask logits float [E, h * 2^n, w * 2^n] and the map after the first convolution, float [E, C, h, w]."""
        first = x = self.blocks[0](x)
        for block in self.blocks[1:]:
            x = block(x, upsampled=True)
        return upsampled_conv(x, self.last.weight, self.last.bias).squeeze(1), first


def word_rows(mask: Tensor) -> Tensor:
    """Return bool [E, L]: the real rows of a text but the sentence's own, row 0; that row, where there is no other. mask: [E, L]."""
    words = mask.bool() & (torch.arange(mask.shape[1], device=mask.device) > 0)
    return words | (mask.bool() & ~words.any(dim=1, keepdim=True))


def split_words(text: TextFeatures) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sentence float [E, C], the words float [E, N_t, C], and bool [E, N_t] which are real.

    A text without words has its sentence as its only one.
    """
    sentence, short = text.tokens[:, 0], max(0, 2 - text.tokens.shape[1])
    words, real = F.pad(text.tokens[:, 1:], (0, 0, 0, short)), F.pad(text.mask[:, 1:].bool(), (0, short))
    without = ~real.any(dim=1, keepdim=True)
    first = without & (torch.arange(real.shape[1], device=real.device) == 0)
    return sentence, torch.where(first[..., None], sentence[:, None], words), real | first
