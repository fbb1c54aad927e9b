"""Faults of a running training: signals save and end it, a process that hangs is named, bad values end all, no room is found first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from test_deepspeed import ROOT, launch, launch_program
from test_end_to_end import small
from toy_training import losses, toy_config, toy_train

from grex_mllm.config import save_config
from grex_mllm.errors import GrexError
from grex_mllm.training import checkpoint, room
from grex_mllm.training.run import train_from_config
from grex_mllm.training.watch import FOLDER, STATUS, Watch, describe, find_behind

GREX = ["-m", "grex_mllm"]


def send(number: int, when: int, *, to_workers: bool = False) -> Any:
    def on_step(step: int, _: dict[str, float]) -> None:
        if step == when:
            workers = [child.pid for child in psutil.Process().children()] if to_workers else []
            for process in [*workers, os.getpid()]:
                os.kill(process, number)

    return on_step


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_and_the_resumed_run_is_the_uninterrupted_one(tmp_path: Path, name: str) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    settings = {"optim.average_decay": 0.9, "accumulation": 2}
    _, whole = toy_train(toy_config(tmp_path / "whole", **settings), dropout=0.3, save=True)
    result, _ = toy_train(toy_config(tmp_path / "cut", **settings), dropout=0.3, save=True, on_step=send(number, 5))
    assert (result.interrupted, result.steps) == (name, 6) and result.checkpoint == tmp_path / "cut" / "checkpoints" / "step_00000006"
    assert signal.getsignal(number) == before and not (tmp_path / "cut" / "toy.pt").exists()
    result, cut = toy_train(toy_config(tmp_path / "cut", resume=True, **settings), dropout=0.3, save=True)
    assert (result.interrupted, result.resumed_from, result.steps) == ("", 6, 12)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), cut.state_dict().values(), strict=True))
    published = [torch.load(tmp_path / run / "toy.pt", weights_only=True)["shared.weight"] for run in ("whole", "cut")]
    assert torch.equal(*published) and not (tmp_path / "cut" / FOLDER).exists()


def test_the_last_step_ends_a_run_as_ever(tmp_path: Path) -> None:
    result, _ = toy_train(toy_config(tmp_path), save=True, on_step=send(signal.SIGTERM, 11))
    assert (result.interrupted, result.steps) == ("", 12) and (tmp_path / "toy.pt").exists()


def test_loader_workers_leave_the_signal_to_the_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy_config(tmp_path, num_workers=1, steps=40)
    result, _ = toy_train(config, on_step=send(signal.SIGUSR1, 5, to_workers=True))
    assert (result.interrupted, result.steps) == ("SIGUSR1", 6)
    shown = capsys.readouterr().out
    assert "stopped by SIGUSR1 after step 6 of 40" in shown and "--train.resume=true" in shown and "step_00000006" in shown


def test_one_of_two_processes_gets_a_signal_and_both_save(tmp_path: Path) -> None:
    out = str(tmp_path / "cut")
    cut = {"out": out, "dropout": 0.3, "befall": ["SIGUSR1", 1, 5]}
    status, shown = launch(tmp_path, cut, {"out": out, "dropout": 0.3, "resume": True}, {"out": str(tmp_path / "whole"), "dropout": 0.3})
    assert status == 0 and "stopped by SIGUSR1 after step 6 of 12" in shown, shown[-6000:]
    assert "SIGUSR1 6 resumed 0" in shown and "finished 12 resumed 6" in shown and "finished 12 resumed 0" in shown
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.long
@pytest.mark.parametrize(("what", "told"), [("sleep", "has not gone on"), ("SIGSTOP", "does not answer")])
def test_a_process_that_hangs_is_named(tmp_path: Path, what: str, told: str) -> None:
    start = time.monotonic()
    status, shown = launch(tmp_path, {"out": str(tmp_path / "run"), "hang_s": 3, "befall": [what, 1, 6]})
    assert status != 0 and "training hung for 3 s: rank 1 " in shown and told in shown, shown[-6000:]
    assert "at step 6 (" in shown and "1 of 2 wait, rank 0 at step 7 (" in shown
    assert time.monotonic() - start < 120
    assert checkpoint.latest(tmp_path / "run") == tmp_path / "run" / "checkpoints" / "step_00000004"


@pytest.mark.long
def test_the_real_model_ends_with_status_0_and_goes_on(tmp_path: Path) -> None:
    """Two processes of `grex train`; the second gets SIGTERM from outside. The resumed run has the losses of an uninterrupted one."""
    for name in ("cut", "whole"):
        save_config(small(train__steps=30, train__out=tmp_path / name, train__save_every=100), tmp_path / f"{name}.yaml")
    sender = subprocess.Popen([sys.executable, __file__, str(tmp_path / "cut"), str(tmp_path / "cut.yaml")])
    status, shown = launch_program(tmp_path, [*GREX, "train", "--config", str(tmp_path / "cut.yaml")])
    assert sender.wait(60) == 0
    assert status == 0 and "stopped by SIGTERM after step" in shown, shown[-6000:]
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    status, shown = launch_program(tmp_path, [*GREX, "train", "--config", str(tmp_path / "cut.yaml"), "--train.resume=true"])
    assert status == 0 and "going on after step" in shown, shown[-6000:]
    status, shown = launch_program(tmp_path, [*GREX, "train", "--config", str(tmp_path / "whole.yaml")])
    assert status == 0 and losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_lone_process_that_hangs_says_so(tmp_path: Path) -> None:
    """In a process of its own, which the watch ends."""
    code = f"import time; from grex_mllm.training.watch import Watch\nwith Watch({str(tmp_path)!r}, 0, 1, 0.5) as watch:\n"
    code += "    watch.mark(7, 'reading a batch')\n    time.sleep(60)\n"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert run.returncode == STATUS and "rank 0 has not gone on at step 7 (reading a batch; process " in run.stderr


def test_who_goes_on_is_left_alone_and_nothing_stays(tmp_path: Path) -> None:
    for rank in range(3):  # of a killed run with more processes
        (tmp_path / FOLDER).mkdir(exist_ok=True)
        (tmp_path / FOLDER / f"rank_{rank}.json").write_text("{}")
    with Watch(tmp_path, 0, 1, 0.4) as watch:
        assert [file.name for file in (tmp_path / FOLDER).iterdir()] == ["rank_0.json"]
        for step in range(12):
            watch.mark(step, "forward pass")
            time.sleep(0.1)
        assert (tmp_path / FOLDER / "rank_0.json").is_file()
    assert not list(tmp_path.iterdir())
    with Watch(tmp_path, 0, 1, 0.0) as watch:
        watch.mark(1, "forward pass")
        assert not list(tmp_path.iterdir())


def test_who_is_behind() -> None:
    def line(mark: int, beat: int = 5, step: int = 3) -> dict[str, Any]:
        return {"mark": mark, "beat": beat, "step": step, "doing": "forward pass", "process": 1, "host": "node0"}

    assert find_behind({0: line(9), 1: line(7), 2: line(9)}, {0: 1, 1: 1, 2: 1}, 3) == {1: "has not gone on"}
    assert find_behind({0: line(9), 1: line(9)}, {0: 1, 1: 5}, 2) == {1: "does not answer"}
    assert find_behind({0: line(9), 2: line(9)}, {0: 1, 2: 1}, 3) == {1: "has ended"}
    assert find_behind({0: line(9), 1: line(9)}, {0: 1, 1: 1}, 2) == {}
    named = describe({0: line(9), 1: line(7, step=2)}, {1: "has not gone on"}, 60, 2)
    assert "rank 1 has not gone on at step 2 (forward pass; process 1 on node0); 1 of 2 wait, rank 0 at step 3 (forward pass)" in named
    assert "all 2 ranks wait for each other at step 3" in describe({0: line(9), 1: line(9)}, {}, 60, 2)
    assert "rank 1 has ended at an unknown step" in describe({0: line(9)}, {1: "has ended"}, 60, 2)


def test_a_folder_that_cannot_be_written_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shut = [tmp_path / "file" / "run"]
    if Path("/proc/self").is_dir():
        shut.append(Path("/proc/run"))
    for out in shut:
        with pytest.raises(GrexError, match=r"train\.out .* cannot be written"):
            toy_train(toy_config(out))
    with pytest.raises(GrexError, match=r"train\.hang_s is -1"):
        toy_train(toy_config(tmp_path / "run", hang_s=-1.0))
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 20_000})
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(GrexError, match=r"GiB free; expected about .* GiB for 9 checkpoints of"):
        toy_train(toy_config(tmp_path / "run", keep=8))
    assert not (tmp_path / "run").exists()
    toy_train(toy_config(tmp_path / "run", keep=2))


def test_the_estimate_is_near_a_checkpoint(tmp_path: Path) -> None:
    config = small(train__out=tmp_path / "run", train__steps=1)
    sizes: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grex_mllm.training.run.CORPUS_LINES", 300)
        patch.setattr("grex_mllm.training.loop.check_room", lambda model, train: sizes.extend(room.checkpoint_bytes(model, train)))
        result = train_from_config(config)
    assert result.checkpoint is not None
    written = sum(file.stat().st_size for file in result.checkpoint.iterdir())
    assert 0.8 * written < sizes[0] < 1.25 * written


def send_later(out: Path, config: Path) -> None:
    """Send SIGTERM to the second process of a training as soon as the log has five lines."""
    limit = time.monotonic() + 200
    log = out / "log.jsonl"
    while not log.is_file() or len(log.read_text().splitlines()) < 5:
        assert time.monotonic() < limit
        time.sleep(0.02)
    for process in psutil.process_iter(["cmdline", "environ"]):
        words, environment = process.info["cmdline"] or [], process.info["environ"] or {}
        if str(config) in words and environment.get("RANK") == "1":
            process.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    send_later(Path(sys.argv[1]), Path(sys.argv[2]))
