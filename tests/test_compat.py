"""Private interfaces of libraries: gathered in one module, another version warns once, a missing name is told in three parts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from packaging.version import Version

from grex_mllm import compat
from grex_mllm.errors import GrexError


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    compat.check_version.cache_clear()
    yield
    compat.check_version.cache_clear()


def test_the_installed_versions_are_checked_ones() -> None:
    for package, (first, beyond) in compat.CHECKED.items():
        assert Version(first) < Version(beyond)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compat.check_version(package)


@pytest.mark.parametrize("found", ["2.7.1", "2.14", "2.14.0.dev2+cpu", "3.0", "10.0"])
def test_another_version_warns_once(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "version", lambda package: found)
    with pytest.warns(UserWarning) as caught:
        for _ in range(3):
            compat.foreach("lerp_")([torch.zeros(2)], [torch.ones(2)], 0.5)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert f"torch {found} is installed" in text and "from 2.8 to below 2.14" in text and "pip install 'torch>=2.8,<2.14'" in text


@pytest.mark.parametrize(
    ("package", "owner", "name"),
    [("torch", "torch", "_foreach_gone"), ("numpy", "numpy._core.gone", "scalar"), ("accelerate", object(), "_reset_state")],
)
def test_a_missing_name_is_told_in_three_parts(package: str, owner: object, name: str) -> None:
    with pytest.raises(GrexError, match=rf"^{package} [\d.+a-z]+ has no .*{name}; expected a version from .*; pip install '{package}>="):
        compat.private(package, owner, name)


def test_a_tool_that_a_library_has_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import AcceleratorState

    monkeypatch.delattr(AcceleratorState, "_reset_state")
    with pytest.raises(GrexError, match=r"has no AcceleratorState\._reset_state; expected"):
        compat.forget_accelerator(processes=True)


def test_lists_of_tensors() -> None:
    values = [torch.zeros(2), torch.ones(3)]
    compat.foreach("lerp_")(values, [torch.ones(2), torch.zeros(3)], 0.25)
    assert [value.tolist() for value in values] == [[0.25] * 2, [0.75] * 3]
