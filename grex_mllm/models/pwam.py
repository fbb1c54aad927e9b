"""Pixel-word attention: language into every position of a map (LAVT, Yang et al. 2022, section 3.2), as the released ReLA computes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.ops.attention import softmax_of_few
from grex_mllm.types import TextFeatures

# released: how far the logit of a padding token is pushed down
PADDING_LOGIT = 1e4
EPS = 1e-5


def normalise_positions(x: Tensor) -> Tensor:
    """Normalise every channel of float [B, S, C] over its S positions (instance norm, biased variance, nothing learned)."""
    # two plain means: var_mean over a dimension that is not the last takes twice as long on CPU
    centred = x - x.mean(dim=1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dim=1, keepdim=True) + EPS)


class PixelWordAttention(nn.Module):
    """Attend from every position to the words, and gate the visual features with what was read: one head as wide as the map."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.visual = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(text_width, width)
        self.value = nn.Linear(text_width, width)
        self.output = nn.Linear(width, width)
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor, text: TextFeatures) -> Tensor:
        """Fuse E maps with E expressions.

        x: float [E, S, C] positions.  text: tokens [E, L, C_text].  Returns float [E, S, C].
        """
        return F.gelu(self.mix(F.gelu(self.visual(x)) * self.attend(x, text)))

    def attend(self, x: Tensor, text: TextFeatures) -> Tensor:
        """Return what every position reads from the words, projected and normalised: float [E, S, C]."""
        mask = text.mask.to(text.tokens.dtype)
        query = normalise_positions(self.query(x))
        key = self.key(text.tokens) * mask[..., None]
        value = self.value(text.tokens) * mask[..., None]
        scores = query @ key.transpose(1, 2) * x.shape[-1] ** -0.5
        weights = softmax_of_few(scores + (mask * PADDING_LOGIT - PADDING_LOGIT)[:, None])
        # weights sum to 1, so what is read can be projected word by word, of which there are few, instead of place by place
        return normalise_positions(weights @ self.output(value))
