"""The batched Muon against torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import Muon

from grex_mllm.training.muon import BatchedMuon, orthogonalised
from grex_mllm.training.optim import hidden_matrices

COEFFICIENTS = (3.4445, -4.775, 2.0315)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.02), (torch.float32, 0.02)])
def test_steps_equal_those_of_torch_but_for_rounding(dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(0)
    ours = nn.ModuleList(
        [nn.Linear(24, 24, bias=False), nn.Linear(24, 40, bias=False), nn.Linear(40, 24, bias=False), nn.Linear(16, 20, bias=False)]
    )
    theirs = copy.deepcopy(ours)
    groups = [[{"params": list(m.parameters()), "weight_decay": 0.1}] for m in (ours, theirs)]
    first, second = BatchedMuon(groups[0], lr=0.02, dtype=dtype), Muon(groups[1], lr=0.02, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    start = [p.detach().clone() for p in ours.parameters()]
    for _ in range(5):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        first.step()
        second.step()
    for p, q, before in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        moved = (q - before).norm()
        assert moved > 0.1 and (p - q).norm() < bound * moved
    state = [s["momentum_buffer"] for s in first.state.values()]
    torch.testing.assert_close(state, [s["momentum_buffer"] for s in second.state.values()])


def test_a_parameter_without_gradient_stays() -> None:
    used, idle = nn.Parameter(torch.eye(16)), nn.Parameter(torch.eye(16))
    optimizer = BatchedMuon([{"params": [used, idle], "weight_decay": 0.1}], lr=0.1)
    used.grad = torch.randn(16, 16)
    optimizer.step()
    assert torch.equal(idle, torch.eye(16)) and not torch.equal(used, torch.eye(16))


@pytest.mark.parametrize("shape", [(8, 8), (8, 40), (8, 12), (8, 11)])  # long ones go through their row products
@pytest.mark.parametrize("spread", [1.0, 1e3])
def test_float32_equals_the_plain_iteration_in_float64(shape: tuple[int, int], spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(wide, full_matrices=False)
    wide = left @ torch.diag_embed(values * torch.logspace(0, -torch.log10(torch.tensor(spread)).item(), 8)) @ right
    x = wide / wide.flatten(1).norm(dim=1)[:, None, None]
    a, b, c = COEFFICIENTS
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    ours = orthogonalised(wide.float(), COEFFICIENTS, 5, 1e-7)
    assert (ours - x).norm() < 1e-3 * x.norm()
    assert torch.linalg.svdvals(ours)[:, 0].min() > 0.6


def test_kernels_of_convolutions_move_as_matrices() -> None:
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(8, 3, 3, 3))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    optimizer = BatchedMuon([{"params": [kernel], "weight_decay": 0.1}], lr=0.05, dtype=torch.float32)
    other = BatchedMuon([{"params": [matrix], "weight_decay": 0.1}], lr=0.05, dtype=torch.float32)
    for _ in range(3):
        kernel.grad = torch.randn_like(kernel)
        matrix.grad = kernel.grad.flatten(1).clone()
        optimizer.step()
        other.step()
    torch.testing.assert_close(kernel.detach().flatten(1), matrix.detach())


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="give it to AdamW"):
        BatchedMuon([nn.Parameter(torch.zeros(4))], lr=0.1)


def test_which_convolutions_are_hidden() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3), nn.Conv2d(64, 4, 1), nn.Linear(32, 32))
    assert hidden_matrices(model) == {"3.weight"}
    assert hidden_matrices(model, convolutions=True) == {"1.weight", "3.weight"}
