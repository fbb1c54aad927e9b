"""Several sequences in one row of a language model, so that what they begin with is computed once and nothing is padding.

All prefixes of a batch begin with the same words of the chat frame, and those of one image go on with the same image tokens. A pack holds
these once, then what is left of each sequence, one behind the other; a mask lets every token see what comes before it in its own sequence
alone, and positions count as in that sequence. Losses and gradients are those of the sequences by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grex_mllm.compat import attention_of

# Families that take a mask [B, 1, L, L] as it is and have no positions but `position_ids`; others keep one sequence a row.
PACKED_FAMILIES = ("gemma2", "gemma3_text", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3")
PACK_TOKENS = 384  # longer packs repeat less and compare more tokens with those of other sequences
OF_PADDING, OF_ALL = -2, -1
OFFSET = 1 << 24  # more tokens than a pack holds


class Shared(NamedTuple):
    """What sequences have in common. frame: tokens at the beginning of all.  image: tokens after those, the same for all of an image.

    image_index: int64 [E], the image of each sequence.
    """

    frame: int
    image: int
    image_index: Tensor


class Packs(NamedTuple):
    """E sequences of S tokens in P packs of L tokens.

    source: int64 [P, L], which token of the flattened [E * S] stands there (padding: any).  positions: int64 [P, L].
    seen: bool [P, 1, L, L], what each token attends to.  place: int64 [E, S], where a token stands in the flattened [P * L] (masked: 0).
    """

    source: Tensor
    positions: Tensor
    seen: Tensor
    place: Tensor

    def mask(self, lm: Any, dtype: torch.dtype) -> Tensor:
        """Return `seen` in the form that the model's attention wants."""
        if attention_of(lm) == "sdpa":
            return self.seen
        return torch.zeros_like(self.seen, dtype=dtype).masked_fill(~self.seen, torch.finfo(dtype).min)


def can_pack(lm: Any, mask: Tensor, shared: Shared | None) -> bool:
    """Tell whether packing is possible and spares anything. mask: bool [E, S]."""
    if shared is None or shared.frame == 0 or lm.config.model_type not in PACKED_FAMILIES or attention_of(lm) not in ("sdpa", "eager"):
        return False
    window = getattr(lm.config, "sliding_window", None)
    return window is None or int(mask.sum(1).max()) <= window


def pack(mask: Tensor, shared: Shared, capacity: int = PACK_TOKENS) -> Packs:
    """Arrange sequences in packs of about `capacity` tokens, of nearly the same length, those of an image side by side.

    mask: bool [E, S], what is no padding; what is shared holds none.
    """
    first = shared.frame + shared.image
    images = shared.image_index.tolist()
    own = [[first + i for i, real in enumerate(row) if real] for row in mask[:, first:].tolist()]
    groups = _divide(images, [len(columns) for columns in own], shared, capacity)
    num, width = mask.shape
    rows: list[list[tuple[int, int, int, int]]] = []  # source, position, image, sequence
    place = torch.zeros(num, width, dtype=torch.int64)
    for group in groups:
        pack_rows = [(group[0] * width + i, i, OF_ALL, OF_ALL) for i in range(shared.frame)]
        image_starts: dict[int, int] = {}
        for e in group:
            image = images[e]
            if image not in image_starts:
                image_starts[image] = len(pack_rows)
                pack_rows += [(e * width + i, i, image, OF_ALL) for i in range(shared.frame, first)]
            start = len(pack_rows)
            pack_rows += [(e * width + column, first + k, image, e) for k, column in enumerate(own[e])]
            at = [*range(shared.frame), *range(image_starts[image], image_starts[image] + shared.image), *range(start, len(pack_rows))]
            place[e, [*range(first), *own[e]]] = torch.tensor(at) + len(rows) * OFFSET
        rows.append(pack_rows)
    length = max(len(pack_rows) for pack_rows in rows)
    place = place // OFFSET * length + place % OFFSET
    filled = [pack_rows + [(0, 0, OF_PADDING, OF_PADDING)] * (length - len(pack_rows)) for pack_rows in rows]
    source, positions, image_of, sequence_of = torch.tensor(filled).to(mask.device).unbind(-1)
    return Packs(source, positions, _seen(image_of, sequence_of), place.to(mask.device))


def position_ids(mask: Tensor) -> Tensor:
    """Return int64 positions that count real tokens only, [E, L]; padding gets 0."""
    return (mask.long().cumsum(1) - 1).clamp(min=0) * mask.long()


@contextmanager
def rows_alone(head: Any, rows: Tensor) -> Iterator[None]:
    """Let an output layer that gets hidden states [B, S, D] read `rows` (int64 [number]) of the flattened [B * S, D], as [1, number, D]."""
    hook = head.register_forward_pre_hook(lambda _module, inputs: (inputs[0].flatten(0, 1)[rows][None],))
    try:
        yield
    finally:
        hook.remove()


def _divide(images: list[int], lengths: list[int], shared: Shared, capacity: int) -> list[list[int]]:
    """Return the sequences of each pack: in the order of their images, cut where the packs are most alike in length."""
    order = sorted(range(len(images)), key=lambda e: images[e])
    total = sum(lengths) + shared.image * len(set(images))
    number = max(1, min(len(order), -(-total // max(1, capacity - shared.frame))))
    groups: list[list[int]] = [[] for _ in range(number)]
    before = 0.0
    for e in order:
        middle = before + lengths[e] / 2
        groups[min(number - 1, int(middle * number / max(1, sum(lengths))))].append(e)
        before += lengths[e]
    return [group for group in groups if group]


def _seen(image_of: Tensor, sequence_of: Tensor) -> Tensor:
    """Return bool [P, 1, L, L]. image_of, sequence_of: int64 [P, L], OF_ALL for what several share."""
    length = image_of.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=image_of.device).tril()
    image, image_seen = image_of[:, :, None], image_of[:, None]
    sequence, sequence_seen = sequence_of[:, :, None], sequence_of[:, None]
    common = (sequence_seen == OF_ALL) & ((image_seen == OF_ALL) | (image_seen == image))
    own = (sequence_seen != OF_ALL) & (sequence_seen == sequence)
    return (earlier & (common | own))[:, None]
