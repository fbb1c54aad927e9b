"""Fixtures that several test files use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is no folder fails at once, without asking a hub again and again

ROOT = Path(__file__).resolve().parent.parent
BROWSER_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
# Files that take long for few tests: first, so that no process is left with one of them at the end.
EARLY = [
    "test_commands",
    "test_wheel",
    "test_end_to_end",
    "test_step",
    "test_predictor_contract",
    "test_estimate",
    "test_validation",
    "test_score_groups",
    "test_deepspeed",
    "test_elastic",
    "test_cluster",
    "test_two_nodes",
    "test_forecast",
    "test_server_runs",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of EARLY in front; within a file the order stays."""
    place = {name: n for n, name in enumerate(EARLY)}
    items.sort(key=lambda item: place.get(item.path.stem, len(EARLY)))


@contextmanager
def no_java() -> Iterator[None]:
    """Score without the metrics that need Java, as where it is not installed: each run of METEOR reads paraphrases for eight seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grex_mllm.metrics.language.java_missing", lambda: "left out: it takes seconds")
        yield


@pytest.fixture
def without_java() -> Iterator[None]:
    """See `no_java`."""
    with no_java():
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of facts and real data: $GREX_SHARED or ../shared; skip, with the reason, where a user lacks it."""
    folder = Path(os.environ.get("GREX_SHARED", ROOT.parent / "shared"))
    if not (folder / "README.md").is_file():
        pytest.skip(f"needs the shared data folder: set GREX_SHARED, or put it at {ROOT.parent.name}/shared")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return an installed Chromium without a window, and skip, with the reason, where there is none."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs an installed Chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=BROWSER_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def keep(tmp_path: Path) -> Any:
    """Return what keeps a screenshot of a page under a name: in the folder that GREX_SCREENSHOTS names, or in pytest's own."""
    folder = Path(os.environ.get("GREX_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return lambda page, name: page.screenshot(path=folder / f"{name}.png")
