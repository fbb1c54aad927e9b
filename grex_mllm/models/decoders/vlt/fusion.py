"""Language into the map, before the transformer: spatial-dynamic fusion (thesis, Eq. 4.1-4.3), and what table 4.4 sets beside it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.errors import fault
from grex_mllm.models.grid import ConvReluNorm, TokenReluNorm
from grex_mllm.models.norms import map_norm
from grex_mllm.types import TextFeatures

SPATIAL, TILE, TILE_CONVOLUTIONS = FUSIONS = ("spatial", "tile", "tile_convolutions")
MORE_CONVOLUTIONS = 3  # of tile_convolutions: with the fusing one four, as many weights as three 3x3 "Conv" and the fusing one


class FusionImages(NamedTuple):
    """The language-free part of the fusion for B images.

    cells: float [B, C, h, w], the vision half of the fusing convolution.  keys: float [B, h * w, C], Conv(F_vr) of Eq. 4.1; None where the
    sentence is tiled.
    """

    cells: Tensor
    keys: Tensor | None


class ImageFusion(nn.Module):
    """What the fusion reads of an image. The convolution over [F_sdl ; F_vr] is the sum of two; this is the half over F_vr."""

    def __init__(self, fusion: str, width: int) -> None:
        super().__init__()
        if fusion not in FUSIONS:
            raise fault(f'model.decoder.fusion is "{fusion}"', f"one of {', '.join(FUSIONS)}", "choose one of them")
        self.key = ConvReluNorm(width, width) if fusion == SPATIAL else None
        self.fuse = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, visual: Tensor) -> FusionImages:
        """visual: F_vr, float [B, C, h, w]."""
        keys = None if self.key is None else self.key(visual).flatten(2).transpose(1, 2)
        return FusionImages(self.fuse(visual), keys)


class LanguageFusion(nn.Module):
    """F_fused of E expressions."""

    def __init__(self, fusion: str, width: int) -> None:
        super().__init__()
        self.key = TokenReluNorm(width, width, shift=False) if fusion == SPATIAL else None
        self.value = TokenReluNorm(width, width)
        self.fuse = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = map_norm(width)
        self.more = nn.ModuleList(ConvReluNorm(width, width) for _ in range(MORE_CONVOLUTIONS if fusion == TILE_CONVOLUTIONS else 0))

    def forward(self, images: FusionImages, image_index: Tensor, text: TextFeatures) -> Tensor:
        """Return F_fused, float [E, C, h, w]. image_index: int64 [E].  text: tokens [E, L, C], the sentence among them."""
        cells = images.cells[image_index]
        attention, values = self.attend(images, image_index, text), self.value(text.tokens)
        fused = self.norm(F.relu(cells + self._language_half(attention, values, cells.shape[-2:])))
        for block in self.more:
            fused = block(fused)
        return fused

    def attend(self, images: FusionImages, image_index: Tensor, text: TextFeatures) -> Tensor:
        """Return A_sd of Eq. 4.1, float [E, h * w, L]: how much each cell reads of each row; all of the sentence's where it is tiled."""
        if self.key is None or images.keys is None:
            first = F.one_hot(torch.zeros_like(image_index), text.tokens.shape[1]).to(text.tokens.dtype)
            return first[:, None].expand(-1, images.cells.shape[-2] * images.cells.shape[-1], -1)
        logits = images.keys[image_index] @ self.key(text.tokens).transpose(1, 2) * text.tokens.shape[-1] ** -0.5
        return logits.masked_fill(~text.mask.bool()[:, None], -torch.inf).softmax(dim=-1)

    def _language_half(self, attention: Tensor, values: Tensor, size: torch.Size) -> Tensor:
        """Return the convolution over F_sdl = A_sd V (Eq. 4.2): float [E, C, h, w].

        It is linear, so the kernels are multiplied with the L values first and slide over the L attention maps then: a twelfth of the
        work over C channels.
        """
        maps = attention.transpose(1, 2).unflatten(2, size).to(values.dtype)
        kernels = torch.einsum("oiyx,eli->eolyx", self.fuse.weight.to(values.dtype), values).flatten(2)
        return (kernels @ F.unfold(maps, 3, padding=1)).unflatten(2, size)
