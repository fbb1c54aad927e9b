"""Checkpoints: whole or absent at every moment, strict, exact on resume."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from toy_training import ToyModel, losses, toy_config, toy_train

from grex_mllm.config import OptimConfig
from grex_mllm.errors import GrexError
from grex_mllm.training import checkpoint
from grex_mllm.training.consolidated import load_optimizer, load_weights, optimizer_entries, weight_entries, weights, write_entries
from grex_mllm.training.optim import build_optimizer

TOY = Path(__file__).with_name("toy_training.py")


class Killed(BaseException):
    """Stands for SIGKILL within this process."""


def stop_after(last: int) -> Any:
    def on_step(step: int, _: dict[str, float]) -> None:
        if step == last:
            raise Killed

    return on_step


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    settings = {"optim.average_decay": 0.9, "accumulation": 2}
    _, whole = toy_train(toy_config(tmp_path / "whole", **settings), dropout=0.3, save=True)
    with pytest.raises(Killed):
        toy_train(toy_config(tmp_path / "parts", **settings), dropout=0.3, save=True, on_step=stop_after(7))
    assert len(losses(tmp_path / "parts")) == 7
    with pytest.raises(Killed):  # from 4, and killed again before a new checkpoint
        toy_train(toy_config(tmp_path / "parts", resume=True, **settings), dropout=0.3, save=True, on_step=stop_after(6))
    result, parts = toy_train(toy_config(tmp_path / "parts", resume=True, **settings), dropout=0.3, save=True)
    assert result.resumed_from == 4 and [line["step"] for line in result.lines] == list(range(5, 13))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True))
    published = [torch.load(tmp_path / name / "toy.pt", weights_only=True)["shared.weight"] for name in ("whole", "parts")]
    assert torch.equal(*published)


def run_and_kill(settings: dict[str, Any], wait_s: float) -> bool:
    """Start the toy as a program, kill it wait_s after its first log line; True when it had finished before."""
    log = Path(settings["out"]) / "log.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else 0
    environment = {**os.environ, "PYTHONPATH": str(TOY.parent.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([sys.executable, str(TOY), json.dumps(settings)], env=environment, stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while process.poll() is None and (not log.exists() or log.stat().st_mtime_ns == before):
        assert time.monotonic() < limit
        time.sleep(0.005)
    try:
        assert process.wait(wait_s) == 0
        return True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return False


@pytest.mark.slow
def test_sigkill_at_any_moment_changes_no_loss(tmp_path: Path) -> None:
    """Kill a real process at random moments until it gets through; every loss equals the uninterrupted run's bit for bit."""
    # one thread: the parent and its child may have different numbers of threads, and sums would be split differently
    settings = {"steps": 40, "save_every": 3, "num_threads": 1, "dropout": 0.3, "optim.average_decay": 0.9, "wait_s": 0.02, "resume": True}
    toy_train(toy_config(tmp_path / "whole", steps=40, save_every=3, num_threads=1, **{"optim.average_decay": 0.9}), dropout=0.3)
    draw = random.Random(time.time_ns())
    kills = 0
    while not run_and_kill({**settings, "out": str(tmp_path / "parts")}, draw.uniform(0.0, 0.5) if kills < 2 else 120):
        kills += 1
    assert kills == 2
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert (tmp_path / "parts" / "toy.pt").exists()
    assert not list((tmp_path / "parts" / "checkpoints").glob(".*"))


def test_every_moment_of_saving_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop at every file operation of a save in turn: what is found then loads, and the run goes on to the same losses."""
    toy_train(toy_config(tmp_path / "whole", steps=6, save_every=3), dropout=0.3)
    with pytest.raises(Killed):
        toy_train(toy_config(tmp_path / "start", steps=6, save_every=3), dropout=0.3, on_step=stop_after(4))
    outcomes = []
    for moment in range(1000):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "start", out)
        calls = iter(range(10_000))

        def interrupted(operation: Any, at: int = moment, calls: Any = calls) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if next(calls) == at:
                    raise Killed
                return operation(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for module, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (shutil, "rmtree"), (torch, "save")):
                patch.setattr(module, name, interrupted(getattr(module, name)))
            with contextlib.suppress(Killed):
                toy_train(toy_config(out, steps=6, save_every=3, resume=True, keep=1), dropout=0.3)
                break
        found = checkpoint.latest(out)
        assert found is not None
        outcomes.append(found.name)
        toy_train(toy_config(out, steps=6, save_every=3, resume=True, keep=1), dropout=0.3)
        assert losses(out) == losses(tmp_path / "whole")
        assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["frozen.safetensors", "step_00000006"]
    assert set(outcomes) == {"step_00000003", "step_00000006"} and outcomes == sorted(outcomes) and moment > 10


def test_only_complete_checkpoints_are_found(tmp_path: Path) -> None:
    toy_train(toy_config(tmp_path, steps=12, save_every=3, keep=3))
    root = tmp_path / "checkpoints"
    assert [path.name for path in sorted(root.glob("step_*"))] == ["step_00000006", "step_00000009", "step_00000012"]
    (root / "step_00000012" / checkpoint.MARKER).unlink()
    assert checkpoint.latest(tmp_path) == root / "step_00000009"
    with (root / "step_00000009" / "model.safetensors").open("ab") as file:
        file.truncate(100)
    assert checkpoint.latest(tmp_path) == root / "step_00000006"
    result, _ = toy_train(toy_config(tmp_path, steps=12, save_every=3, keep=3, resume=True))
    assert result.resumed_from == 6 and [path.name for path in sorted(root.glob("step_*"))] == [
        "step_00000006",
        "step_00000009",
        "step_00000012",
    ]
    (root / checkpoint.FROZEN).unlink()
    assert checkpoint.latest(tmp_path) is None and checkpoint.latest(tmp_path / "nothing") is None


def test_another_configuration_is_refused_and_named(tmp_path: Path) -> None:
    toy_train(toy_config(tmp_path, steps=4))
    for change, named in ({"seed": 2}, "train.seed: 0 -> 2"), ({"optim.lr": 0.5}, "train.optim.lr: 0.01 -> 0.5"):
        with pytest.raises(GrexError, match=named):
            toy_train(toy_config(tmp_path, resume=True, **{"steps": 4, **change}))
    with pytest.raises(GrexError, match=r"train\.steps: 4 -> 3"):
        toy_train(toy_config(tmp_path, steps=3, resume=True))


def test_a_checkpoint_of_before_is_refused_with_words(tmp_path: Path) -> None:
    toy_train(toy_config(tmp_path, steps=4))
    file = tmp_path / "checkpoints" / "step_00000004" / checkpoint.MARKER
    file.write_text(file.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(GrexError, match="of format 1, of another version of grex-mllm; expected format 2; finish that run"):
        toy_train(toy_config(tmp_path, steps=6, resume=True))


def test_a_run_may_be_made_longer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy_train(toy_config(tmp_path, steps=4))
    result, _ = toy_train(toy_config(tmp_path, steps=6, resume=True, log_every=2, keep=1, num_workers=1))
    assert (result.resumed_from, result.steps) == (4, 6) and "train.steps grows from 4 to 6" in capsys.readouterr().out


def test_the_hash_names_what_decides_the_losses() -> None:
    hashes = [
        checkpoint.config_hash(values)
        for values in ({"train": {"seed": 0, "out": "a"}}, {"train": {"seed": 0, "out": "b"}}, {"train": {"seed": 1}})
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_weights_are_loaded_strictly() -> None:
    model = ToyModel()
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_weights(ToyModel(), whole, "x")
    for broken in (
        {k: v for k, v in whole.items() if k != "calls"},
        whole | {"more": torch.zeros(1)},
        whole | {"norm.bias": torch.zeros(2)},
    ):
        with pytest.raises(GrexError, match=r"1 tensors do not fit the model, (calls|more|norm\.bias)"):
            load_weights(ToyModel(), broken, "x")


@pytest.mark.parametrize("changes", [{}, {"name": "sgd"}, {"muon": True}], ids=["AdamW", "SGD", "Muon"])
def test_optimizer_state_goes_by_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Into another model whose parameters are made in the same order, and through a file that safetensors reads."""

    def made(seed: int) -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(16, 17), torch.nn.LayerNorm(17), torch.nn.Linear(17, 1))
        model[1].register_buffer("flags", torch.tensor([True, False, True]))
        return model, build_optimizer(model, OptimConfig(**changes))

    def step(model: torch.nn.Module, optimizer: Any) -> None:
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 32).view(2, 16)).square().sum().backward()
        optimizer.step()

    model, optimizer = made(0)
    step(model, optimizer)
    entries = optimizer_entries(model, optimizer, None)
    keys = {entry.name.split("/")[0] for entry in entries}
    assert keys == ({"muon": {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}, "name": set()}).get(
        next(iter(changes), ""), {"exp_avg", "exp_avg_sq", "step"}
    )
    write_entries(tmp_path / "o.safetensors", entries)
    write_entries(tmp_path / "m.safetensors", weight_entries(weights(model, trainable=True)))
    other, theirs = made(1)
    load_weights(other, load_file(tmp_path / "m.safetensors"), "x")
    load_optimizer(other, theirs, None, load_file(tmp_path / "o.safetensors"))
    for _ in range(2):
        step(model, optimizer)
        step(other, theirs)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_frozen_weights_are_written_once_and_come_back(tmp_path: Path) -> None:
    _, model = toy_train(toy_config(tmp_path, steps=4))
    root = tmp_path / "checkpoints"
    written = (root / checkpoint.FROZEN).stat().st_mtime_ns
    assert set(load_file(root / checkpoint.FROZEN)) == {"frozen.weight", "frozen.bias"}
    assert not any(name.startswith("frozen") for name in load_file(root / "step_00000004" / "model.safetensors"))
    config = toy_config(tmp_path, steps=8, resume=True)
    config.train.seed, seed = 0, torch.manual_seed
    try:
        torch.manual_seed = lambda *_: seed(99)  # type: ignore[assignment]  # another initial model
        _, resumed = toy_train(config)
    finally:
        torch.manual_seed = seed
    assert torch.equal(model.frozen.weight, resumed.frozen.weight)
    assert (root / checkpoint.FROZEN).stat().st_mtime_ns == written


def test_pickled_code_is_refused(tmp_path: Path) -> None:
    toy_train(toy_config(tmp_path, steps=4))
    folder = tmp_path / "checkpoints" / "step_00000004"

    class Evil:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save(Evil(), folder / checkpoint.SHARED)
    marker = json.loads((folder / checkpoint.MARKER).read_text())
    marker["files"][checkpoint.SHARED] = (folder / checkpoint.SHARED).stat().st_size
    (folder / checkpoint.MARKER).write_text(json.dumps(marker))
    with pytest.raises(pickle.UnpicklingError):
        toy_train(toy_config(tmp_path, steps=6, resume=True))
    assert not (tmp_path / "owned").exists()


def test_random_states_come_back(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))]

    random.gauss(0, 1), np.random.randn()  # leaves half a pair in both
    torch.save(checkpoint.random_states(), tmp_path / "r.pt")
    first = draw()
    draw()
    checkpoint.set_random_states(torch.load(tmp_path / "r.pt", weights_only=True))
    assert draw() == first


def test_publishing_replaces_files_and_folders(tmp_path: Path) -> None:
    def write(text: str) -> Any:
        def save_model(folder: Path) -> None:
            (folder / "tokenizer").mkdir()
            (folder / "tokenizer" / "vocab.txt").write_text(text)
            (folder / "model.safetensors").write_text(text)

        return save_model

    for text in ("one", "two"):
        checkpoint.publish(write(text), tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "tokenizer"]
        assert (tmp_path / "tokenizer" / "vocab.txt").read_text() == (tmp_path / "model.safetensors").read_text() == text

    def fails(folder: Path) -> None:
        (folder / "model.safetensors").write_text("thr")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.publish(fails, tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "two"
