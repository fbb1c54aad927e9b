"""Runs that go on with another number of processes, another engine or other batches, and checkpoints without the base of a named LLM.

As a program: trains a configuration and kills itself after a step, `python test_elastic.py <YAML> <step, 0 = never>`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_training
from safetensors.torch import load_file
from test_checkpoint import Killed, stop_after
from test_deepspeed import REAL, assert_close, launch_program, write_json
from test_end_to_end import small
from tiny_llms import write_llm
from toy_training import losses, toy_config, toy_train

from grex_mllm.config import Config, load_config, save_config
from grex_mllm.errors import GrexError
from grex_mllm.models.grex import GrexModel
from grex_mllm.training import checkpoint, run
from grex_mllm.training.batches import BatchStream
from grex_mllm.training.engine import leave
from grex_mllm.training.run import train_from_config

LINES = ["the red circle on the left", "two blue squares and a star"] * 4


@pytest.fixture(autouse=True)
def small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CORPUS_LINES", 300)


def real_config(out: Path, decoder: str, **changes: Any) -> Config:
    """A tiny ReLA or our decoder with a language model under LoRA, without anything that is drawn; train__steps and so on change it."""
    plain = {"model__text__dropout": 0.0, "train__optim__average_decay": 0.0, "train__precision": "fp32", "train__num_threads": 1}
    config = small(train__out=out, **{**REAL[decoder], **plain, **changes})
    config.train.pretraining = None
    return config


def go(config: Config, processes: int, deepspeed: str | None, kill_after: int = 0) -> str:
    """Train from where the run stands; with kill_after, the first process is killed after that step and the others with it."""
    config.train.deepspeed, config.train.resume = deepspeed, True
    folder = Path(config.train.out).parent
    if processes == 1 and deepspeed is None:
        if kill_after:
            with pytest.raises(Killed):
                train_from_config(config, on_step=stop_after(kill_after))
        else:
            train_from_config(config)
        return ""
    save_config(config, folder / "go.yaml")
    status, shown = launch_program(folder, [str(Path(__file__)), str(folder / "go.yaml"), str(kill_after)], processes=processes)
    assert (status == 0) == (kill_after == 0), shown[-6000:]
    return shown


def answers(folder: Path) -> torch.Tensor:
    """What a model folder says about one image and expression, as numbers."""
    model = GrexModel.from_pretrained(folder)
    pixels = torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    ids, mask = model.encode_text(["the red circle on the left"])
    with torch.no_grad():
        output = model.grounding.ground(model.grounding.encode_image(pixels, [(64, 64)]), torch.zeros(1, dtype=torch.int64), ids, mask)
    return output.mask_logits.sigmoid()


def assert_same_run(parts: Path, whole: Path, weights_within: float) -> None:
    assert_close(losses(parts), losses(whole))
    one, two = (GrexModel.from_pretrained(folder).saved_state() for folder in (parts, whole))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one if one[name].is_floating_point()) < weights_within
    torch.testing.assert_close(answers(parts), answers(whole), rtol=0, atol=1e-4)


def test_one_process_goes_on_as_two_under_zero3(tmp_path: Path) -> None:
    """AdamW: the moments of a run without DeepSpeed, by name, become the parts of two processes; bias vectors of odd lengths, too."""
    pytest.importorskip("deepspeed")
    settings = {"train__steps": 4, "train__save_every": 2, "train__keep": 9}
    train_from_config(real_config(tmp_path / "whole", "rela", **settings))
    config = real_config(tmp_path / "parts", "rela", **settings)
    go(config, 1, None, kill_after=3)
    shown = go(config, 2, write_json(tmp_path, "3.json", stage=3, stage3_param_persistence_threshold=0))
    assert "step_00000002 was made by 1 process without ZeRO; 2 processes under ZeRO-3 go on" in shown
    assert [line["step"] for line in losses(tmp_path / "parts")] == [1, 2, 3, 4]
    assert_same_run(tmp_path / "parts", tmp_path / "whole", 1e-3)
    ours, theirs = (load_file(tmp_path / name / "checkpoints/step_00000004/optimizer.safetensors") for name in ("parts", "whole"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert float((ours[name] - value).abs().max()) < 1e-4, name


# (processes, ZeRO stage) of each part of a run; nodes: stage 3 with the weights in each two processes; None: plain data parallelism.
# Every part but the last is killed.
CHAINS: dict[str, list[tuple[int, int | str | None]]] = {
    "1-2-3-2-1": [(1, None), (2, None), (3, None), (2, None), (1, None)],
    "1-4": [(1, None), (4, None)],
    "ZeRO 2-3-2": [(2, 2), (2, 3), (2, 2)],
    "DDP-ZeRO-3-plain": [(2, None), (2, 3), (1, None)],
    "ZeRO-2 2-3-2": [(2, 2), (3, 2), (2, 2)],
    "ZeRO-3 2-3-2": [(2, 3), (3, 3), (2, 3)],
    "nodes of two 4-2-4": [(4, "nodes"), (2, 3), (4, "nodes")],
}


@pytest.mark.long
@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("decoder", REAL)
def test_killed_runs_go_on_with_other_processes_and_stages(tmp_path: Path, decoder: str, chain: list[tuple[int, int | str | None]]) -> None:
    """Plain SGD over a real joint model: losses and predictions within 1e-4, weights within 1e-5 of the uninterrupted run."""
    pytest.importorskip("deepspeed")
    files: dict[int | str | None, str | None] = {2: write_json(tmp_path, "2.json"), 3: write_json(tmp_path, "3.json", stage=3), None: None}
    files["nodes"] = write_json(tmp_path, "nodes.json", stage=3, stage3_param_persistence_threshold=0, zero_hpz_partition_size=2)
    settings = {"train__optim__name": "sgd", "train__optim__lr": 0.01, "train__batch_images": 12, "train__save_every": 2}
    settings["train__steps"] = 2 * len(chain)
    train_from_config(real_config(tmp_path / "whole", decoder, **settings))
    config = real_config(tmp_path / "parts", decoder, **settings)
    for part, (processes, stage) in enumerate(chain, start=1):
        go(config, processes, files[stage], kill_after=0 if part == len(chain) else 2 * part + 1)
    assert_same_run(tmp_path / "parts", tmp_path / "whole", 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("stage", [None, 2, 3], ids=["DDP", "ZeRO-2", "ZeRO-3"])
def test_the_same_processes_go_on_bit_for_bit(tmp_path: Path, stage: int | None) -> None:
    """AdamW on CPU: a run that was killed gives the losses and the weights of the uninterrupted one."""
    pytest.importorskip("deepspeed")
    deepspeed = write_json(tmp_path, "zero.json", stage=stage) if stage else None
    settings = {"train__steps": 4, "train__save_every": 2}
    whole, parts = (real_config(tmp_path / name, "rela", **settings) for name in ("whole", "parts"))
    go(whole, 2, deepspeed)
    go(parts, 2, deepspeed, kill_after=3)
    go(parts, 2, deepspeed)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("parts", "whole"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_bytes_do_not_grow_with_the_base_of_a_named_model(tmp_path: Path) -> None:
    """A base of nine times the bytes, by wider feed-forward layers without adapters: not one byte more, beside or in a checkpoint."""
    from transformers import AutoModelForCausalLM

    sizes, bases = [], []
    for name, width in (("a", 64), ("b", 4096)):
        folder = write_llm("qwen2", tmp_path / f"llm_{name}", LINES)
        lm = AutoModelForCausalLM.from_pretrained(folder)
        lm.config.intermediate_size = width
        type(lm)(lm.config).save_pretrained(folder)
        bases.append((folder / "model.safetensors").stat().st_size)
        out, changes = tmp_path / name, {"model__generator__lm": str(folder), "model__generator__lora_targets": "[q_proj, v_proj]"}
        train_from_config(real_config(out, "instance_selection", train__steps=2, **changes))
        files = [file for file in (out / checkpoint.FOLDER).rglob("*") if file.is_file() and file.name != checkpoint.MARKER]
        sizes.append({file.relative_to(out).as_posix(): file.stat().st_size for file in files})
        saved = load_file(out / checkpoint.FOLDER / "step_00000002" / checkpoint.MODEL)
        assert any("lora_A" in key for key in saved) and not any("mlp" in key for key in saved if key.startswith("generator.lm"))
    assert sizes[0] == sizes[1] and bases[1] > 9 * bases[0]


def test_other_batches_go_on_at_the_next_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Four steps of 4 images, four of 3 x 2, two of 3 x 2 after another stop: each position once, in order."""
    read: list[int] = []
    make = toy_training.toy_batch
    monkeypatch.setattr(toy_training, "toy_batch", lambda positions: [read.extend(positions), make(positions)][1])
    with pytest.raises(Killed):
        toy_train(toy_config(tmp_path, steps=10), on_step=stop_after(4))
    assert read == list(range(16))
    other = {"steps": 10, "batch_images": 2, "accumulation": 3, "resume": True}
    with pytest.raises(Killed):
        toy_train(toy_config(tmp_path, **other), on_step=stop_after(8))
    shown = capsys.readouterr().out
    assert "train.batch_images from 4 to 2 and train.accumulation from 1 to 3: the data go on at image 16, the next one" in shown
    assert "the learning rates stay those of the 6 steps that are left, which read 36 images instead of 24" in shown
    toy_train(toy_config(tmp_path, **other))
    assert read == list(range(16 + 36)) and "train.batch_images from" not in capsys.readouterr().out
    assert checkpoint.position_of(tmp_path) == checkpoint.Position(10, 4 + 18, 52)
    assert checkpoint.position_of(tmp_path / "nothing") == checkpoint.Position()
    assert [line["lr/0"] for line in losses(tmp_path)] == [line["lr/0"] for line in losses_of_a_whole_run(tmp_path / "whole")]


def losses_of_a_whole_run(out: Path) -> list[dict[str, Any]]:
    toy_train(toy_config(out, steps=10))
    return losses(out)


def test_several_processes_share_batches_that_begin_anywhere() -> None:
    source = BatchStream(lambda positions: positions, 6).going_on(batches=5, images=17)  # type: ignore[arg-type, return-value]
    assert source.at(5) == list(range(17, 23))
    assert [source.share(rank, 3).at(6) for rank in range(3)] == [[23, 26], [24, 27], [25, 28]]
    with pytest.raises(GrexError, match="a multiple of the 4 processes"):
        source.share(0, 4)


def main(config: str, kill_after: int) -> None:
    """Train a configuration; the first process kills itself after a step."""

    def after(step: int, _: dict[str, float]) -> None:
        if step == kill_after and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    run.CORPUS_LINES = 300
    train_from_config(load_config(config), on_step=after)
    leave(0)


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    main(sys.argv[1], int(sys.argv[2]))
