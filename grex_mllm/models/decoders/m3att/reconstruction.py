"""Language feature reconstruction: what comes out of the decoder must still tell the words (thesis, section 5.1.3, Eq. 5.4).

The target is itself learned from the words (W_proj), and both sides could agree on one vector for all sentences at no cost. Two things keep
it from that: its rows are normalised before their ReLU, without a learned scale or shift, so that neither a matrix of zeros nor a constant
is a way out; and `detach` stops its gradient altogether. The criterion reports how far the targets of a batch lie apart.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_LAYERS = 3
TEMPERATURE = 10000.0


class Reconstruction(nn.Module):
    """F_rec and F_proj. detach: no gradient into F_proj, whose W_proj then stays as it was drawn."""

    def __init__(self, width: int, detach: bool) -> None:
        super().__init__()
        self.detach = detach
        self.project, self.norm = nn.Linear(width, width, bias=False), nn.LayerNorm(width, elementwise_affine=False)
        self.project.requires_grad_(not detach)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(NUM_LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(NUM_LAYERS))

    def forward(self, decoded: Tensor, words: Tensor, sentence: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Return F_rec and F_proj, float [E, C] each.

        decoded: F_dec, float [E, N_t, C].  words: F_t, float [E, N_t, C].  sentence: F'_t, float [E, C].  real: bool [E, N_t].
        """
        share = real[..., None].to(decoded.dtype)
        count = share.sum(dim=1)
        placed = words + word_positions(words.shape[1], words.shape[2], words)
        rows = F.relu(self.norm(self.project(torch.cat([placed, sentence[:, None]], dim=1))))
        projected = ((rows[:, :-1] * share).sum(dim=1) + rows[:, -1]) / (count + 1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            decoded = F.relu(norm(layer(decoded)))
        return (decoded * share).sum(dim=1) / count.clamp(min=1), projected.detach() if self.detach else projected


def word_positions(num: int, width: int, like: Tensor) -> Tensor:
    """Return sine and cosine codes of places 0, 1, ..., float [num, width] (Vaswani et al. 2017)."""
    place = torch.arange(num, device=like.device, dtype=torch.float32)[:, None]
    step = torch.arange(0, width, 2, device=like.device, dtype=torch.float32) * (-math.log(TEMPERATURE) / width)
    phase = place * step.exp()
    return torch.stack([phase.sin(), phase.cos()], dim=2).flatten(1)[:, :width].to(like.dtype)
