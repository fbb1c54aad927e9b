"""`grex demo --open` shows the report in the browser, and says where it is where there is none."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Any

import pytest

from grex_mllm import demo
from grex_mllm.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A demo whose run takes no time; the list holds what it was asked for."""
    asked: list[Any] = []
    monkeypatch.setattr(demo, "run_demo", lambda *given: asked.append(given) or {"results": {}})
    monkeypatch.chdir(tmp_path)
    return asked


def test_the_report_is_opened_by_its_address(run: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    seen: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: seen.append(address) or True)
    assert main(["demo", "--out", "my run", "--open", "--train.seed=3"]) == 0
    assert seen == [(Path.cwd() / "my run" / "report.html").as_uri()] and run == [(Path("my run"), None, ["--train.seed=3"])]
    assert "opened in the browser" in capsys.readouterr().out
    assert main(["demo", "--out", "my run"]) == 0 and len(seen) == 1


@pytest.mark.parametrize("failure", [None, webbrowser.Error("none"), OSError("none")])
def test_without_a_browser_the_file_is_named(
    run: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Capture, failure: Exception | None
) -> None:
    def fail(address: str) -> bool:
        if failure is not None:
            raise failure
        return False

    monkeypatch.setattr(webbrowser, "open", fail)
    assert main(["demo", "--open"]) == 0
    assert str(Path.cwd() / "runs" / "demo" / "report.html") in capsys.readouterr().out


def test_an_interrupted_demo_opens_nothing(run: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "run_demo", lambda *_: {})
    monkeypatch.setattr(webbrowser, "open", lambda _: pytest.fail("nothing was written"))
    assert main(["demo", "--open"]) == 0
