"""Fixtures that several test files use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of facts and real data: $GREX_SHARED or ../shared; skip, with the reason, where a user lacks it."""
    folder = Path(os.environ.get("GREX_SHARED", ROOT.parent / "shared"))
    if not (folder / "README.md").is_file():
        pytest.skip(f"needs the shared data folder: set GREX_SHARED, or put it at {ROOT.parent.name}/shared")
    return folder
