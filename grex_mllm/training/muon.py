"""Muon with all matrices of one shape orthogonalised in one batch: the rule of `torch.optim.Muon`, less time for small matrices.

Convolution kernels count as matrices of output channels by everything else, as in Jordan 2024.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from grex_mllm.compat import foreach

COEFFICIENTS, NEWTON_SCHULZ_STEPS, EPS = (3.4445, -4.775, 2.0315), 5, 1e-7  # torch.optim.Muon's
LONG = 1.5  # columns over rows from which the products of rows pay


class BatchedMuon(Optimizer):
    """`torch.optim.Muon` (Jordan 2024) with its settings, state and learning-rate scaling by `match_rms_adamw` (Moonshot 2025).

    Differs in speed, in rounding, and in taking kernels of convolutions: Newton-Schulz runs on [n, rows, columns] instead of n times on
    [rows, columns], in `dtype` (bfloat16 where the machine computes in it natively, else float32).
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "weight_decay": 0.1, "momentum": momentum, "nesterov": True, "ns_steps": NEWTON_SCHULZ_STEPS})
        for group in self.param_groups:
            for param in group["params"]:
                if param.ndim < 2:
                    raise ValueError(f"a parameter of shape {tuple(param.shape)} for Muon; expected a matrix or a kernel; give it to AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            grads: list[Tensor] = [param.grad for param in params if param.grad is not None]
            for param, grad in zip(params, grads, strict=True):
                if not self.state[param]:
                    self.state[param]["momentum_buffer"] = torch.zeros_like(grad)
            buffers: list[Tensor] = [self.state[param]["momentum_buffer"] for param in params]
            foreach("lerp_")(buffers, grads, 1 - group["momentum"])
            updates = foreach("lerp")(grads, buffers, group["momentum"]) if group["nesterov"] else buffers
            foreach("mul_")(params, 1 - group["lr"] * group["weight_decay"])
            matrices = [update.flatten(1) for update in updates]
            by_shape: dict[tuple[int, int], list[int]] = {}
            for i, matrix in enumerate(matrices):
                by_shape.setdefault((min(matrix.shape), max(matrix.shape)), []).append(i)
            for (_, longer), members in by_shape.items():
                tall = [matrices[i].shape[0] > matrices[i].shape[1] for i in members]
                wide = torch.stack([matrices[i].T if t else matrices[i] for i, t in zip(members, tall, strict=True)]).to(self.dtype)
                flat = orthogonalised(wide, COEFFICIENTS, group["ns_steps"], EPS)
                rate = group["lr"] * 0.2 * math.sqrt(longer)
                for i, t, update in zip(members, tall, flat.unbind(0), strict=True):
                    params[i].add_((update.T if t else update).reshape(params[i].shape), alpha=-rate)
        return loss


def muon_dtype(precision: str) -> torch.dtype:
    """Return the type of Muon's matrix products under a training precision; under fp16 it is bfloat16, which has float32's range."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


def orthogonalised(wide: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Bring the singular values of matrices [n, r, c] near 1 by Newton-Schulz steps of the fifth order (r <= c is quickest).

    Long matrices in float32 are stepped through their r x r products, which is less work and differs by rounding (1e-4 of the norm for
    ill-conditioned ones, where bfloat16 differs by 1e-1).
    """
    a, b, c = coefficients
    x = wide / wide.flatten(1).norm(dim=1).clamp(min=eps)[:, None, None]
    if x.dtype == torch.float32 and x.shape[2] >= LONG * x.shape[1] and steps > 1:
        return torch.bmm(_newton_schulz_factor(torch.bmm(x, x.transpose(1, 2)), a, b, c, steps), x)
    for _ in range(steps):
        gram = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _newton_schulz_factor(gram: Tensor, a: float, b: float, c: float, steps: int) -> Tensor:
    """Return the product P [n, r, r] of the polynomials in x x' that the steps multiply x with; gram = x x' at first."""
    product: Tensor | None = None
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else torch.bmm(factor, product)
        if step < steps - 1:
            gram = torch.bmm(torch.bmm(factor, gram), factor)
    assert product is not None
    return product
