"""Language models of folders under two processes: in partitions under ZeRO-3, quantised under DDP and ZeRO-2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_deepspeed import ROOT, launch_program, write_json
from test_end_to_end import small
from tiny_llms import FAMILIES, write_llm
from toy_training import losses

from grex_mllm.config import Config, save_config
from grex_mllm.errors import GrexError
from grex_mllm.models.grex import GrexModel
from grex_mllm.training import run
from grex_mllm.training.run import train_from_config

pytest.importorskip("deepspeed")
LINES = ["the red circle on the left", "two blue squares and a star", "all shapes except the largest one"] * 3
PARTS: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
VALIDATED = {"train__validation__every": 4, "train__validation__images": 3}
QUANTISED = {"model__generator__quantisation": "nf4", "model__generator__gradient_checkpointing": True}


@pytest.fixture(autouse=True)
def few_lines_and_one_thread(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As in the program that the processes run."""
    monkeypatch.setattr(run, "CORPUS_LINES", 300)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def joint(out: Path, lm: Path, zero: dict[str, Any] | None, **changes: object) -> Config:
    """A joint training of the real model with a language model of a folder; a weight changes only where a gradient reaches it."""
    plain: dict[str, object] = {
        "model__text__dropout": 0.0, "train__optim__average_decay": 0.0, "train__optim__weight_decay": 0.0, "train__precision": "fp32",
        "train__save_every": 100, "train__steps": 4, "model__generator__lm": lm, "model__generator__lora_rank": 4,
    }  # fmt: skip
    config = small(train__out=out, **{**plain, **changes})
    config.train.pretraining = None
    config.train.deepspeed = write_json(out.parent, f"{out.name}.json", **zero) if zero is not None else None
    return config


def run_twice(folder: Path, *configs: Config) -> None:
    """Do each run as two processes in one launch, then each in this process, into the folder beside it."""
    for config in configs:
        save_config(config, Path(config.train.out).with_suffix(".yaml"))
    program = [str(ROOT / "tests/llm_training.py"), *(str(Path(config.train.out).with_suffix(".yaml")) for config in configs)]
    status, shown = launch_program(folder, program)
    assert status == 0, shown[-6000:]
    for config in configs:
        config.train.deepspeed, config.train.out = None, f"{config.train.out}_one"
        train_from_config(config)


def assert_same(out: Path, bound: float) -> None:
    """Compare every loss of every step, and require that a gradient has reached every weight of the generator."""
    ours, theirs = losses(out), losses(Path(f"{out}_one"))
    assert [sorted(line) for line in ours] == [sorted(line) for line in theirs] and len(ours) == 4
    for line, expected in zip(ours, theirs, strict=True):
        for name in line:
            assert "loss/" not in name or line[name] == pytest.approx(expected[name], rel=bound, abs=bound), name
    first, last = load_file(out / "first.safetensors"), GrexModel.from_pretrained(out).saved_state()
    assert first.keys() == last.keys() and any("lora_A" in name for name in first)
    still = [name for name in first if name.startswith("generator.") and torch.equal(first[name], last[name])]
    assert not still, still


def held(out: Path) -> list[dict[str, Any]]:
    """Return what the processes wrote about the language model, by rank."""
    return [json.loads((out / f"held_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.long
def test_a_model_in_partitions_and_a_quantised_one_train_as_in_one_process(tmp_path: Path) -> None:
    """ZeRO-3 with gradient checkpointing and validation in between; NF4 with gradient checkpointing under DDP."""
    lm = write_llm("qwen2", tmp_path / "lm", LINES)
    parts = joint(tmp_path / "parts", lm, PARTS, model__generator__gradient_checkpointing=True, **VALIDATED)
    run_twice(tmp_path, joint(tmp_path / "nf4", lm, None, **QUANTISED), parts)  # Accelerate forgets no DeepSpeed
    assert_same(tmp_path / "parts", 1e-5)
    assert_same(tmp_path / "nf4", 1e-5)
    for process in held(tmp_path / "parts"):
        assert process["whole"] / 2 <= process["held"] < process["whole"] * 0.51  # odd sizes are padded
    ours, theirs = (json.loads((tmp_path / name / "best" / "validation.json").read_text()) for name in ("parts", "parts_one"))
    assert "generate/round_trip_Pr@F1" in ours and ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_trains_in_partitions(family: str, tmp_path: Path) -> None:
    run_twice(tmp_path, joint(tmp_path / "parts", write_llm(family, tmp_path / "lm", LINES), PARTS, **VALIDATED))
    assert_same(tmp_path / "parts", 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("quantisation", ["nf4", "int8"])
def test_quantised_models_under_zero2(quantisation: str, tmp_path: Path) -> None:
    lm = write_llm("llama", tmp_path / "lm", LINES)
    run_twice(tmp_path, joint(tmp_path / "two", lm, {"stage": 2}, **QUANTISED | {"model__generator__quantisation": quantisation}))
    assert_same(tmp_path / "two", 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("stage", [None, 1, 2, 3])
def test_the_frozen_base_is_held_in_the_type_that_is_computed_in(stage: int | None, tmp_path: Path) -> None:
    """Trained weights stay float32 beside it, under every stage."""
    lm = write_llm("llama", tmp_path / "lm", LINES)
    zero = None if stage is None else PARTS | {"stage": stage}
    run_twice(tmp_path, joint(tmp_path / "two", lm, zero, train__precision="bf16", model__generator__gradient_checkpointing=True))
    assert_same(tmp_path / "two", 0.02)
    assert [process["dtypes"] for process in held(tmp_path / "two")] == [["torch.bfloat16"]] * 2
    adapters = load_file(tmp_path / "two" / "model.safetensors")
    assert {value.dtype for name, value in adapters.items() if "lora_" in name} == {torch.float32}


@pytest.mark.long
def test_no_process_loads_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random Llama of 1.07 GB in files of 200 MB: the making of the model raises the peak of each process by less than 0.75 of it."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 8, "num_key_value_heads": 8}
    lm = write_llm("llama", tmp_path / "lm", LINES, shard="200MB", head_dim=128, **sizes)
    whole = sum(file.stat().st_size for file in lm.glob("*.safetensors"))
    assert whole > 1e9 and len(list(lm.glob("*.safetensors"))) > 4
    lean = {f"stage3_max_{name}": 10_000_000 for name in ("live_parameters", "reuse_distance")}
    lean |= {"reduce_bucket_size": 1_000_000, "stage3_prefetch_bucket_size": 1_000_000}
    config = joint(tmp_path / "parts", lm, PARTS | lean)
    save_config(config, tmp_path / "parts.yaml")
    monkeypatch.setenv("stop_after", "1")
    status, shown = launch_program(tmp_path, [str(ROOT / "tests/llm_training.py"), str(tmp_path / "parts.yaml")], limit_s=600)
    assert status == 0, shown[-6000:]
    for process in held(tmp_path / "parts"):
        assert 0.5 * whole < process["loading_bytes"] < 0.75 * whole, process


def test_what_zero3_cannot_hold_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    config = joint(tmp_path / "run", Path("no/such/model"), PARTS, model__generator__quantisation="nf4")
    with pytest.raises(GrexError, match=r"quantisation nf4 with ZeRO-3 .*expected weights of floating-point numbers there.*use ZeRO-2"):
        train_from_config(config)
    assert not (tmp_path / "run").exists()
    with pytest.raises(GrexError, match=r"lora_dora with ZeRO-3 .*use ZeRO-2, or set lora_dora to false"):
        train_from_config(joint(tmp_path / "run", Path("no/such/model"), PARTS, model__generator__lora_dora=True))
