"""Every command that a document gives is run, at tiny size, by the one rule of tests/shrink.py."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from urllib.request import urlopen

import pytest
from conftest import ROOT, no_java
from fake_server import FakeServer
from shrink import (
    DEMO_SIZES,
    answer_nothing,
    check_original,
    clear_outputs,
    commands,
    interpreter,
    launched,
    make_stage,
    python_words,
    shrunken,
)

from grex_mllm.cli import main
from grex_mllm.training.engine import check_deepspeed

DOCUMENTS = [
    *sorted((ROOT / "configs").glob("*.yaml")),
    *(
        ROOT / folder / "README.md"
        for folder in (".", "configs", "configs/cluster", "deepspeed_configs", "data_prep", "benchmarks", "eval", "eval/protocols")
    ),
    *sorted((ROOT / "docs").glob("*.md")),
]
WITH_JAVA = "GENERATED"  # of the commands that score, the one that has METEOR computed
LAUNCHERS = ("torchrun", "deepspeed", "accelerate")
FOUND = {file.relative_to(ROOT).as_posix(): commands(file) for file in DOCUMENTS}
ALL = [(name, command) for command, name in {c: name for name in reversed(FOUND) for c in FOUND[name]}.items()]  # each once
TOO_LONG = ("benchmarks/rela_forward.py", "benchmarks/estimate.py", "benchmarks/train_step.py", "benchmarks/joint_ablation.py")
TOO_LONG += (
    "benchmarks/photo_comparison.py",
    "benchmarks/photo_causes.py",
    "benchmarks/race.py",
    "benchmarks/shared_image.py",
    "benchmarks/serve_load.py",
    "data_prep/photos.py",
    "configs/demo_long.yaml",
    "configs/demo_words.yaml",
)

SERVED_TWICE = "grex serve --model runs/demo"  # docs/serve.md serves it with a folder of images, in make test
TRIED_ROWS = ("ablation_vlt_tile", "ablation_m3att_mask_responses", "ablation_isfp_iem")


def is_long(command: str) -> bool:
    """Tell whether a command belongs to `make test-long`: full width, and all but one of the configurations with a language model and of
    each system's ablations."""
    family = re.search(r"_(?:qwen|llama|vicuna)[\w.]*?(?=\.yaml)", command)
    row = re.search(r"configs/(ablation_(?:vlt|m3att|isfp)_\w+)\.yaml", command)
    return (
        any(name in command for name in TOO_LONG)
        or command == SERVED_TWICE
        or (family is not None and not family[0].endswith("qwen2.5_7b"))
        or (row is not None and row[1] not in TRIED_ROWS)
    )


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with no_java():
        return make_stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture
def stage(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a copy of everything that documents name, and few scenes for the demo."""
    shutil.copytree(template, tmp_path / "stage")
    monkeypatch.chdir(tmp_path / "stage")
    for name, value in DEMO_SIZES.items():
        module, _, constant = name.rpartition(".")
        monkeypatch.setattr(importlib.import_module(f"grex_mllm.{module}"), constant, value)
    return tmp_path / "stage"


def run_in_process(words: list[str], stage: Path) -> None:
    clear_outputs(words, stage)
    assert main(words) == 0


def run_apart(words: list[str], limit_s: float = 1500) -> str:
    """Run a program; fail with what it wrote."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    run = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=limit_s, check=False)
    assert run.returncode == 0, f"{words}\n{run.stdout[-2500:]}\n{run.stderr[-2500:]}"
    return run.stdout + run.stderr


def module_is_runnable(name: str) -> bool:
    """Tell whether `python -m name` runs something: a package with __main__, or a module that is a program."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return False
    if spec.submodule_search_locations is not None:
        return importlib.util.find_spec(f"{name}.__main__") is not None
    return 'if __name__ == "__main__"' in Path(spec.origin).read_text(encoding="utf-8")


def without_deepspeed(words: list[str]) -> list[str]:
    """Take `--train.deepspeed FILE` out, which needs processes of its own (see below); the file must be usable."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--train.deepspeed=") else [word])]
    if "--train.deepspeed" not in words:
        return words
    place = words.index("--train.deepspeed")
    if importlib.util.find_spec("deepspeed") is not None:
        check_deepspeed(words[place + 1])
    return words[:place] + words[place + 2 :]


def serve_once(words: list[str]) -> None:
    """Serve at a free port, fetch the page and what is served, and interrupt the program, as Ctrl+C does."""
    pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'grex-mllm[serve]'")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "grex_mllm", *words, *(() if "--port" in words else ("--port", "0"))]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout is not None
            line = program.stdout.readline()
            found = re.search(r"http://\S+/", line)
            assert found is not None, f"{line}{program.communicate(timeout=60)[1]}"
            with urlopen(found[0], timeout=60) as page, urlopen(f"{found[0]}status", timeout=60) as status:
                assert b"/page/page.js" in page.read() and b'"model"' in status.read()
            program.send_signal(signal.SIGINT)
            _, errors = program.communicate(timeout=60)
        finally:
            program.kill()
    assert program.returncode == 0, errors


def try_command(command: str, stage: Path) -> None:
    """Run one command. A launcher's flags are read by its parser; what it launches runs in this process."""
    with nullcontext() if WITH_JAVA in command else no_java():
        run_command(command, stage)


def run_command(command: str, stage: Path) -> None:
    words = shrunken(command)
    if words[0] in LAUNCHERS:
        module, own, num_processes = launched(words)
        assert module in ("grex_mllm", "grex_mllm.cli") and module_is_runnable(module), f"python -m {module} runs nothing"
        check_original(own[1:], num_processes)
        run_in_process(without_deepspeed(own), stage)
    elif words[0] == "make":
        run_apart(["make", "-n", "-C", str(ROOT), *words[1:]])
    elif words[0] == "pip":
        assert words[1] in ("install", "wheel") and words[-1] == ".", command
    elif (own := python_words(words)) is not None and "--base-url" in own:
        with FakeServer(answer_nothing) as server:
            run_in_process([server.url if before == "--base-url" else word for before, word in zip(["", *own], own)], stage)
        assert bool(server.seen) != ("--dry-run" in own)
    elif own and own[0] == "serve":
        serve_once(own)
    elif own is not None:
        run_in_process(own, stage)
    else:
        clear_outputs(words, stage)
        run_apart(interpreter(words))


@pytest.mark.parametrize(
    ("document", "command"),
    [pytest.param(*pair, marks=pytest.mark.long) if is_long(pair[1]) else pair for pair in ALL],
    ids=[f"{name}: {command[:60]}" for name, command in ALL],
)
def test_documented_command_runs(document: str, command: str, stage: Path) -> None:
    try_command(command, stage)


def test_the_documents_have_commands() -> None:
    assert all(FOUND[name] for name in FOUND if name != "eval/README.md" and not name.startswith("docs/")), FOUND
    assert len(ALL) > 50
    assert {shrunken(command)[0] for _, command in ALL} >= {"grex", "python", "torchrun", "deepspeed", "accelerate", "make"}


@pytest.mark.parametrize(
    "command",
    [
        "accelerate launch --num_processes 8 -m grex_mllm train --config configs/gres_rela_r5.yaml --train.out runs/x",
        "accelerate launch --num_processes 8 -m grex_mllm trian --config configs/gres_rela_r50.yaml --train.out runs/x",
        "accelerate launch --num_processes 8 -m grex_mllm train --config configs/gres_rela_r50.yaml --train.outt runs/x",
        "accelerate launch --num_proceses 8 -m grex_mllm train --config configs/gres_rela_r50.yaml --train.out runs/x",
        "accelerate launch --num_processes 7 -m grex_mllm train --config configs/gres_rela_r50.yaml --train.out runs/x",
        "accelerate launch --num_processes 8 -m grex_mllm.demo train --config configs/gres_rela_r50.yaml --train.out runs/x",
        "torchrun --nproc_per_node=2 -m grex_mllm train --config configs/demo.yaml --train.deepspeed deepspeed_configs/zero3.json",
        "grex train --config configs/small.yaml --data.train data/grefcocos --train.out runs/x",
        "grex convert swin swin_base_patch4_window12_384_22k.pth",
        "grex demo --out runs/x --loss.lm_starts=0",
        "python data_prep/grefcoco.py --refs 'grefs(unc).json' --instance instances.jsn --images train2014 --out data/grefcoco",
        "python data_prep/grefcocos.py --out data/grefcoco",
        "make demos",
    ],
)
def test_a_wrong_command_is_noticed(command: str, stage: Path) -> None:
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        try_command(command, stage)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def on_two_cpus(words: list[str]) -> list[str]:
    """Return a launcher's command with two processes of this machine, without a GPU; DeepSpeed under accelerate goes through torchrun."""
    module, own, _ = launched(words)
    if words[0] == "accelerate" and any(word.startswith("--train.deepspeed") for word in own):
        words = ["torchrun", "-m", module, *own]
    if words[0] == "torchrun":
        return ["torchrun", "--nproc_per_node=2", f"--master_port={free_port()}", "-m", module, *own]
    if words[0] == "deepspeed":
        return ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "--no_local_rank", "--module", module, *own]
    # --cpu would start one process; --multi_gpu starts processes and leaves the device to the program
    rest = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())]
    return ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", *rest, "-m", module, *own]


LAUNCHED = [command for name, command in ALL if command.split()[0] in LAUNCHERS and not name.endswith(".yaml")]
LAUNCHED += [FOUND["configs/gres_rela_r50.yaml"][0]]


@pytest.mark.parametrize("command", [pytest.param(command, marks=pytest.mark.long if n else []) for n, command in enumerate(LAUNCHED)])
def test_launchers_start_two_processes(command: str, stage: Path) -> None:
    words = shrunken(command)
    if "deepspeed" in command:
        pytest.importorskip("deepspeed")
    _, own, _ = launched(words)
    clear_outputs(own, stage)
    out = next((own[n + 1] for n, word in enumerate(own[:-1]) if word == "--train.out"), "runs/train")
    run_apart(on_two_cpus(words))
    assert (stage / out / "model.safetensors").is_file()
    assert '"num_processes": 2' in next((stage / out).glob("checkpoints/*/checkpoint.json")).read_text(encoding="utf-8")
