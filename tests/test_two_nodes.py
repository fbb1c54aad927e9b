"""Two nodes on one machine, ReLA and a language model with LoRA: as one process, killed at any moment, and going on with what is left."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from nodes import Cluster, accelerate, deepspeed, ssh_server, torchrun
from safetensors.torch import load_file
from test_deepspeed import write_json
from test_elastic import assert_same_run, real_config
from toy_training import losses

from grex_mllm.config import Config, save_config
from grex_mllm.training import checkpoint, run
from grex_mllm.training.run import train_from_config
from grex_mllm.training.watch import FOLDER as STANDING

SGD = {"train__optim__name": "sgd", "train__optim__lr": 0.01}
ENGINES = pytest.mark.parametrize("stage", [None, 2, 3], ids=["DDP", "ZeRO-2", "ZeRO-3"])


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers from few lines, for all runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "CORPUS_LINES", 300)
        out = tmp_path_factory.mktemp("made")
        run.make_tokenizers(real_config(out, "rela"))
    return out / run.TOKENIZERS


def settle(tmp_path: Path, tokenizers: Path, name: str, stage: int | None = None, **changes: Any) -> tuple[Config, Path]:
    """Return the configuration of a run and the file that holds it; its tokenizers are there."""
    settings = {"train__batch_images": 4, "train__steps": 8, "train__save_every": 2, **changes}
    config = real_config(tmp_path / name, "rela", **settings)
    if stage is not None:
        pytest.importorskip("deepspeed")
        config.train.deepspeed = write_json(tmp_path, f"{stage}.json", stage=stage, stage3_param_persistence_threshold=0)
    shutil.copytree(tokenizers, tmp_path / name / run.TOKENIZERS)
    save_config(config, tmp_path / f"{name}.yaml")
    return config, tmp_path / f"{name}.yaml"


def finish(cluster: Cluster) -> str:
    """Wait until all launchers have ended well; return what they wrote."""
    with cluster:
        assert set(cluster.wait()) == {0}, cluster.text()[-6000:]
    return cluster.text()


def assert_as_one(out: Path, one: Path) -> None:
    """Every loss, learning rate and gradient norm within 1e-5 of one process."""
    ours, theirs = losses(out), losses(one)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] and ours
    for line, expected in zip(ours, theirs, strict=True):
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-7)


def assert_equal(out: Path, whole: Path) -> None:
    """Bit for bit: losses and final weights."""
    assert losses(out) == losses(whole)
    one, two = (load_file(folder / "model.safetensors") for folder in (out, whole))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_two_launchers_train_as_one_process(tmp_path: Path, tokenizers: Path) -> None:
    _, yaml = settle(tmp_path, tokenizers, "two", train__steps=2)
    finish(torchrun(tmp_path, yaml))
    train_from_config(settle(tmp_path, tokenizers, "one", train__steps=2)[0])
    assert_as_one(tmp_path / "two", tmp_path / "one")


@pytest.mark.long
@ENGINES
@pytest.mark.parametrize("each", [1, 2])
def test_two_launchers_train_as_one_process_under_every_engine(tmp_path: Path, tokenizers: Path, each: int, stage: int | None) -> None:
    config, yaml = settle(tmp_path, tokenizers, "two", stage, train__steps=10)
    finish(torchrun(tmp_path, yaml, each=each, train__deepspeed=config.train.deepspeed))
    train_from_config(settle(tmp_path, tokenizers, "one", train__steps=10)[0])
    assert_as_one(tmp_path / "two", tmp_path / "one")


@pytest.mark.long
def test_two_launchers_of_accelerate_train_as_one_process(tmp_path: Path, tokenizers: Path) -> None:
    finish(accelerate(tmp_path, settle(tmp_path, tokenizers, "two", train__steps=4)[1]))
    train_from_config(settle(tmp_path, tokenizers, "one", train__steps=4)[0])
    assert_as_one(tmp_path / "two", tmp_path / "one")


@pytest.mark.long
@ENGINES
def test_one_process_is_killed_in_a_step_and_any_number_goes_on(tmp_path: Path, tokenizers: Path, stage: int | None) -> None:
    """Two processes go on bit for bit; one and four within 1e-4 (losses, predictions) and 1e-5 (weights) under plain SGD."""
    config, yaml = settle(tmp_path, tokenizers, "whole", stage, **SGD)
    given = {"train__deepspeed": config.train.deepspeed}
    finish(torchrun(tmp_path, yaml, **given))
    _, yaml = settle(tmp_path, tokenizers, "cut", stage, **SGD)
    with torchrun(tmp_path, yaml, **given) as cluster:
        cluster.computing(tmp_path / "cut", rank=1, step=5).kill()
        assert all(status != 0 for status in cluster.wait(60)), cluster.text()[-6000:]
    found = checkpoint.latest(tmp_path / "cut")
    assert found is not None and 4 <= int(found.name[-8:]) < 8 and not (tmp_path / "cut" / "model.safetensors").exists()
    for nodes, each, name in ((2, 1, "two"), (1, 1, "one"), (2, 2, "four")):
        shutil.copytree(tmp_path / "cut", tmp_path / name)
        shown = finish(torchrun(tmp_path, yaml, nodes=nodes, each=each, **given, train__out=tmp_path / name, train__resume="true"))
        assert f"going on after step {int(found.name[-8:])}" in shown
        assert_same_run(tmp_path / name, tmp_path / "whole", 1e-5)
        assert not (tmp_path / name / STANDING).exists()
    assert_equal(tmp_path / "two", tmp_path / "whole")


@pytest.mark.long
@ENGINES
def test_all_are_killed_while_they_save(tmp_path: Path, tokenizers: Path, stage: int | None) -> None:
    """AdamW, bit for bit: killed at once when a checkpoint is begun, and at random moments after that; the next launch goes on."""
    config, yaml = settle(tmp_path, tokenizers, "whole", stage)
    given = {"train__deepspeed": config.train.deepspeed}
    finish(torchrun(tmp_path, yaml, **given))
    _, yaml = settle(tmp_path, tokenizers, "cut", stage)
    root, draw, half_written = tmp_path / "cut" / checkpoint.FOLDER, random.Random(stage or 0), 0
    for delay_s in (0.0, draw.uniform(0.0, 0.05), draw.uniform(0.0, 0.2)):
        with torchrun(tmp_path, yaml, **given, train__resume="true") as cluster:
            half_written += kill_while_saving(cluster, root, delay_s)
    assert half_written > 0
    finish(torchrun(tmp_path, yaml, **given, train__resume="true"))
    assert_equal(tmp_path / "cut", tmp_path / "whole")
    assert not [item for item in root.iterdir() if item.name.startswith(".")]


def kill_while_saving(cluster: Cluster, root: Path, delay_s: float) -> bool:
    """SIGKILL to all processes a moment after a checkpoint is begun; tell whether a half-written one is left, and that none is taken."""
    before = checkpoint.latest(root.parent)
    cluster.computing(root.parent, rank=1, step=1)  # what a launch before this one left half-written is gone by now
    found = cluster.processes()
    cluster.until(lambda: list(root.glob(".building_0*")))
    time.sleep(delay_s)
    cluster.kill(found)
    after = checkpoint.latest(root.parent)
    assert after is None or before is None or after.name >= before.name
    return bool(list(root.glob(".building_0*")))


@pytest.mark.long
def test_a_node_falls_silent_and_the_other_goes_on_alone(tmp_path: Path, tokenizers: Path) -> None:
    """A machine without power says no goodbye: the other names it after `hang_s` and ends; alone, it loses the steps since the save."""
    _, yaml = settle(tmp_path, tokenizers, "whole", **SGD)
    finish(torchrun(tmp_path, yaml, nodes=1))
    _, yaml = settle(tmp_path, tokenizers, "cut", **SGD, train__hang_s=15.0)
    with torchrun(tmp_path, yaml) as cluster:
        cluster.computing(tmp_path / "cut", rank=1, step=5)
        for process in cluster.processes(cluster.launchers[1:]):
            process.send_signal(signal.SIGSTOP)
        assert cluster.launchers[0].wait(90) != 0
        assert "training hung for 15 s: rank 1 does not answer at step" in cluster.text(), cluster.text()[-6000:]
    found = checkpoint.latest(tmp_path / "cut")
    assert found is not None and found.name >= "step_00000004"
    shown = finish(torchrun(tmp_path, yaml, nodes=1, train__resume="true"))
    assert f"{found.name} was made by 2 processes without ZeRO; 1 process without ZeRO go on" in shown
    assert_same_run(tmp_path / "cut", tmp_path / "whole", 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("stage", [2, 3], ids=["ZeRO-2", "ZeRO-3"])
def test_deepspeed_over_ssh(tmp_path: Path, tokenizers: Path, stage: int) -> None:
    """The launcher with a host file: as one process; a rank killed in a step, all killed in a save; two and four go on."""
    config, yaml = settle(tmp_path, tokenizers, "whole", stage, **SGD)
    given: dict[str, Any] = {"train__deepspeed": config.train.deepspeed}
    _, cut = settle(tmp_path, tokenizers, "cut", stage, **SGD)
    with ssh_server(tmp_path) as server:
        finish(deepspeed(tmp_path, yaml, server, **given))
        with deepspeed(tmp_path, cut, server, **given) as cluster:
            cluster.computing(tmp_path / "cut", rank=1, step=5).kill()
            assert cluster.wait(90)[0] != 0
        assert str(checkpoint.latest(tmp_path / "cut")) >= str(tmp_path / "cut" / checkpoint.FOLDER / "step_00000004")
        with deepspeed(tmp_path, cut, server, **given, train__resume="true") as cluster:
            kill_while_saving(cluster, tmp_path / "cut" / checkpoint.FOLDER, 0.0)
        for each, name in ((1, "two"), (2, "four")):
            shutil.copytree(tmp_path / "cut", tmp_path / name)
            finish(deepspeed(tmp_path, cut, server, each=each, **given, train__out=tmp_path / name, train__resume="true"))
            assert_same_run(tmp_path / name, tmp_path / "whole", 1e-5)
    assert_equal(tmp_path / "two", tmp_path / "whole")
    train_from_config(settle(tmp_path, tokenizers, "one", **SGD)[0])
    assert_as_one(tmp_path / "whole", tmp_path / "one")
