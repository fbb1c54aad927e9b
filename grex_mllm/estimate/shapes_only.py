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

from grex_mllm.compat import fake_mode, is_fake, reading_of_a_number

ATEN = torch.ops.aten
READ_NUMBER = reading_of_a_number()
INDEXING = (ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default)
SPARSE = (ATEN.sparse_compressed_tensor.comp_plain_value_size, ATEN.sparse_sampled_addmm.default, ATEN.values.default)
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
        if func is READ_NUMBER and (args[0].is_meta or is_fake(args[0])):
            return 0.0 if args[0].is_floating_point() else 0
        if func in SPARSE and any(is_fake(value) for value in args):
            return _values_alone(func, args)
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

    def ignore(self, tensor: Tensor) -> None:
        """Do not count a tensor that only stands for another one."""
        self.add(tensor)
        key = id(tensor.untyped_storage())
        self.bytes -= self.sizes[key]
        self.sizes[key] = 0

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


class _InFloat32(TorchFunctionMode):
    """Computes in float32 what a GPU's autocast does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in IN_FLOAT32 and args and args[0].dtype in (torch.bfloat16, torch.float16):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


class OnZeros(nn.Module):
    """A module that reads the values of its inputs (losses with a matching): it gets zeros instead, which are not counted."""

    def __init__(self, inner: nn.Module, live: Live) -> None:
        super().__init__()
        self.inner, self.live = inner, live

    def forward(self, inputs: Any, *others: Any) -> Any:
        return self.inner(tree_map(lambda value: _Zeros.apply(value, self.live) if is_fake(value) else value, inputs), *others)


class _Zeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, live: Live) -> Tensor:
        ctx.like = value.detach()[:0]
        zeros = torch.zeros(value.shape, dtype=value.dtype)
        live.ignore(zeros)
        return zeros

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.like.new_empty(grads[0].shape), None


@contextmanager
def on_meta() -> Iterator[None]:
    """Make modules on the device "meta" within the block, those too whose beginnings read numbers."""
    with torch.device("meta"), Live():
        yield


def as_on_cpu(module: nn.Module) -> None:
    """Replace weights and buffers on the device "meta" by fake ones of the CPU: those know autocast and which way to take."""
    mode, made = fake_mode(), dict[int, Any]()

    def fake(tensor: Tensor) -> Any:
        if id(tensor) not in made:
            with mode:
                made[id(tensor)] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                made[id(tensor)] = nn.Parameter(made[id(tensor)], tensor.requires_grad)
        return made[id(tensor)]

    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, fake(parameter))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, fake(buffer))


def gpu_casts() -> TorchFunctionMode:
    """Return a context in which the operations that a GPU's autocast does in float32 are done so."""
    return _InFloat32()


def _values_alone(func: Any, args: Any) -> Any:
    """Let a sparse tensor without memory, which torch has not, be that of its values."""
    if func is ATEN.sparse_compressed_tensor.comp_plain_value_size:
        return args[2]
    return args[0].detach() if func is ATEN.values.default else torch.empty_like(args[0])


def _positions(indices: Any) -> list[Any]:
    """Return indices with real masks turned into positions."""
    found: list[Any] = []
    for index in indices:
        mask = index is not None and index.dtype == torch.bool and not is_fake(index)
        found += index.nonzero().unbind(1) if mask else [index]
    return found
