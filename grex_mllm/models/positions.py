"""Sine position codes (DETR, Carion et al. 2020, appendix), as the released ReLA computes them."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from grex_mllm.ops.paths import traced

TEMPERATURE = 10000.0
EPS = 1e-6


def sine_positions(height: int, width: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the code of every cell, [height * width, channels]: first half y, second half x, sine and cosine interleaved.

    Coordinates are 1-based, divided by the last and scaled to 2 pi. Computed in float32 whatever the dtype, as released.
    """
    if traced():  # a size that may vary is no key
        return _sine_positions(height, width, channels, device, dtype)
    return _kept_positions(height, width, channels, device, dtype)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept must serve training too
def _kept_positions(height: int, width: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return _sine_positions(height, width, channels, device, dtype)


def _sine_positions(height: int, width: int, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    half = channels // 2
    y = torch.arange(1, height + 1, dtype=torch.float32, device=device)
    x = torch.arange(1, width + 1, dtype=torch.float32, device=device)
    y, x = (v / (v[-1] + EPS) * (2 * math.pi) for v in (y, x))
    frequency = torch.arange(half, dtype=torch.float32, device=device)
    frequency = TEMPERATURE ** (2 * torch.div(frequency, 2, rounding_mode="floor") / half)
    codes = []
    for v in (y, x):
        phase = v[:, None] / frequency
        codes.append(torch.stack([phase[:, 0::2].sin(), phase[:, 1::2].cos()], dim=2).flatten(1))
    rows = codes[0][:, None].expand(height, width, half)
    columns = codes[1][None].expand(height, width, half)
    return torch.cat([rows, columns], dim=2).reshape(height * width, channels).to(dtype)
