"""Many expressions of few images: rows of one image side by side, so that what belongs to the image is read and never repeated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grouping:
    """Where the rows of E expressions stand beside the things of B images, M expressions each at most.

    select: int64 [E], the image things to take where every expression gets its own copy (no more expressions than images), else None.
    slots: int64 [E], place of each expression among B * M, or None where nothing moves.
    """

    num_images: int
    per_image: int
    select: Tensor | None = None
    slots: Tensor | None = None

    def of_image(self, x: Tensor) -> Tensor:
        """Bring a tensor [B, ...] of the images beside folded rows."""
        return x if self.select is None else x.index_select(0, self.select)

    def fold(self, x: Tensor) -> Tensor:
        """Lay rows [E, R, C] of expressions side by side per image: [B, M * R, C]; unused places are zero."""
        if self.slots is not None:
            places = x.new_zeros(self.num_images * self.per_image, *x.shape[1:])
            x = places.index_copy(0, self.slots, x)
        return x if self.per_image == 1 else x.reshape(self.num_images, -1, x.shape[-1])

    def unfold(self, x: Tensor) -> Tensor:
        """Undo `fold`: [B, M * R, C] -> [E, R, C]."""
        if self.per_image > 1:
            x = x.reshape(self.num_images * self.per_image, -1, x.shape[-1])
        return x if self.slots is None else x.index_select(0, self.slots)


def group(image_index: Tensor, num_images: int) -> Grouping:
    """Group E expressions by their image. image_index: int64 [E].

    One image needs no look at the index; neither do as many images as expressions, which are taken one by one.
    """
    num_expressions = image_index.shape[0]  # not len(): who records the model sees that it varies
    if num_images == 1:
        return Grouping(1, num_expressions)
    if num_expressions <= num_images:
        # reading the index is free on CPU only; elsewhere it would make the host wait, and a compiler leave its graph
        readable = image_index.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable and image_index.tolist() == list(range(num_images)):
            return Grouping(num_images, 1)
        return Grouping(num_expressions, 1, select=image_index)
    same = image_index[:, None] == image_index[None]
    rank = (same & torch.ones_like(same).tril(-1)).sum(dim=1)
    per_image = int(rank.max()) + 1
    return Grouping(num_images, per_image, slots=image_index * per_image + rank)
