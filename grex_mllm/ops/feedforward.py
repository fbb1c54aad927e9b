"""A feed-forward network (two linear layers, ReLU or GELU between) that never holds its wide hidden layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from grex_mllm.ops.paths import on_cpu

LARGE = 2**23  # numbers of a hidden layer that are worth it: in float32 the 32 MiB from which glibc returns all freed memory at once
MOST_HIDDEN = 2**20  # numbers of the hidden layer at a time
ACTIVATIONS = ("relu", "gelu")


def feedforward(x: Tensor, first: nn.Linear, second: nn.Linear, activation: str) -> Tensor:
    """Return second(activation(first(x))), float [..., C'] of float [..., C]. activation: relu, or gelu (exact).

    On a CPU in float32 the rows of a large layer go through in chunks; training keeps x alone and computes the hidden layer again in the
    backward pass. That costs a sixth more arithmetic and saves more, because memory that is asked for anew in every step has to be mapped
    and cleared page by page: 9,450 rows, 256 x 1,024 x 256, forward and backward, 0.56 -> 0.39 processor seconds (28,800 rows, 96 x 384 x
    96: 0.29 -> 0.20). Below LARGE it loses.

    Raises:
        ValueError: unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation}; one of {ACTIVATIONS}; choose one of them")
    chunked = (
        x.numel() // x.shape[-1] * first.out_features > LARGE
        and on_cpu(x)
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
    if chunked:
        return _Feedforward.apply(x, first.weight, first.bias, second.weight, second.bias, activation)
    # flat rows: ReLU in place on a view would copy the whole gradient in the backward pass
    hidden = first(x.flatten(0, -2))
    hidden = F.relu_(hidden) if activation == "relu" else F.gelu(hidden)
    return second(hidden).unflatten(0, x.shape[:-1])


class _Feedforward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(x, up, up_bias, down)
        ctx.activation = activation
        rows = x.reshape(-1, x.shape[-1])
        step = _rows_at_a_time(up)
        out, buffer = rows.new_empty(len(rows), len(down)), rows.new_empty(step, len(up))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            hidden = torch.addmm(up_bias, part, up.t(), out=buffer[: len(part)])
            hidden = hidden.relu_() if activation == "relu" else F.gelu(hidden)
            torch.addmm(down_bias, hidden, down.t(), out=out[start : start + step])
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, up, up_bias, down = ctx.saved_tensors
        relu = ctx.activation == "relu"
        rows, wanted = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, len(down))
        grad_x = torch.empty_like(rows)
        grad_up, grad_up_bias, grad_down = torch.zeros_like(up), torch.zeros_like(up_bias), torch.zeros_like(down)
        step = _rows_at_a_time(up)
        buffers = rows.new_empty(2, step, len(up))
        for start in range(0, len(rows), step):
            part, grad = rows[start : start + step], wanted[start : start + step]
            before = torch.addmm(up_bias, part, up.t(), out=buffers[0, : len(part)])
            hidden = before.relu_() if relu else F.gelu(before)
            grad_down.addmm_(grad.t(), hidden)
            inner = torch.mm(grad, down, out=buffers[1, : len(part)])
            if relu:
                torch.ops.aten.threshold_backward.grad_input(inner, before, 0, grad_input=inner)
            else:
                torch.ops.aten.gelu_backward.grad_input(inner, before, grad_input=inner)
            grad_up.addmm_(inner.t(), part)
            grad_up_bias += inner.sum(dim=0)
            torch.mm(inner, up, out=grad_x[start : start + step])
        return grad_x.view(x.shape), grad_up, grad_up_bias, grad_down, wanted.sum(dim=0), None


def _rows_at_a_time(up: Tensor) -> int:
    return max(1, MOST_HIDDEN // len(up))
