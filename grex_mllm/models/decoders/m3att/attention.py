"""Multi-modal mutual attention and the decoder built of it (thesis, Eq. 5.1-5.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.errors import fault
from grex_mllm.models.decoders.rela.network import Feedforward
from grex_mllm.models.grid import AttentionLayer

SHARED, INDEPENDENT, VISION_ONLY = ATTENTIONS = ("shared", "independent", "vision_only")
NONE, SAME, TRANSFORMED = ITERATIONS = ("none", "same", "transformed")


class ImageKeys(nn.Module):
    """Keys and values of one layer, which the encoded map gives once for all expressions of an image."""

    def __init__(self, width: int, attention: str) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.second_key = nn.Linear(width, width, bias=False) if attention == INDEPENDENT else None

    def forward(self, encoded: Tensor) -> list[Tensor]:
        """Return F_V^k, F_V^v, and the key of the second matrix where it is independent: float [B, h * w, C] each."""
        second = [self.second_key(encoded)] if self.second_key is not None else []
        return [self.key(encoded), self.value(encoded), *second]


class MutualAttention(nn.Module):
    """Words gather vision, cells gather language, and their product is projected back (M3Att, thesis section 5.1.1).

    The product F_mul = F_V^a (F_L^a)^T is never made: with P the matrix of the last layer, F_mul P = (F_V^a (F_L^v)^T) (S P), S the softmax
    over the words. It is scaled by C^-1/2 and normalised after P.
    """

    def __init__(self, width: int, cells: int, attention: str) -> None:
        super().__init__()
        mutual = attention != VISION_ONLY
        self.key = nn.Linear(width, width, bias=False)
        self.second_key = nn.Linear(width, width, bias=False) if attention == INDEPENDENT else None
        self.value = nn.Linear(width, width) if mutual else None
        self.out = nn.Linear(cells if mutual else width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, words: Tensor, real: Tensor, image: list[Tensor]) -> Tensor:
        """Return float [E, N_t, C].

        words: float [E, N_t, C].  real: bool [E, N_t].  image: what `ImageKeys` gave of each expression's image.
        """
        logits = self.logits(self.key(words), image[0])
        vision = logits.softmax(dim=2).to(words.dtype) @ image[1]  # F_V^a, Eq. 5.2a
        if self.value is None:
            return self.norm(self.out(vision))
        if self.second_key is not None:
            logits = self.logits(self.second_key(words), image[2])
        shares = logits.masked_fill(~real[..., None], -torch.inf).softmax(dim=1)  # Eq. 5.2b, transposed: [E, N_t, h * w]
        product = vision @ self.value(words).transpose(1, 2) * words.shape[-1] ** -0.5
        return self.norm(product @ F.linear(shares.to(product.dtype), self.out.weight) + self.out.bias)

    @staticmethod
    def logits(words: Tensor, cells: Tensor) -> Tensor:
        """Return A_mut of Eq. 5.1, float [E, N_t, h * w]."""
        return words @ cells.transpose(1, 2) * words.shape[-1] ** -0.5


class MutualLayer(nn.Module):
    """One layer of M3Dec: self-attention, mutual attention, attention to what that gave, feed-forward."""

    def __init__(self, width: int, num_heads: int, hidden: int, cells: int, attention: str) -> None:
        super().__init__()
        self.self_attention, self.cross_attention = AttentionLayer(width, num_heads), AttentionLayer(width, num_heads)
        self.mutual = MutualAttention(width, cells, attention)
        self.feedforward = Feedforward(width, hidden)

    def forward(self, x: Tensor, real: Tensor, image: list[Tensor]) -> Tensor:
        """x: float [E, N_t, C].  real: bool [E, N_t].  image: see `MutualAttention`."""
        allowed = real[:, None, None]
        query = self.self_attention(x, x, allowed)
        return self.feedforward(self.cross_attention(query, self.mutual(query, real, image), allowed))


class Interaction(nn.Module):
    """One block of iterative multi-modal interaction: a layer's output asks the words and takes in what it needs (Eq. 5.3)."""

    def __init__(self, width: int, iterate: str, start: float) -> None:
        super().__init__()
        self.transform = nn.Linear(width, width) if iterate == TRANSFORMED else None
        self.query = nn.Linear(width, width, bias=False)  # W_a
        self.value = nn.Linear(width, width, bias=False)  # W_l
        self.weight = nn.Parameter(torch.full((1,), start))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, words: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next layer's input and F_l^n. x: F_dec^n; words: F_l^(n-1), both float [E, N_t, C].  real: bool [E, N_t]."""
        words = self.transform(words) if self.transform is not None else words
        logits = F.relu(self.query(x)) @ words.transpose(1, 2) * words.shape[-1] ** -0.5
        attention = logits.masked_fill(~real[:, None], -torch.inf).softmax(dim=2).to(words.dtype)
        return self.norm(x + self.weight * (attention @ F.relu(self.value(words)))), words


class MutualDecoder(nn.Module):
    """Layers of mutual attention with interaction between them: F_dec of E expressions."""

    def __init__(
        self, width: int, num_heads: int, hidden: int, cells: int, attention: str, iterate: str, start: float, layers: int
    ) -> None:
        super().__init__()
        for field, value, known in (("attention", attention, ATTENTIONS), ("iterate", iterate, ITERATIONS)):
            if value not in known:
                raise fault(f'model.decoder.{field} is "{value}"', f"one of {', '.join(known)}", "choose one of them")
        self.layers = nn.ModuleList(MutualLayer(width, num_heads, hidden, cells, attention) for _ in range(layers))
        between = range(layers - 1 if iterate != NONE else 0)
        self.interactions = nn.ModuleList(Interaction(width, iterate, start) for _ in between)

    def forward(self, words: Tensor, real: Tensor, images: list[list[Tensor]]) -> Tensor:
        """words: F_t, float [E, N_t, C].  real: bool [E, N_t].  images: keys and values of every layer."""
        x, language = words, words
        for i, (layer, image) in enumerate(zip(self.layers, images, strict=True)):
            if 0 < i <= len(self.interactions):
                x, language = self.interactions[i - 1](x, language, real)
            x = layer(x, real, image)
        return x
