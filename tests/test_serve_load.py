"""Fifty people at once before a real `grex serve` process for a minute (`benchmarks/serve_load.py`): no error, no mixed-up answer."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from tiny import tiny_speaker

Capture = pytest.CaptureFixture[str]
pytest.importorskip("fastapi", reason="needs the extra serve: pip install 'grex-mllm[serve]'")


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("serve_load")


@pytest.mark.long
def test_fifty_clients_for_a_minute(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_speaker(tmp_path / "tokenizer").save_pretrained(tmp_path / "model")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    threads = torch.get_num_threads()
    try:
        status = program.main(["--model", str(tmp_path / "model"), "--clients", "50", "--seconds", "60"])
    finally:
        torch.set_num_threads(threads)
    *lines, last = capsys.readouterr().out.splitlines()
    told = json.loads(last)
    assert status == 0 and told["errors"] == told["mixed"] == 0 and told["answers"] > 500, told
    assert told["memory_growth"] <= program.MAX_GROWTH
    assert len(lines) == 5 and lines[2].startswith(f"| {program.FIRST}")


def test_a_mixed_up_answer_would_be_noticed(program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clients before an application that answers everybody about the last picture: the program must see it."""
    import threading
    import time

    from starlette.testclient import TestClient

    from grex_mllm.serve.app import make_app
    from grex_mllm.serve.pictures import read_picture

    model = tiny_speaker(tmp_path)
    cases = program.make_cases(model, 2)
    assert cases[0].pixels.shape != cases[1].pixels.shape
    monkeypatch.setattr(program.httpx2, "Client", lambda base_url, timeout: TestClient(app, base_url="http://127.0.0.1:8000"))
    for wrong in (False, True):
        app = make_app(model, "tiny")
        if wrong:
            rooms = app.app.state.rooms  # type: ignore[attr-defined]
            opened = rooms.engine.open
            first = opened(read_picture(cases[0].png), "x")
            monkeypatch.setattr(rooms.held, "find", lambda name, first=first: first)
        found = program.Found()
        program.client("", cases[1], False, time.monotonic() + 0.2, found, threading.Lock())
        assert found.errors == [] and bool(found.mixed) == wrong and len(found.seconds[program.MORE]) >= program.FURTHER


def test_growth_is_of_the_last_third_over_the_first(program: Any) -> None:
    found = program.Found(memory_mib=[(float(second), 100.0 + second) for second in range(60)])
    assert found.growth(60.0) == pytest.approx((100 + 51.5) / (100 + 19.5))
    assert program.Found(memory_mib=[(float(second), 80.0 if second > 10 else 10.0) for second in range(60)]).growth(60.0) == 1.0
