"""Nodes of a cluster on this machine: launchers that are started apart, or by one of them over an ssh server of the test's own.

The commands are the lines of configs/cluster/README.md with other values.
"""

from __future__ import annotations

import getpass
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
from conftest import ROOT
from shrink import commands
from test_commands import free_port

from grex_mllm.training.watch import FOLDER as STANDING

LIMIT_S = 400.0
SSHD = "/usr/sbin/sshd"
COMPUTES = ("forward pass", "meeting the other processes", "backward pass and optimizer")


def documented(launcher: str, **values: Any) -> list[str]:
    """Return the words of a launcher's line; values: by flag without dashes, `.` as `__`; None takes a flag out, a new one comes last."""
    line = next(line for line in commands(ROOT / "configs" / "cluster" / "README.md") if line.split()[0] == launcher)
    words = [part for word in shlex.split(line) for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for name, value in values.items():
        flag = f"--{name.replace('__', '.')}"
        place = words.index(flag) if flag in words else len(words)
        words[place : place + 2] = [] if value is None else [flag, str(value)]
    return words


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a node: our package, one thread, no GPU, nothing of another launcher."""
    kept = {
        name: text for name, text in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": path, **changes}


class Cluster:
    """Launchers that run together; leaving the block kills whatever is left of them. over: the ssh server that they use, if any."""

    def __init__(self, folder: Path, lines: list[list[str]], env: dict[str, str], over: psutil.Process | None = None) -> None:
        self.over, self.shown, self.launchers = over, [], []
        for words in lines:
            self.shown.append(folder / f"shown_{time.monotonic_ns()}.txt")
            with self.shown[-1].open("w") as file:
                self.launchers.append(psutil.Popen(words, cwd=folder, env=env, stdout=file, stderr=file))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def processes(self, launchers: list[psutil.Popen] | None = None) -> list[psutil.Process]:
        """Return the processes of all launchers, or of these: those that train first, the launchers behind them."""
        found: list[psutil.Process] = []
        for parent in [*(self.launchers if launchers is None else launchers), *([self.over] if self.over is not None else [])]:
            with suppress(psutil.NoSuchProcess):
                found += [*reversed(parent.children(recursive=True)), *([] if parent is self.over else [parent])]
        return found

    def kill(self, found: list[psutil.Process] | None = None) -> None:
        """SIGKILL to all, as fast as can be, and wait until they are gone."""
        found = self.processes() if found is None else found
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=30)

    def until(self, condition: Callable[[], Any], limit_s: float = LIMIT_S) -> Any:
        """Wait until a condition gives something, and return it; fail where all launchers have ended before."""
        limit = time.monotonic() + limit_s
        while not (value := condition()):
            if time.monotonic() > limit or all(launcher.poll() is not None for launcher in self.launchers):
                pytest.fail(f"it did not come to that:\n{self.text()[-6000:]}")
            time.sleep(0.001)
        return value

    def wait(self, limit_s: float = LIMIT_S) -> list[int]:
        """Return the exit status of each launcher."""
        limit = time.monotonic() + limit_s
        try:
            return [int(launcher.wait(max(0.1, limit - time.monotonic()))) for launcher in self.launchers]
        except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
            pytest.fail(f"not finished after {limit_s} s:\n{self.text()[-6000:]}")

    def text(self) -> str:
        return "\n".join(file.read_text() for file in self.shown)

    def computing(self, out: Path, rank: int, step: int) -> psutil.Process:
        """Wait until a process of training is in the middle of a step (or of a later one), and return it."""

        def find() -> int:
            with suppress(OSError, ValueError):
                line = json.loads((out / STANDING / f"rank_{rank}.json").read_text())
                if line["step"] >= step and line["doing"] in COMPUTES and psutil.pid_exists(line["process"]):
                    return int(line["process"])
            return 0

        return psutil.Process(self.until(find))


def torchrun(folder: Path, yaml: Path, *, nodes: int = 2, each: int = 1, **values: Any) -> Cluster:
    """Start one torchrun for each node, as the document says, with `each` processes."""
    port, settings = free_port(), {"config": yaml, "train__deepspeed": None, "train__out": None, **values}
    fixed = {"nnodes": nodes, "master_addr": "127.0.0.1", "master_port": port, "nproc_per_node": each}
    return Cluster(folder, [documented("torchrun", node_rank=k, **fixed, **settings) for k in range(nodes)], environment())


def accelerate(folder: Path, yaml: Path, *, nodes: int = 2, **values: Any) -> Cluster:
    """Start Accelerate's launcher for each node, one process each, as the document says."""
    settings = {"config": yaml, "train__deepspeed": None, "train__out": None, **values}
    fixed = {"num_machines": nodes, "main_process_ip": "127.0.0.1", "main_process_port": free_port(), "num_processes": nodes}
    lines = [documented("accelerate", machine_rank=k, **fixed, **settings) for k in range(nodes)]
    for words in lines:  # it leaves the device to the program; without these it asks for a file of answers
        words[2:2] = ["--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return Cluster(folder, lines, environment())


@contextmanager
def ssh_server(folder: Path) -> Iterator[psutil.Process]:
    """Run an ssh server on a free port of the loopback; `folder/bin/ssh` knows it as node0 and node1. Skip, with the reason, without it."""
    for tool, package in ((SSHD, "openssh-server"), ("ssh", "openssh-client"), ("ssh-keygen", "openssh-client"), ("pdsh", "pdsh")):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool} (on Debian and Ubuntu: apt-get install {package})")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    port, server, client = free_port(), folder / "sshd_config", folder / "ssh_config"
    server.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nPidFile none\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
    )
    client.write_text(
        f"Host node0 node1\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n  IdentityFile {folder}/user\n"
        "  IdentitiesOnly yes\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where the system's service runs, it has made it
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {client} "$@"\n')
    (folder / "bin" / "ssh").chmod(0o755)
    with (folder / "sshd.txt").open("w") as log:
        process = psutil.Popen([SSHD, "-D", "-e", "-f", str(server)], stdout=log, stderr=log)
    try:
        limit, reached = time.monotonic() + 20, 1
        while process.poll() is None and reached and time.monotonic() < limit:
            reached = subprocess.run([folder / "bin" / "ssh", "node0", "true"], capture_output=True, check=False).returncode
        if reached:
            pytest.skip(f"no ssh server here: {(folder / 'sshd.txt').read_text().strip()}")
        yield process
    finally:
        process.kill()
        process.wait()


def deepspeed(folder: Path, yaml: Path, server: psutil.Process, *, each: int = 1, **values: Any) -> Cluster:
    """Start DeepSpeed's launcher on this machine, which starts node0 and node1 over ssh, as the document says."""
    (folder / "hosts").write_text(f"node0 slots={each}\nnode1 slots={each}\n")
    (folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    words = documented("deepspeed", **{"config": yaml, "train__out": None, **values})
    words[1:1] = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    env = environment()
    return Cluster(folder, [words], env | {"PATH": f"{folder / 'bin'}{os.pathsep}{env['PATH']}"}, over=server)
