"""Which objects of its image each set selects, and which may stand beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from grex_mllm.errors import fault
from grex_mllm.ops.selection import boxes_to_masks, mask_boxes


def membership(image_index: Tensor, target_index: list[Tensor], present: Tensor, num_objects: list[int], weight: Tensor | None) -> Tensor:
    """Return bool [E, N]: which objects of its image each set selects.

    image_index: int64 [E].  target_index: E x int64 [n_e].  present: bool [B, N].  num_objects: of each image.  weight: float [E]; a set
    of weight 0 may be empty.

    Raises:
        GrexError: an empty set, an object that the image does not have, or one without a pixel.
    """
    lengths = [len(t) for t in target_index]
    if len(lengths) != len(image_index):
        raise fault(f"{len(lengths)} object sets for {len(image_index)} image indices", "one image index a set", "pass lists of one length")
    if 0 in lengths and (weight is None or bool(weight[lengths.index(0)] != 0)):
        raise fault(f"object set {lengths.index(0)} is empty", "at least one object", "leave no-target samples out of generation")
    rows = torch.repeat_interleave(torch.tensor(lengths)).to(present.device)
    columns = torch.cat([t.to(present.device) for t in target_index])
    limits = torch.tensor(num_objects, device=present.device)[image_index][rows]
    wrong = (columns < 0) | (columns >= limits)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0, 0])
        raise fault(
            f"object set {int(rows[at])} names object {int(columns[at])}",
            f"0 to {int(limits[at]) - 1}, the objects of its image",
            "fix the set",
        )
    member = torch.zeros(len(lengths), present.shape[1], dtype=torch.bool, device=present.device)
    member[rows, columns] = True
    lost = member & ~present[image_index]
    if bool(lost.any()):
        e, n = lost.nonzero()[0].tolist()
        raise fault(f"object {n} of object set {e} has a mask without a pixel", "at least one pixel", "pass its box too, or leave it out")
    return member


def positions_of(index: list[Tensor], like: Tensor) -> Tensor:
    """Return bool [E, N] of the shape of `like`: True at the positions that each row of `index` (E x int64) lists."""
    found = torch.zeros_like(like)
    for row, positions in zip(found, index, strict=True):
        row[positions] = True
    return found


def some_as_boxes(instance_masks: list[Tensor], share: float) -> list[Tensor]:
    """Return the masks B x bool [N_b, H, W], in a random share of the images as the boxes around them; a mask without a pixel stays so."""
    if share == 0:
        return instance_masks
    chosen = (torch.rand(len(instance_masks)) < share).tolist()
    return [
        boxes_to_masks(mask_boxes(m.bool()), *m.shape[1:]) & m.flatten(1).any(1)[:, None, None] if box and len(m) else m
        for m, box in zip(instance_masks, chosen, strict=True)
    ]
