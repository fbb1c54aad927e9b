"""The batched Muon against torch's own."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim import Muon

from grex_mllm.training.muon import BatchedMuon


def test_steps_equal_those_of_torch_but_for_rounding() -> None:
    torch.manual_seed(0)
    ours = nn.ModuleList(
        [nn.Linear(24, 24, bias=False), nn.Linear(24, 40, bias=False), nn.Linear(40, 24, bias=False), nn.Linear(16, 20, bias=False)]
    )
    theirs = copy.deepcopy(ours)
    groups = [[{"params": list(m.parameters()), "weight_decay": 0.1}] for m in (ours, theirs)]
    first, second = BatchedMuon(groups[0], lr=0.02), Muon(groups[1], lr=0.02, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    start = [p.detach().clone() for p in ours.parameters()]
    for _ in range(5):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        first.step()
        second.step()
    for p, q, before in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        moved = (q - before).norm()
        assert moved > 0.1 and (p - q).norm() < 0.02 * moved
    state = [s["momentum_buffer"] for s in first.state.values()]
    torch.testing.assert_close(state, [s["momentum_buffer"] for s in second.state.values()])


def test_a_parameter_without_gradient_stays() -> None:
    used, idle = nn.Parameter(torch.eye(16)), nn.Parameter(torch.eye(16))
    optimizer = BatchedMuon([{"params": [used, idle], "weight_decay": 0.1}], lr=0.1)
    used.grad = torch.randn(16, 16)
    optimizer.step()
    assert torch.equal(idle, torch.eye(16)) and not torch.equal(used, torch.eye(16))
