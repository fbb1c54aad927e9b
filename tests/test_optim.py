"""Optimiser groups, the joined optimiser, schedules, clipping and the weight average."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from tiny import tiny_speaker
from torch import nn

from grex_mllm.config import OptimConfig
from grex_mllm.errors import GrexError
from grex_mllm.training.average import WeightAverage
from grex_mllm.training.optim import (
    JoinedOptimizer,
    build_optimizer,
    build_schedule,
    clip_gradients,
    hidden_matrices,
    optimized_parameters,
)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 24)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.norm = nn.LayerNorm(24)
        self.hidden = nn.Linear(24, 32)
        self.count_head = nn.Linear(32, 24)
        self.thin = nn.Linear(24, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        x = self.norm(x + self.attention(x, x, x)[0])
        return self.thin(self.count_head(self.hidden(x).relu())).mean(1)


def loss_of(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(3)
    ids = torch.randint(0, 20, (8, 5))
    return nn.functional.cross_entropy(model(ids), ids[:, 0] % 2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, schedule: object = None) -> list[float]:
    losses = []
    for _ in range(steps):
        model.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()  # type: ignore[attr-defined]
        losses.append(loss.item())
    return losses


def test_default_groups_decay_matrices_only() -> None:
    model = Small()
    optimizer = build_optimizer(model, OptimConfig())
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    decayed = {names[p] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {"attention.in_proj_weight", "attention.out_proj.weight", "hidden.weight", "count_head.weight", "thin.weight"}
    assert {names[p] for p in optimized_parameters(optimizer)} == set(names.values())


PARTS = ("grounding.vision", "grounding.text", "grounding.pixel_decoder", "grounding.decoder", "generator.region_tokens", "generator.lm")


def test_adapters_have_a_decay_of_their_own_and_every_part_a_learning_rate(tmp_path: Path) -> None:
    """The starts of names that configs/README.md recommends reach all that trains; LoRA is decayed only where that is asked for."""
    model = tiny_speaker(tmp_path)
    trained = {p: name for name, p in model.named_parameters() if p.requires_grad}
    scales = {part: 0.5**k for k, part in enumerate(PARTS)}
    for groups in ("default", "released"):
        for decay in (0.0, 0.07):
            config = OptimConfig(groups=groups, lr=1.0, weight_decay=0.3, adapter_decay=decay, lr_scale=scales)
            found = {trained[p]: group for group in build_optimizer(model, config).param_groups for p in group["params"]}
            assert found.keys() == set(trained.values())
            assert {name: group["lr"] for name, group in found.items()} == {
                name: scales[next(part for part in PARTS if name.startswith(f"{part}."))] for name in found
            }
            assert {group["weight_decay"] for name, group in found.items() if name.startswith("generator.lm.")} == {decay}
            assert {group["weight_decay"] for name, group in found.items() if name.startswith("generator.region")} == {0.0, 0.3}
    assert {name.rsplit(".", 2)[0].rsplit(".", 1)[-1] for name in found if name.startswith("generator.lm.")} == {"lora_A", "lora_B"}


def test_adamw_is_fused_on_cuda_and_differs_by_rounding_alone() -> None:
    """On a CPU it stays as it is, to the last bit; fp16 leaves the skipping of steps to the gradient scaler."""
    config = OptimConfig(lr=0.003)
    models = {device: Small() for device in ("cpu", "cuda")}
    models["cuda"].load_state_dict(models["cpu"].state_dict())
    optimizers = {device: build_optimizer(model, config, "bf16", device) for device, model in models.items()}
    assert [optimizers[device].param_groups[0]["fused"] for device in models] == [None, True]
    assert build_optimizer(Small(), config, "fp16", "cuda").param_groups[0]["fused"] is None
    losses = [train(model, optimizers[device], 8) for device, model in models.items()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_muon_gets_hidden_matrices_and_nothing_else() -> None:
    model = Small()
    assert hidden_matrices(model) == {"attention.in_proj_weight", "attention.out_proj.weight", "hidden.weight"}
    optimizer = build_optimizer(model, OptimConfig(muon=True, muon_lr=0.01, lr=0.002))
    assert isinstance(optimizer, JoinedOptimizer)
    by_lr = {group["lr"]: 0 for group in optimizer.param_groups}
    for group in optimizer.param_groups:
        by_lr[group["lr"]] += len(group["params"])
    assert by_lr == {0.01: 3, 0.002: len(list(model.parameters())) - 3}


def test_muon_leaves_named_parts_to_adamw() -> None:
    model = nn.ModuleDict({"given": nn.Linear(32, 32), "own": nn.Linear(32, 32)})
    optimizer = build_optimizer(model, OptimConfig(muon=True, muon_spares=["given"], lr=1e-3, muon_lr=0.5))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model["own"].weight)] == 0.5 and rates[id(model["given"].weight)] == 1e-3


def test_plain_sgd_moves_against_the_gradient_and_decays_matrices() -> None:
    model = nn.Linear(2, 1)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = build_optimizer(model, OptimConfig(name="sgd", lr=0.1, weight_decay=0.5))
    model(torch.tensor([[1.0, 2.0]])).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.weight.data, weight - 0.1 * (torch.tensor([[1.0, 2.0]]) + 0.5 * weight))
    torch.testing.assert_close(model.bias.data, bias - 0.1)
    with pytest.raises(GrexError, match=r'train\.optim\.name is "adam"; expected "adamw" or "sgd"'):
        build_optimizer(model, OptimConfig(name="adam"))


def test_joined_optimizer_learns_and_resumes_exactly() -> None:
    torch.manual_seed(0)
    model = Small()
    config = OptimConfig(muon=True, muon_lr=0.01, lr=0.003, schedule="cosine", warmup_fraction=0.2)
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, 30)
    losses = train(model, optimizer, 10, schedule)
    assert losses[-1] < 0.8 * losses[0]
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    expected = train(model, optimizer, 5, schedule)
    again = Small()
    again.load_state_dict(state[0])
    other = build_optimizer(again, config)
    other_schedule = build_schedule(other, config, 30)
    other.load_state_dict(state[1])
    other_schedule.load_state_dict(state[2])
    assert train(again, other, 5, other_schedule) == expected


def test_joined_optimizer_passes_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = Small()
    config = OptimConfig(muon=True, lr=0.003)
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, 20)
    engine = accelerate.Accelerator(cpu=True)
    model, optimizer, schedule = engine.prepare(model, optimizer, schedule)
    before = [p.detach().clone() for p in model.parameters()]
    engine.backward(loss_of(model))
    optimizer.step()
    schedule.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert optimizer.param_groups[0]["lr"] < config.muon_lr


def test_every_part_follows_the_schedule() -> None:
    config = OptimConfig(muon=True, muon_lr=0.5, lr=0.25, schedule="multistep", milestones=[2, 4], warmup_fraction=0.0)
    model = Small()
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, 6)
    seen = []
    for _ in range(6):
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[-1]["lr"]))
        train(model, optimizer, 1, schedule)
    assert seen == [pytest.approx((0.5 * f, 0.25 * f)) for f in (1, 1, 0.1, 0.1, 0.01, 0.01)]


def test_warmup_and_cosine() -> None:
    config = OptimConfig(lr=1.0, schedule="cosine", warmup_fraction=0.1, final_fraction=0.2)
    optimizer = build_optimizer(Small(), config)
    schedule = build_schedule(optimizer, config, 100)
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[55] == pytest.approx(0.6) and rates[100] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"groups": "x"}, "groups"), ({"text": "x"}, "text"), ({"groups": "released", "muon": True}, "muon")],
)
def test_unknown_choices_are_named(change: dict[str, object], word: str) -> None:
    with pytest.raises(GrexError, match=word):
        build_optimizer(Small(), OptimConfig(**change))  # type: ignore[arg-type]
    with pytest.raises(GrexError, match="schedule"):
        build_schedule(build_optimizer(Small(), OptimConfig()), OptimConfig(schedule="x"), 3)


def test_learning_rates_are_scaled_by_name() -> None:
    model = Small()
    config = OptimConfig(lr=0.1, muon=True, muon_lr=0.2, lr_scale={"hidden": 0.5, "hidden.bias": 0.0, "embedding": 0.1})
    optimizer = build_optimizer(model, config)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert found["hidden.weight"] == pytest.approx(0.1) and found["hidden.bias"] == 0.0  # Muon's rate halved; the longest start wins
    assert found["embedding.weight"] == pytest.approx(0.01)
    assert found["attention.in_proj_weight"] == 0.2 and found["norm.weight"] == 0.1
    with pytest.raises(GrexError, match="hiden"):
        build_optimizer(model, OptimConfig(lr_scale={"hiden": 0.5}))


def test_clipping_covers_optimised_parameters_only() -> None:
    wanted, left_out = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    wanted.grad, left_out.grad = torch.full((3,), 2.0), torch.full((3,), 100.0)
    optimizer = torch.optim.AdamW([wanted])
    norm = clip_gradients(optimized_parameters(optimizer), 0.01)
    assert norm.item() == pytest.approx(math.sqrt(12))
    assert wanted.grad.norm().item() == pytest.approx(0.01, rel=1e-3)
    assert left_out.grad[0] == 100
    wanted.grad = torch.full((3,), 2.0)
    assert clip_gradients([wanted], 0).item() == pytest.approx(math.sqrt(12))
    assert wanted.grad[0] == 2


def test_weight_average() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    average = WeightAverage(model, decay=0.5)
    by_hand, trained = 0.0, 0.0
    for step in range(1, 30):
        trained = float(step)
        with torch.no_grad():
            model.weight.fill_(trained)
        average.update(model)
        decay = min(0.5, (1 + step) / (10 + step))
        by_hand = decay * by_hand + (1 - decay) * trained
    with pytest.raises(KeyError), average.swap(model):
        assert model.weight[0, 0].item() == pytest.approx(by_hand, rel=1e-5)
        raise KeyError("evaluation failed")
    assert model.weight[0, 0].item() == trained
    other = WeightAverage(nn.Linear(2, 1, bias=False), decay=0.5)
    other.load_state_dict(average.state_dict())
    assert other.num_updates == 29 and torch.equal(other.shadow["weight"], average.shadow["weight"])
    with pytest.raises(ValueError, match="other parameters"):
        WeightAverage(nn.Linear(2, 1)).load_state_dict(average.state_dict())
    with pytest.raises(ValueError, match="decay"):
        WeightAverage(model, decay=1.0)
