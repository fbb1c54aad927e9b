"""A batch as one block of bytes, and back."""

from __future__ import annotations

import torch
from made_batch import make_batch

from grex_mllm.training.batches import map_tensors
from grex_mllm.training.transfer import pack, to_device, unpack
from grex_mllm.types import Batch


def some_batch() -> Batch:
    """Two images; the first has no target."""
    return make_batch(torch.rand(2, 7, 9) > 0.5, [torch.zeros(0, 4), torch.rand(3, 4)])


def test_a_packed_batch_comes_back_whole() -> None:
    batch = some_batch()
    batch.instance_attributes = {"colour": [torch.arange(3), torch.tensor([7])]}
    block = pack(batch)
    back = unpack(batch, block)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    pairs = iter(_list(batch))
    map_tensors(back, lambda tensor: seen.append((next(pairs), tensor)) or tensor)
    assert len(seen) > 10 and {tensor.dtype for _, tensor in seen} >= {torch.bool, torch.int64, torch.float32, torch.uint8}
    for ours, theirs in seen:
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        assert theirs.numel() == 0 or theirs.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()
    assert back.expression_ids == batch.expression_ids


def test_a_batch_stays_as_it_is_on_a_cpu() -> None:
    batch = some_batch()
    assert to_device(batch, torch.device("cpu")).image is batch.image


def _list(batch: object) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(batch, lambda tensor: found.append(tensor) or tensor)
    return found
