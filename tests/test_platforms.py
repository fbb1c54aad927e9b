"""Linux, macOS and Windows: which packages each installs, and what differs between the systems in our code."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from packaging.requirements import Requirement

from grex_mllm import writing
from grex_mllm.training.log import peak_memory

SYSTEMS = {
    "linux": {"sys_platform": "linux", "os_name": "posix", "platform_system": "Linux", "platform_machine": "x86_64"},
    "macos": {"sys_platform": "darwin", "os_name": "posix", "platform_system": "Darwin", "platform_machine": "arm64"},
    "windows": {"sys_platform": "win32", "os_name": "nt", "platform_system": "Windows", "platform_machine": "AMD64"},
}
NOT_THERE = {"linux": set(), "macos": {"deepspeed", "bitsandbytes"}, "windows": {"deepspeed"}}  # no wheel that installs everywhere
ONLY_THERE = {"deepspeed", "bitsandbytes", "resource", "fcntl", "termios", "pwd", "grp", "msvcrt", "winreg"}


@pytest.mark.parametrize("system", SYSTEMS)
def test_dependencies_of_a_system(system: str) -> None:
    requirements = [Requirement(line) for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]]
    chosen = {r.name for r in requirements if r.marker is None or r.marker.evaluate({**SYSTEMS[system], "extra": ""})}
    assert {r.name for r in requirements} - chosen == NOT_THERE[system]
    assert {"torch", "transformers", "peft", "pycocotools", "sentencepiece", "accelerate"} <= chosen


def top_level_imports(tree: ast.Module) -> set[str]:
    """Names of packages that are imported when the module is: outside functions and TYPE_CHECKING blocks."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        waiting += list(ast.iter_child_nodes(node))
    return found


def test_nothing_that_one_system_lacks_is_imported_with_the_package() -> None:
    files = [*(ROOT / "grex_mllm").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")]
    found = {file.name: top_level_imports(ast.parse(file.read_text(encoding="utf-8"))) & ONLY_THERE for file in files}
    assert len(found) > 60 and {name: names for name, names in found.items() if names} == {}
    assert top_level_imports(ast.parse("try:\n    import fcntl\nexcept ImportError:\n    x = 1\ndef f():\n    import resource")) == {
        "fcntl"
    }


def test_checkpoints_are_flushed_on_windows_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, opening a folder fails, and so does flushing a file that was opened to read."""
    file = tmp_path / "x"
    file.write_text("x")
    writable: dict[int, bool] = {}
    real_open = os.open

    def windows_open(path: Path, flags: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "a folder", str(path))
        handle = real_open(path, flags)
        writable[handle] = bool(flags & os.O_RDWR)
        return handle

    def windows_fsync(handle: int) -> None:
        if not writable[handle]:
            raise OSError(errno.EBADF, "opened to read")

    monkeypatch.setattr(writing.os, "open", windows_open)
    monkeypatch.setattr(writing.os, "fsync", windows_fsync)
    writing.flush_entry(file, windows=True)
    writing.flush_entry(tmp_path, windows=True)
    assert list(writable.values()) == [True]
    with pytest.raises(OSError):
        writing.flush_entry(file, windows=False)


def test_peak_memory_without_the_module_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    shown = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=12345))
    monkeypatch.setattr(psutil, "Process", lambda: shown)
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(sys, "platform", "win32")
    assert peak_memory(torch.device("cpu")) == 12345


SPAWNED = """
import multiprocessing, sys
from tiny import tiny_config
from grex_mllm.training.run import train_from_config

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    train_from_config(tiny_config(data__train=sys.argv[1], train__out=sys.argv[2], train__steps=2, train__batch_images=2,
                                  data__num_workers=1))
"""


def test_workers_are_started_as_on_macos_and_windows(tmp_path: Path) -> None:
    """Spawned workers get the samples by pickle; forked ones, as on Linux, need none."""
    from tiny_folder import tiny_folder

    (tmp_path / "main.py").write_text(SPAWNED, encoding="utf-8")
    tiny_folder(tmp_path / "d")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "main.py"), str(tmp_path / "d"), str(tmp_path / "run")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert (tmp_path / "run" / "model.safetensors").is_file()
