"""The built package away from the repository: what it carries, and that everything runs from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from grex_mllm import shipped
from grex_mllm.config import load_config
from grex_mllm.errors import GrexError
from grex_mllm.score.protocol import load_protocol
from grex_mllm.training.engine import check_deepspeed

FOLDERS = ("configs", "deepspeed_configs", "eval")
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def call(*command: str | Path, cwd: Path, **environment: str) -> str:
    run = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"{command}\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
    return run.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a source distribution, which is built from the files that are or would be tracked."""
    place = tmp_path_factory.mktemp("wheel")
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout, to know what belongs to the source")
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (place / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (place / "tree" / name).write_bytes((ROOT / name).read_bytes())
    call(sys.executable, "-c", BUILD, "build_sdist", place, cwd=place / "tree")
    (source,) = place.glob("*.tar.gz")
    call("tar", "-xzf", source, cwd=place)
    call(sys.executable, "-c", BUILD, "build_wheel", place, cwd=place / source.name.removesuffix(".tar.gz"))
    return next(place.glob("*.whl"))


def test_the_wheel_carries_every_file_that_is_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"grex_mllm/files/{file.relative_to(ROOT).as_posix()}" for f in FOLDERS for file in (ROOT / f).rglob("*") if file.is_file()}
    wanted |= {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "grex_mllm").rglob("*")
        if file.is_file() and file.suffix in (".py", ".css", ".js", ".html", ".json", ".jpg")
    }
    assert len(wanted) > 120 and sorted(wanted - names) == []
    assert [name for name in names if not name.startswith(("grex_mllm/", "grex_mllm-"))] == []


def test_everything_runs_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    call(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "installed", wheel, cwd=tmp_path)
    (tmp_path / "empty").mkdir()
    check = tmp_path / "wheel_check.py"  # away from the repository
    check.write_bytes((ROOT / "tests" / "wheel_check.py").read_bytes())
    shown = call(sys.executable, check, cwd=tmp_path / "empty", PYTHONPATH=str(tmp_path / "installed"), OMP_NUM_THREADS="1")
    assert f"package: {tmp_path / 'installed'}" in shown and "a shrunken demo ran" in shown and "protocols scored" in shown


def test_shipped_files_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/small.yaml") == load_config(shipped.CONFIG_FOLDER / "small.yaml")
    assert load_protocol("eval/protocols/greg.yaml").name == "greg"
    assert check_deepspeed("./deepspeed_configs/zero2.json")["zero_optimization"]["stage"] == 2
    shown = capsys.readouterr().err.splitlines()
    assert [line.split(" is not in this folder; taking the one that comes with grex_mllm: ") for line in shown] == [
        [str(Path(name)), str(shipped.ROOT / name)]
        for name in ("configs/small.yaml", "eval/protocols/greg.yaml", "deepspeed_configs/zero2.json")
    ]


def test_a_file_of_the_user_comes_first_and_a_wrong_name_stays_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small.yaml").write_text("train: {steps: 7}\n", encoding="utf-8")
    assert load_config("configs/small.yaml").train.steps == 7
    for name in ("configs/smal.yaml", "small.yaml", "configs/../configs/demo.yaml", str(tmp_path / "configs" / "demo.yaml")):
        with pytest.raises(GrexError, match="does not exist"):
            load_config(name)
    assert capsys.readouterr().err == ""


def test_one_process_of_a_launch_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    assert shipped.find_file("configs/demo.yaml") == shipped.CONFIG_FOLDER / "demo.yaml"
    assert capsys.readouterr().err == ""
