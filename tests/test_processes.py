"""Prediction shared by processes that this program starts: the same answers as from one, failures, and a signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from tiny import tiny_speaker

from grex_mllm import processes
from grex_mllm.data.synthetic.export import export
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.errors import GrexError
from grex_mllm.job import predict_once

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
WAIT_S = 120.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    model = tiny_speaker(folder)
    model.config.predict.precision = "fp32"
    model.save_pretrained(folder / "m")
    export(SyntheticConfig(image_size=64), "test", 5, folder / "d", 4)
    return folder


def lines_of(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_two_processes_answer_as_one(place: Path) -> None:
    predict_once(place / "m", place / "d", "test", place / "one.jsonl", 2)
    predict_once(place / "m", place / "d", "test", place / "two.jsonl", 2, processes=2)
    one, two = lines_of(place / "one.jsonl"), lines_of(place / "two.jsonl")
    assert len(one) > 20 and {"listener", "round_trip"} <= {key for line in one for key in line}
    assert [line.get("expression_id", line.get("targets")) for line in one] == [
        line.get("expression_id", line.get("targets")) for line in two
    ]
    assert [line.get("expression") for line in one] == [line.get("expression") for line in two]
    assert [line.get("mask_rle") for line in one] == [line.get("mask_rle") for line in two]
    assert not list(place.glob("two.jsonl.*"))
    before = (place / "two.jsonl").stat().st_mtime_ns
    predict_once(place / "m", place / "d", "test", place / "two.jsonl", 2, processes=2)  # is there already
    assert (place / "two.jsonl").stat().st_mtime_ns == before


def test_a_process_that_fails_ends_the_others(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start, before = time.monotonic(), set(psutil.Process().children())  # those of other tests
    with pytest.raises(GrexError, match=r"one of 2 processes ended with status 2; expected 0"):
        predict_once(place / "m", place / "none", "test", place / "never.jsonl", 2, processes=2)
    assert time.monotonic() - start < WAIT_S and not (place / "never.jsonl").exists()
    assert str(place / "none") in capfd.readouterr().err
    assert not set(psutil.Process().children()) - before


def test_a_signal_ends_all_and_the_next_run_goes_on(place: Path) -> None:
    """SIGTERM once an answer is written: nobody is left, the answer is kept, and the finished file is that of one process."""
    out = place / "cut.jsonl"
    code = (
        "import sys; from pathlib import Path; from grex_mllm.job import predict_once\n"
        f"predict_once({str(place / 'm')!r}, Path({str(place / 'd')!r}), 'test', Path({str(out)!r}), 2, processes=2)"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    parts, end = [place / f"cut.jsonl.part{rank}of2" for rank in range(2)], time.monotonic() + WAIT_S
    while not any(part.exists() and part.read_bytes().count(b"\n") > 1 for part in parts):
        assert time.monotonic() < end and run.poll() is None
        time.sleep(0.02)
    children = psutil.Process(run.pid).children()
    run.send_signal(signal.SIGTERM)
    assert run.wait(WAIT_S) == 128 + signal.SIGTERM
    assert len(children) == 2 and not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    assert not out.exists() and any(part.exists() for part in parts)
    predict_once(place / "m", place / "d", "test", out, 2, processes=2)
    predict_once(place / "m", place / "d", "test", place / "whole.jsonl", 2)
    assert [line.get("expression") for line in lines_of(out)] == [line.get("expression") for line in lines_of(place / "whole.jsonl")]


@pytest.mark.parametrize(("threads", "gigabytes", "expected"), [(2, 16, 2), (4, 9, 2), (2, 1, 1), (1, 64, 1), (64, 512, processes.MOST)])
def test_as_many_processes_as_threads_and_memory_allow(
    threads: int, gigabytes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=gigabytes << 30))
    assert processes.num_processes(threads) == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert processes.num_processes(threads) == 1
