"""Every decoder learns sixteen real photographs with human expressions by heart, by the one loop (`benchmarks/overfit.py`)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT
from test_data_prep import convert

from grex_mllm.entries import DECODERS

GIOU, PR_F1 = 0.80, 0.70
RECIPES = [*DECODERS, "lavt_rela"]  # the last is a decoder on the features of another's image encoder


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("overfit_program", ROOT / "benchmarks" / "overfit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def photographs(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, out = shared / "data" / "human_refs", tmp_path_factory.mktemp("human") / "data"
    flags = {"--refs": folder / "grefs_mini.json", "--instances": folder / "instances.json", "--images": folder / "images", "--out": out}
    assert convert([str(item) for pair in flags.items() for item in pair]) == 0
    return out


def test_every_decoder_has_a_recipe(program: ModuleType) -> None:
    assert set(program.SYSTEMS) == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_of_every_recipe_runs(name: str, program: ModuleType, photographs: Path, tmp_path: Path) -> None:
    tiny = ["--train.steps=1", "--train.batch_images=1", "--data.image_size=96", "--train.num_threads=1"]
    row = program.learn(photographs, "test", 1, 0, tmp_path / "out", name, tiny)
    assert 0 <= row["gIoU"] <= 1


@pytest.mark.long
@pytest.mark.parametrize("name", RECIPES)
def test_sixteen_photographs_are_learned_by_heart(name: str, program: ModuleType, photographs: Path, tmp_path: Path) -> None:
    """A throwaway model: no published figure uses it."""
    row = program.learn(photographs, "test", 16, 0, tmp_path / "out", name, [])
    print(f"{name}: {row}", file=sys.stderr)
    assert row["gIoU"] >= GIOU and row.get("Pr@F1", 1.0) >= PR_F1
