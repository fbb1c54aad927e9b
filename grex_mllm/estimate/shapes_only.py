"""Run a training step on shapes alone: tensors without memory, and a count of the bytes that the real ones would hold at each moment.

Weights are torch's fake tensors, and so is everything that is computed from them; ids, masks and boxes of a batch stay real, because code
reads their values. Storages are counted from the operation that makes them to the moment when nothing holds them any more, as an allocator
without fragmentation would see it: what autograd saves, temporaries and gradients, in forward and backward pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from grex_mllm.compat import fake_mode, is_fake

ATEN = torch.ops.aten
INDEXING = (ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default)
IN_FLOAT32 = {  # on a GPU, under autocast; on a CPU they follow their input
    torch.softmax, torch.log_softmax, Tensor.softmax, Tensor.log_softmax, nn.functional.softmax, nn.functional.log_softmax,
    nn.functional.layer_norm, nn.functional.group_norm, torch.exp, Tensor.exp,
}  # fmt: skip


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that live. peak, peak_without_gradients: the most at once, with and without those of weights.

    A number that is asked of a tensor without memory is 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.owned: set[int] = set()  # storages of the gradients of weights
        self.bytes = self.gradient_bytes = self.peak = self.peak_without_gradients = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ATEN._local_scalar_dense.default and is_fake(args[0]):
            return 0.0 if args[0].is_floating_point() else 0
        if func in INDEXING:  # how many a mask chooses is known: masks are real
            args = (args[0], _positions(args[1]), *args[2:])
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return out

    def restart(self) -> None:
        """Count peaks from here."""
        self.peak, self.peak_without_gradients = self.bytes, self.bytes - self.gradient_bytes

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, if it is not counted already."""
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = id(storage)  # stays that of the storage as long as it lives
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.bytes += storage.nbytes()
        weakref.finalize(storage, self.remove, key).atexit = False
        self.peak = max(self.peak, self.bytes)
        self.peak_without_gradients = max(self.peak_without_gradients, self.bytes - self.gradient_bytes)

    def own(self, parameter: Tensor) -> None:
        """Take the gradient of a weight as one that stays until the optimizer has stepped."""
        assert parameter.grad is not None
        self.add(parameter.grad)
        key = id(parameter.grad.untyped_storage())
        if key not in self.owned:
            self.owned.add(key)
            self.gradient_bytes += self.sizes[key]

    def remove(self, key: int) -> None:
        """Forget a storage that nothing holds any more."""
        size = self.sizes.pop(key)
        self.bytes -= size
        if key in self.owned:
            self.owned.remove(key)
            self.gradient_bytes -= size
