"""The same loop as several processes on CPU: plain data parallel, ZeRO-2, offloaded ZeRO-2 and ZeRO-3, with kill and resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from test_end_to_end import small
from toy_training import losses, toy_config, toy_train

from grex_mllm.config import TrainConfig, save_config
from grex_mllm.data.dataset import epoch_index
from grex_mllm.errors import GrexError
from grex_mllm.models.grex import GrexModel
from grex_mllm.training.engine import check_deepspeed, check_precision, deepspeed_plugin
from grex_mllm.training.run import train_from_config

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted((ROOT / "deepspeed_configs").glob("*.json"))
ZERO2 = str(ROOT / "deepspeed_configs" / "zero2_cpu.json")


def launch(folder: Path, *runs: dict[str, Any], limit_s: float = 300, processes: int = 2) -> tuple[int, str]:
    """Run the toy as two processes; see `launch_program`."""
    return launch_program(folder, [str(ROOT / "tests/toy_training.py"), *map(json.dumps, runs)], limit_s, processes)


def launch_program(folder: Path, program: list[str], limit_s: float = 300, processes: int = 2) -> tuple[int, str]:
    """Run a program as several processes; returns the exit status and what they wrote. After the limit all of them are killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}", *program]
    shown = folder / f"shown_{port}.txt"
    with shown.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(process.pid).children():
                child.send_signal(signal.SIGABRT)  # it writes where it stands
            status = process.wait(60)
            pytest.fail(f"not finished after {limit_s} s:\n{shown.read_text()[-6000:]}")
    return status, shown.read_text()


def single(folder: Path, **settings: Any) -> list[dict[str, Any]]:
    """Do the same run in this one process."""
    toy_train(toy_config(folder, **settings))
    return losses(folder)


def assert_close(run: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    assert [sorted(line) for line in run] == [sorted(line) for line in reference]
    for line, expected in zip(run, reference, strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)


def write_json(folder: Path, name: str, **zero: Any) -> str:
    """Write the CPU configuration with another zero_optimization."""
    values = json.loads(Path(ZERO2).read_text())
    values["zero_optimization"] |= zero
    (folder / name).write_text(json.dumps(values))
    return str(folder / name)


REAL = {
    "instance_selection": {},
    "rela": {
        "model__decoder__name": "rela", "model__decoder__num_layers": 2, "model__decoder__minimap_side": 4, "model__decoder__width": 64,
        "model__pixel_decoder__name": "deformable", "model__pixel_decoder__width": 64, "model__pixel_decoder__num_layers": 1,
        "model__pixel_decoder__num_heads": 4, "model__pixel_decoder__num_points": 2, "model__pixel_decoder__feedforward": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("decoder", "zero"),
    [
        pytest.param("rela", {"stage": 3}, marks=pytest.mark.long),
        pytest.param("rela", {"stage": 2}, marks=pytest.mark.long),
        pytest.param("rela", {"stage": 2, "offload_optimizer": {"device": "cpu"}}, marks=pytest.mark.long),
        pytest.param("instance_selection", {"stage": 3}, marks=pytest.mark.long),
        pytest.param("instance_selection", None, marks=pytest.mark.long),
    ],
    ids=["rela ZeRO-3", "rela ZeRO-2", "rela ZeRO-2 offloaded", "instance_selection ZeRO-3", "instance_selection DDP"],
)
def test_the_real_model_trains_jointly_as_in_one_process(tmp_path: Path, decoder: str, zero: dict[str, Any] | None) -> None:
    """ReLA, or our decoder, and a language model with LoRA: the same losses, and a whole model at the end."""
    pytest.importorskip("deepspeed")
    plain: dict[str, object] = dict(model__text__dropout=0.0, train__optim__average_decay=0.0, train__save_every=100,
                                    train__precision="fp32", train__steps=4, **REAL[decoder])  # fmt: skip
    configs = {name: small(train__out=tmp_path / name, **plain) for name in ("one", "two")}
    for config in configs.values():
        config.train.pretraining = None
    configs["two"].train.deepspeed = write_json(tmp_path, "zero.json", **zero) if zero is not None else None
    save_config(configs["two"], tmp_path / "two.yaml")
    status, shown = launch_program(tmp_path, ["-m", "grex_mllm", "train", "--config", str(tmp_path / "two.yaml")])
    assert status == 0, shown[-6000:]
    train_from_config(configs["one"])
    ours, theirs = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert any(name.startswith("loss/generate/") for name in ours[0]) and len(ours) == 4
    assert_close(ours, theirs)
    one, two = (GrexModel.from_pretrained(tmp_path / name).saved_state() for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one if one[name].is_floating_point()) < 1e-3


@pytest.mark.long
def test_zero_equals_one_process_and_resumes_after_a_kill(tmp_path: Path) -> None:
    """Both tasks, so that every step leaves some weights unused; two batches a step where DeepSpeed offloads."""
    pytest.importorskip("deepspeed")
    zero3, offload = write_json(tmp_path, "3.json", stage=3), write_json(tmp_path, "o.json", offload_optimizer={"device": "cpu"})
    run2 = {"deepspeed": ZERO2, "optim.average_decay": 0.9}
    run3 = {"deepspeed": zero3, "out": str(tmp_path / "zero3")}
    status, shown = launch(
        tmp_path,
        {"deepspeed": offload, "out": str(tmp_path / "offload"), "accumulation": 2},
        {**run3, "stop_after": 6},
        {**run2, "out": str(tmp_path / "zero2")},
        {**run2, "out": str(tmp_path / "killed"), "kill_after": 6},
    )
    assert status != 0 and shown.count("finished 12 resumed 0") == 2, shown[-6000:]
    assert len(losses(tmp_path / "killed")) == 6
    status, shown = launch(tmp_path, {**run3, "resume": True}, {**run2, "out": str(tmp_path / "killed"), "resume": True})
    assert status == 0 and shown.count("finished 12 resumed 4") == 2, shown[-6000:]

    plain = single(tmp_path / "single", **{"optim.average_decay": 0.9})
    assert_close(losses(tmp_path / "zero2"), plain)
    assert_close(losses(tmp_path / "zero3"), plain)
    assert_close(losses(tmp_path / "offload"), single(tmp_path / "two", accumulation=2))
    assert losses(tmp_path / "killed") == losses(tmp_path / "zero2")
    toy_train(toy_config(tmp_path / "single", resume=True, **{"optim.average_decay": 0.9}), save=True)
    published = {name: torch.load(tmp_path / name / "toy.pt", weights_only=True) for name in ("single", "zero2", "killed", "zero3")}
    for key, value in published["single"].items():
        torch.testing.assert_close(published["zero2"][key], value, rtol=1e-4, atol=1e-6)
        assert torch.equal(published["zero2"][key], published["killed"][key])
        assert published["zero3"][key].shape == value.shape  # not the average: ZeRO-3 has none


@pytest.mark.slow
def test_plain_processes_equal_one_and_write_once(tmp_path: Path) -> None:
    settings = {"accumulation": 2, "num_workers": 1}
    status, shown = launch(tmp_path, {"out": str(tmp_path / "two"), **settings})
    assert status == 0 and shown.count("finished") == 1, shown[-6000:]
    assert_close(losses(tmp_path / "two"), single(tmp_path / "one", **settings))
    assert [path.name for path in sorted((tmp_path / "two" / "checkpoints" / "step_00000012").iterdir())] == [
        "checkpoint.json",
        "model.safetensors",
        "optimizer.safetensors",
        "random_0.pt",
        "random_1.pt",
        "state.pt",
    ]


@pytest.mark.slow
def test_a_bad_value_on_one_process_ends_all(tmp_path: Path) -> None:
    status, shown = launch(tmp_path, {"out": str(tmp_path), "poison": "i3"})
    place = next(place for place in range(100) if epoch_index(place, 10, 7)[1] == 3)  # of the image; two processes take four in turn
    told = f"step {place // 4 + 1}: not finite: rank {place % 2}: ground/fit "
    assert status != 0 and told in shown and "total nan; image ids" in shown and "i3" in shown, shown[-6000:]
    assert f"rank {1 - place % 2}: ground" not in shown and "Timed out" not in shown
    assert not (tmp_path / "toy.pt").exists()


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_shipped_files_take_shared_numbers_from_the_configuration(file: Path) -> None:
    pytest.importorskip("deepspeed")
    values = check_deepspeed(str(file))
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert values[name] == "auto"
    assert f"`{file.name}`" in (file.parent / "README.md").read_text()


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_nothing_is_left_to_fill_in(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Accelerate gets holds numbers alone, and DeepSpeed knows every field of its section."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    config = TrainConfig(deepspeed=str(file), accumulation=3)
    values = deepspeed_plugin(config, batch_images=2, on_cpu=True).hf_ds_config.config
    assert '"auto"' not in json.dumps(values)
    assert (values["train_batch_size"], values["train_micro_batch_size_per_gpu"], values["gradient_accumulation_steps"]) == (24, 2, 3)
    zero = json.loads(file.read_text())["zero_optimization"]
    assert set(zero) <= {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert DeepSpeedZeroConfig(**zero).stage == zero["stage"]


def test_files_that_cannot_work_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    file = tmp_path / "x.json"
    with pytest.raises(GrexError, match="does not exist"):
        check_deepspeed(str(file))
    nvme = '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}'
    bf16 = '{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}'
    for text, named in (("{", "no JSON"), ("{}", "stage"), (bf16, '"bf16"'), (nvme, "offload_optimizer to nvme")):
        file.write_text(text)
        with pytest.raises(GrexError, match=named):
            check_deepspeed(str(file))


def test_nodes_of_different_sizes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("WORLD_SIZE", "12")
    with pytest.raises(GrexError, match="zero_hpz_partition_size 8, and there are 12 processes"):
        deepspeed_plugin(TrainConfig(deepspeed="deepspeed_configs/zero3_hpz.json"), batch_images=2, on_cpu=True)


@pytest.mark.long
def test_fp16_means_bf16_under_deepspeed_and_the_run_says_so(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    status, shown = launch(tmp_path, {"deepspeed": ZERO2, "precision": "fp16", "steps": 2, "out": str(tmp_path / "run")})
    assert status == 0 and "precision: bf16 on cpu (fp16 is configured; under DeepSpeed it is bf16" in shown, shown[-3000:]


def test_numbers_that_contradict_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    values = json.loads(Path(ZERO2).read_text())
    (tmp_path / "x.json").write_text(json.dumps(values | {"gradient_accumulation_steps": 3}))
    with pytest.raises(GrexError, match="gradient_accumulation_steps is 3; expected 1"):
        toy_train(toy_config(tmp_path / "run", deepspeed=str(tmp_path / "x.json")))
    with pytest.raises(GrexError, match="fp16 on cpu"):
        check_precision("fp16", "cpu")
    assert not (tmp_path / "run").exists() and TrainConfig().deepspeed is None
    assert shutil.which("torchrun", path=str(Path(sys.executable).parent))
