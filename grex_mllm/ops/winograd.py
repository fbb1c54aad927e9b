"""A 3x3 convolution with fewer products: Winograd's minimal filtering (Lavin and Gray 2016, section 4), tiles of 4 x 4 outputs."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from grex_mllm.ops.paths import on_cpu, traced

KERNEL, TILE = 3, 4
REACH = TILE + KERNEL - 1  # numbers of a row that a tile reads
# where the polynomials are evaluated, beside infinity; 0, 1, -1, 2, -2, as in the article, round twice as much
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
MOST_NUMBERS = 2**22  # of transformed input at a time
LEAST_CHANNELS, LEAST_CELLS = 128, 2500  # fewer are as quick without


def conv3x3(x: Tensor, weight: Tensor) -> Tensor:
    """Return the convolution, zeros around, of float [B, C, h, w] with float [O, C, 3, 3]: float [B, O, h, w].

    Without gradients, on a CPU in float32, large maps are computed by Winograd's way: 36 products for a tile in place of 144. Rounding
    grows about sevenfold (root mean square 1.5e-6 of a result of size 1, plainly 2.2e-7). 256 to 256 channels, 120 x 120, one thread that
    is held to AVX2, other programs beside, processor seconds: 0.24 -> 0.13; not held to it, 0.15 -> 0.11.
    """
    if not _pays(x, weight):
        return F.conv2d(x, weight, padding=KERNEL // 2)
    batch, channels, height, width = x.shape
    rows, columns = -(-height // TILE), -(-width // TILE)
    out = x.new_empty(batch, len(weight), rows, TILE, columns, TILE)
    before, after, kernel = transforms()
    into, back = torch.kron(before, before).to(x.dtype), torch.kron(after, after).to(x.dtype)
    kernels = torch.einsum("ai,bj,ocij->aboc", kernel, kernel, weight.to(kernel.dtype)).flatten(0, 1).to(x.dtype)
    around = (1, TILE * columns + 1 - width, 1, TILE * rows + 1 - height)
    step = max(1, MOST_NUMBERS // (REACH**2 * channels * columns))
    for image, answer in zip(x, out, strict=True):
        padded = F.pad(image, around)
        for row in range(0, rows, step):
            last = min(row + step, rows)
            tiles = padded[:, TILE * row : TILE * (last - 1) + REACH].unfold(1, REACH, TILE).unfold(2, REACH, TILE)
            seen = (into @ tiles.permute(3, 4, 0, 1, 2).reshape(REACH**2, -1)).view(REACH**2, channels, -1)
            made = (back @ torch.bmm(kernels, seen).view(REACH**2, -1)).view(TILE, TILE, -1, last - row, columns)
            answer[:, row:last] = made.permute(2, 3, 0, 4, 1)
    return out.view(batch, len(weight), TILE * rows, TILE * columns)[..., :height, :width]


def _pays(x: Tensor, weight: Tensor) -> bool:
    return (
        on_cpu(x)
        and not torch.is_grad_enabled()
        and not traced()
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and min(weight.shape[:2]) >= LEAST_CHANNELS
        and x.shape[-2] * x.shape[-1] >= LEAST_CELLS
    )


@functools.cache
@torch.inference_mode(False)  # what is kept must serve training too
def transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Return the matrices of one dimension: of the input [6, 6], of the output [4, 6] and of the kernel [6, 3], float64.

    output = after ((kernel k) * (before d)) for any six numbers d and kernel k: `kernel` and `after` evaluate polynomials at POINTS and at
    infinity (Toom and Cook), `before` solves that equation.
    """
    points = torch.tensor(POINTS, dtype=torch.float64)
    apart = points[:, None] - points
    kernel = torch.vander(points, KERNEL, increasing=True) / (apart + torch.eye(len(points))).prod(dim=1, keepdim=True)
    after = torch.vander(points, TILE, increasing=True).T
    end = torch.eye(REACH, dtype=torch.float64)[-1]
    kernel = torch.cat([kernel, end[-KERNEL:][None]])
    after = torch.cat([after, end[-TILE:, None]], dim=1)
    products = torch.einsum("ij,jk->ikj", after, kernel).flatten(0, 1)
    wanted = torch.stack([end.roll(i + k + 1) for i in range(TILE) for k in range(KERNEL)])
    return torch.linalg.lstsq(products, wanted).solution, after, kernel
