"""A batch to its device in one copy: hundreds of small tensors as one pinned block of bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grex_mllm.training.batches import map_tensors

ALIGNMENT = 16  # bytes: the largest element of a tensor


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on the device: as they are on a CPU, else as views of one pinned block."""
    if device.type == "cpu":
        return map_tensors(batch, lambda tensor: tensor.to(device))
    return unpack(batch, pack(batch, pinned=device.type == "cuda").to(device, non_blocking=True))


def pack(batch: Any, pinned: bool = False) -> Tensor:
    """Return the bytes of all tensors of a batch, uint8 [bytes], each from a multiple of ALIGNMENT."""
    tensors = _tensors(batch)
    block = torch.empty(sum(_room(tensor) for tensor in tensors), dtype=torch.uint8, pin_memory=pinned)
    start = 0
    for tensor in tensors:
        end = start + tensor.numel() * tensor.element_size()
        block[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        start += _room(tensor)
    return block


def unpack(batch: Any, block: Tensor) -> Any:
    """Return the batch with its tensors as views of what `pack` made of it, on the block's device."""
    start = 0

    def view(tensor: Tensor) -> Tensor:
        nonlocal start
        found = block[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        start += _room(tensor)
        return found

    return map_tensors(batch, view)


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(batch, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def _room(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
