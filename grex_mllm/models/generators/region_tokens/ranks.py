"""Which objects come first among their kind: from the left, the right, the top and the bottom, and by size.

"The two leftmost cats" is true of two cats where no other cat stands before them. That is computed outright, for every object and for the
set, so that it need not be learned from coordinates. Objects are of one kind where the same words are likely to be said of what they look
like; those words are learned from expressions alone (`words.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ORDERS = 6  # left, right, top, bottom, largest, smallest
MOST = 3.0  # objects; more count as this many
SHARP = (0.01, 0.01, 0.01, 0.01, 0.07, 0.07)  # where one comes before another: sides of the image, logarithm of areas
SLACK = (0.05, 0.05, 0.05, 0.05, 0.34, 0.34)  # less than this apart, people hesitate which one comes first
OF_OBJECT = 2 * (2 * ORDERS + 2)
OF_SET = 2 * (2 * ORDERS + 2) + 1


@dataclass
class Said:
    """The words that objects of E sets, and the sets, are likely to be called by.

    logits, set_logits: float [E, N, V], [E, V], how much likelier a word is than of any.  words, of_set: float [E, N, W], [E, W], the mean
    embeddings.
    """

    logits: Tensor
    set_logits: Tensor
    words: Tensor
    of_set: Tensor


class Ranked(nn.Module):
    """What is made of ranks. hidden: D of the region tokens.  width: W of the words' embeddings."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.objects, self.sets = (
            nn.Sequential(nn.Linear(numbers, hidden), nn.GELU(), nn.Linear(hidden, hidden)) for numbers in (OF_OBJECT, OF_SET)
        )
        self.query = nn.Linear(hidden, width)
        self.set_query = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, width))

    def say(self, objects: Any, image_index: Tensor, each: Tensor, gathered: Tensor) -> Said:
        """Return the words of objects and sets. objects: `ObjectTokens`.  each: float [E, N, D].  gathered: float [E, D]."""
        table = objects.table
        logits = likelier(objects.queries[image_index] + self.query(each), table)
        set_logits = likelier(self.set_query(gathered), table)
        return Said(logits, set_logits, logits.softmax(-1) @ table, set_logits.softmax(-1) @ table)


class Kinds(nn.Module):
    """Tell how likely objects are of one kind, by the words that are said of what they look like.

    channels: of the pooled features.  width: of the words' embeddings.  words: how many.
    """

    def __init__(self, channels: int, hidden: int, width: int, words: int) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.often = nn.Parameter(torch.zeros(words))
        self.scale, self.limit = nn.Parameter(torch.tensor(20.0)), nn.Parameter(torch.tensor(0.85))

    def same(self, logits: Tensor) -> Tensor:
        """Return float32 [B, N, N] in (0, 1), 0 for an object and itself. logits: float [B, N, V] of the words of each object.

        By the Bhattacharyya coefficient of two objects' words: 1 where they are the same ones.
        """
        with torch.autocast(logits.device.type, enabled=False):
            root = (0.5 * logits.float().log_softmax(-1)).exp()
            alike = (self.scale.float() * (root @ root.transpose(1, 2) - self.limit.float())).sigmoid()
            return alike * (1.0 - torch.eye(alike.shape[1], device=alike.device))


def likelier(queries: Tensor, table: Tensor) -> Tensor:
    """Return float32 [..., V]: how well words fit queries [..., W]. table: float [V, W], their embeddings."""
    names = F.layer_norm(table, table.shape[-1:])
    return (queries.float() @ names.T).float() / names.shape[-1] ** 0.5


def orders(boxes: Tensor, area: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 [B, ORDERS, N, N] twice: near 1 where object j (last) comes before object i; and where it does not clearly come after.

    boxes: float [B, N, 4] xyxy in [0, 1].  area: float [B, N], share of the image.
    """
    boxes, size = boxes.float(), area.float().clamp(min=1e-8).log()
    across, down = (boxes[..., 0] + boxes[..., 2]) / 2, (boxes[..., 1] + boxes[..., 3]) / 2
    place = torch.stack([across, -across, down, -down, -size, size], 1)
    gap = place[..., :, None] - place[..., None, :]
    sharp, slack = (place.new_tensor(values)[:, None, None] for values in (SHARP, SLACK))
    return (gap / sharp).sigmoid(), ((gap + slack) / sharp).sigmoid()


def rank(same: Tensor, boxes: Tensor, area: Tensor, image_index: Tensor, member: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 [E, N, OF_OBJECT] for the objects and [E, OF_SET] for the sets.

    Of an object, in each order: how many of its kind come before it; how many of its kind on the other side, of the set or beside it, do
    not clearly come after it; and how many of its kind belong to the set, and do not. Of a set, in each order: the most distractors that
    do not clearly come after a target of their kind (none: the targets are the first ones); the most targets that do not clearly come
    after a distractor of their kind (none: they are all but the first ones); the most distractors of a target's kind, how many distractors
    are of any target's kind, and how alike its targets are at least. Each number n as n and exp(-2 n), because none or one is what counts.

    same: float [B, N, N].  boxes, area: as for `orders`.  image_index: int64 [E].  member, other: bool [E, N], targets and distractors.
    """
    with torch.autocast(same.device.type, enabled=False):
        target, distractor = member.float(), other.float()
        alike, (before, unsure) = same.float()[image_index], orders(boxes, area)
        shown = (target + distractor)[:, None]
        opposed = target[..., None] * distractor[:, None] + distractor[..., None] * target[:, None]
        ahead = torch.einsum("enm,eonm->eno", alike * shown, before[image_index])
        against = torch.einsum("enm,eonm->eno", alike * opposed, unsure[image_index])
        kin, rivals = alike @ target[..., None], alike @ distractor[..., None]
        touched = (alike * target[:, None]).amax(-1) * distractor  # [E, N]: of the kind of a target
        unlike = (1.0 - alike) * target[..., None] * target[:, None] * (1.0 - torch.eye(alike.shape[1], device=alike.device))
        first, last = (against * target[..., None]).amax(1), (against * touched[..., None]).amax(1)
        most = (rivals * target[..., None]).amax(1)
        counts = torch.cat([first, last, most, touched.sum(1, keepdim=True)], -1)
        of_set = torch.cat([_shown(counts), 1.0 - unlike.flatten(1).amax(1, keepdim=True)], -1)
        return _shown(torch.cat([ahead, against, kin, rivals], -1)) * shown.transpose(1, 2), of_set


def _shown(counts: Tensor) -> Tensor:
    return torch.cat([counts.clamp(max=MOST) / MOST, (-2.0 * counts).exp()], -1)
