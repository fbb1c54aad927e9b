"""Which precision `auto` chooses, and what follows it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from grex_mllm import precision
from grex_mllm.config import Config, OptimConfig
from grex_mllm.errors import GrexError
from grex_mllm.precision import autocast, bf16_speedup, resolve_precision
from grex_mllm.training.muon import BatchedMuon
from grex_mllm.training.optim import build_optimizer

AGREE = """
import os
from grex_mllm import precision
from grex_mllm.config import TrainConfig
from grex_mllm.training.engine import agreed_precision, leave, start_accelerator
fast = os.environ["RANK"] == "0"
precision.bf16_speedup = lambda: 4.0 if fast else 0.01
config = TrainConfig(precision="auto")
agreed = agreed_precision(start_accelerator(config, 1), config)
print(f"rank {os.environ['RANK']}: {agreed.precision} ({agreed.reason})", flush=True)
leave()
"""
PLAIN_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


@pytest.mark.parametrize(("speedup", "chosen"), [(4.0, "bf16"), (1.3, "bf16"), (1.0, "fp32"), (0.5, "fp32"), (0.01, "fp32")])
def test_auto_on_a_cpu_follows_the_measurement(monkeypatch: pytest.MonkeyPatch, speedup: float, chosen: str) -> None:
    monkeypatch.setattr(precision, "bf16_speedup", lambda: speedup)
    resolved = resolve_precision("auto", "cpu")
    assert resolved.precision == chosen and "measured" in resolved.reason and not resolved.warning


def test_emulated_bf16_by_name_is_allowed_and_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "bf16_speedup", lambda: 0.01)
    resolved = resolve_precision("bf16", torch.device("cpu"))
    assert resolved.precision == "bf16" and "100 times slower" in resolved.warning and "auto" in resolved.warning
    monkeypatch.setattr(precision, "bf16_speedup", lambda: 3.0)
    assert resolve_precision("bf16", "cpu").warning == ""


@pytest.mark.parametrize("native", [True, False])
def test_auto_on_cuda_follows_torch(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native and not including_emulation)
    assert resolve_precision("auto", "cuda:1").precision == ("bf16" if native else "fp32")
    assert bool(resolve_precision("bf16", "cuda").warning) is not native


def test_another_accelerator_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    # a CPU build of torch has no mps device: making a tensor there raises, which is the trial's "no"
    assert resolve_precision("auto", "mps").precision == ("bf16" if torch.backends.mps.is_available() else "fp32")
    monkeypatch.setattr(precision, "_bf16_works", lambda device: True)
    assert resolve_precision("auto", "mps").precision == "bf16"


def test_precisions_that_cannot_be_are_refused() -> None:
    with pytest.raises(GrexError, match='precision is "half"'):
        resolve_precision("half", "cpu")
    with pytest.raises(GrexError, match="fp16 on cpu"):
        resolve_precision("fp16", "cpu")
    with pytest.raises(GrexError, match="resolve it first"):
        autocast("auto", "cpu")


def test_the_measurement_leaves_the_threads_alone_and_agrees_with_a_plain_one() -> None:
    before = torch.get_num_threads()
    bf16_speedup.cache_clear()
    assert bf16_speedup() > 0 and torch.get_num_threads() == before
    assert bf16_speedup.cache_info().currsize == 1


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="the switches are for x86-64 processors")
def test_a_processor_held_to_avx2_computes_in_float32(tmp_path: Path) -> None:
    code = "from grex_mllm.precision import resolve_precision as r; print(r('auto', 'cpu')); print(r('bf16', 'cpu'))"
    folder = str(Path(precision.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **PLAIN_AVX2, "PYTHONPATH": folder}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    auto, by_name = done.stdout.splitlines()
    assert "precision='fp32'" in auto and "emulates bfloat16" in auto
    assert "precision='bf16'" in by_name and "times slower" in by_name


def test_autocast_does_as_it_is_told() -> None:
    layer, x = nn.Linear(4, 4), torch.ones(2, 4)
    with autocast("bf16", "cpu"):
        assert layer(x).dtype == torch.bfloat16
    with autocast("fp32", "cpu"):
        assert layer(x).dtype == torch.float32


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.bfloat16)])
def test_muon_follows_the_precision(name: str, dtype: torch.dtype) -> None:
    optimizer = build_optimizer(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), OptimConfig(muon=True), name)
    parts = [part for part in optimizer._parts if isinstance(part, BatchedMuon)]  # type: ignore[attr-defined]
    assert [part.dtype for part in parts] == [dtype]


def test_auto_is_the_default() -> None:
    assert Config().train.precision == "auto"


def test_processes_of_unlike_machines_agree(tmp_path: Path) -> None:
    (tmp_path / "agree.py").write_text(AGREE, encoding="utf-8")
    folder = str(Path(precision.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29611", str(tmp_path / "agree.py")],
        env={**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "rank 0: fp32 (process 1 does not compute in bfloat16 natively)" in done.stdout
    assert "rank 1: fp32 (this CPU emulates bfloat16" in done.stdout


@pytest.mark.parametrize(("small", "large", "chosen"), [(0.5, 2.6, "bf16"), (0.3, 0.9, "fp32"), (0.05, None, "fp32")])
def test_units_that_are_slow_on_small_products_are_not_taken_for_emulation(
    monkeypatch: pytest.MonkeyPatch, small: float, large: float | None, chosen: str
) -> None:
    """Matrix units first turn their matrices: half the speed at 96, 2.6 times at 256. Emulation shows 0.05 and is asked no more."""
    speeds = {precision.ROUGH_SIDE: small, precision.TRIAL_SIDE: large}
    monkeypatch.setattr(precision, "_speedup", speeds.__getitem__)
    monkeypatch.setattr(precision, "bf16_speedup", precision._bf16_speedup)
    assert resolve_precision("auto", "cpu").precision == chosen
