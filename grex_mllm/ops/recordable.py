"""Operations that torch has and ONNX has not, or not with sizes that vary: torch's own as a rule, another way while a model is recorded."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.ops.attention import split_heads
from grex_mllm.ops.paths import traced


def stable_order(values: Tensor, descending: bool = False) -> Tensor:
    """Return int64 [..., N]: positions along the last dimension in the order of their values, equal ones as they come."""
    if not traced():
        return values.argsort(dim=-1, descending=descending, stable=True)
    first, second = values[..., None, :], values[..., :, None]  # [..., i, j]: of j and of i
    place = torch.arange(values.shape[-1], device=values.device)
    earlier = (first == second) & (place[None, :] < place[:, None])
    before = (first > second) if descending else (first < second)
    rank = (before | earlier).long().sum(-1)
    return torch.zeros_like(rank).scatter(-1, rank, place.expand_as(rank))


def area_pool(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Return [B, N, h, w]: the means of the h x w equal parts of [B, N, H, W], as `adaptive_avg_pool2d` has them."""
    if not traced():
        return F.adaptive_avg_pool2d(values, size)
    rows, columns = (_shares(values.shape[2 + i], size[i], values) for i in range(2))
    return rows @ values @ columns.transpose(0, 1)


def among_themselves(layer: nn.TransformerEncoderLayer, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return what a pre-norm layer, without dropout, makes of tokens [E, P, D]; mask: bool [E, P], what is no padding."""
    if not traced():
        return layer(tokens, src_key_padding_mask=~mask)  # type: ignore[no-any-return]
    attention = layer.self_attn  # as torch has it, its number of tokens would become a constant
    joined = F.linear(layer.norm1(tokens), attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = (split_heads(part, attention.num_heads) for part in joined.chunk(3, dim=-1))
    read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
    tokens = tokens + attention.out_proj(read.transpose(1, 2).flatten(2))
    return tokens + layer.linear2(layer.activation(layer.linear1(layer.norm2(tokens))))  # type: ignore[no-any-return]


def _shares(pixels: int, cells: int, like: Tensor) -> Tensor:
    """Return [cells, pixels]: the weight of each pixel in each cell's mean; a cell covers every pixel that it touches."""
    pixel, cell = torch.arange(pixels, device=like.device), torch.arange(cells, device=like.device)
    start = torch.div(cell * pixels, cells, rounding_mode="floor")
    stop = torch.div((cell + 1) * pixels + cells - 1, cells, rounding_mode="floor")
    inside = (pixel[None] >= start[:, None]) & (pixel[None] < stop[:, None])
    return inside.to(like.dtype) / (stop - start)[:, None].to(like.dtype)
