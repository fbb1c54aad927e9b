"""The SLURM script: its syntax, and a real run of it with stand-ins for srun and scontrol that start two processes here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from test_commands import free_port
from test_end_to_end import small

from grex_mllm.config import save_config

SCRIPT = ROOT / "configs" / "cluster" / "train.sbatch"
SRUN = """#!/bin/bash
# two tasks of one node, as srun would start them; they share the options in front of the command
while [ "${1#--}" != "$1" ]; do shift; done
pids=()
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & pids+=($!); done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$REQUEUED"; fi
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_script_is_bash_and_asks_for_the_signal() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    text = SCRIPT.read_text(encoding="utf-8")
    assert "#SBATCH --signal=USR1@120" in text and "#SBATCH --requeue" in text and "--train.resume=true" in text
    run = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "usage: sbatch" in run.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_script_trains_with_two_tasks_and_goes_on(tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", f'#!/bin/bash\nexec "{sys.executable}" "$@"\n')):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    config = small()
    config.train.batch_images, config.train.steps, config.train.save_every = 2, 1, 1
    config.train.pretraining = config.model.generator = None
    save_config(config, tmp_path / "small.yaml")
    environment = {
        **os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
        "SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": str(free_port() - 20000), "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "1",
        "REQUEUED": str(tmp_path / "requeued"),
    }  # fmt: skip
    for steps in ("1", "2"):
        command = ["bash", str(SCRIPT), str(tmp_path / "small.yaml"), str(tmp_path / "run"), f"--train.steps={steps}"]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
        found = tmp_path / "run" / "checkpoints"
        assert '"num_processes": 2' in next(found.glob(f"*{steps}/checkpoint.json")).read_text(encoding="utf-8")
        assert (tmp_path / "run" / "model.safetensors").is_file() and not (tmp_path / "requeued").exists()
    (tmp_path / "run" / "model.safetensors").unlink()
    (tmp_path / "bin" / "srun").write_text("#!/bin/bash\nexit 0\n")  # all tasks stopped by the signal: saved, not finished
    subprocess.run(command, env=environment, check=True)
    assert (tmp_path / "requeued").read_text().startswith("requeue ")
