"""Contrastive alignment of object sets and expressions: region tokens and text meet in one space (InfoNCE, van den Oord et al. 2018).

The others to tell apart are those of the same image: their truth is known (another image may well hold the things that an expression
names, unsaid), they are the hard ones, and the loss is the same on one process and on several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.ops.losses import shared_count

WIDTH = 128
TEMPERATURE = 0.1  # at first


class SetContrast(nn.Module):
    """Two projections and a learned temperature. set_width, text_width: channels of the sets' and of the sentences' features."""

    def __init__(self, set_width: int, text_width: int) -> None:
        super().__init__()
        self.sets, self.sentences = nn.Linear(set_width, WIDTH), nn.Linear(text_width, WIDTH)
        self.scale = nn.Parameter(torch.tensor([math.log(1 / TEMPERATURE)]))

    def forward(self, sets: Tensor, sentences: Tensor, image_index: Tensor, target_index: Sequence[Tensor]) -> Tensor:
        """Return the loss of E expressions and their sets, a mean over those with a target; 0 without any.

        sets: float [E, S], of no meaning where there is no target.  sentences: float [E, T].  image_index: int64 [E].  target_index: E x
        int64 [n_e].  What means the same set of the same image is no rival.
        """
        a, b = F.normalize(self.sets(sets).float(), dim=-1), F.normalize(self.sentences(sentences).float(), dim=-1)
        logits = a @ b.T * self.scale.float().exp().clamp(max=100.0)
        names = [frozenset(targets.tolist()) for targets in target_index]
        numbers = {name: n for n, name in enumerate(dict.fromkeys(names))}
        number = image_index.new_tensor([numbers[name] for name in names])
        targeted = image_index.new_tensor([len(name) for name in names]) > 0
        rival = (image_index[:, None] == image_index) & (number[:, None] != number)
        compared = rival | torch.eye(len(rival), dtype=torch.bool, device=rival.device)
        rows = logits.masked_fill(~compared, -math.inf).log_softmax(1).diagonal()  # a set among the expressions of its image
        columns = logits.T.masked_fill(~(compared & (targeted | ~rival)), -math.inf).log_softmax(1).diagonal()  # and the other way round
        return -((rows + columns) * targeted).sum() / shared_count(2 * targeted.sum(), rows)
