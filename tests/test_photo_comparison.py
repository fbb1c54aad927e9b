"""The comparison at an equal budget: intervals by hand, and a whole one at tiny size with a budget of a moment."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import ROOT
from made_photos import made_coco, made_stages

from grex_mllm.cli import main

MORE = ["rela", "one expression an image", "scenes first", "joint", "generation alone, half the time"]


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for folder in ("benchmarks", "data_prep"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    import photo_comparison as module

    monkeypatch.setattr(module, "grex", lambda *words: main(list(words)))  # in this process: eight starts of Python take a minute
    monkeypatch.setattr(module, "ROUNDS", 1)
    return module


def sums(values: dict[tuple[str, str], tuple[float, float]]) -> dict[str, dict[tuple[str, str], np.ndarray]]:
    return {"gIoU": {key: np.array(pair, float) for key, pair in values.items()}}


def test_the_mean_counts_each_source_and_each_seed_the_same(comparison: ModuleType) -> None:
    first = sums({("a", "1"): (1, 4), ("b", "2"): (1, 1), ("b", "3"): (1, 1)})  # a 0.25, b 1
    second = sums({("a", "1"): (3, 4), ("b", "2"): (0, 1), ("b", "3"): (1, 1)})  # a 0.75, b 0.5
    assert comparison.interval([first], "gIoU") == (62.5, 62.5, 62.5), "one seed, and within each source all photographs alike"
    mean, low, high = comparison.interval([first, second], "gIoU")
    assert mean == 62.5 and low == 37.5 and high == 87.5  # second with photograph 2 or 3 twice: (0.75 + 0) / 2 and (0.75 + 1) / 2
    assert comparison.interval([{}], "gIoU") is None


def test_a_source_without_a_sample_of_the_kind_is_left_out(comparison: ModuleType) -> None:
    none = sums({("a", "1"): (1, 2), ("b", "2"): (0, 0)})
    assert comparison.interval([none], "gIoU") == (50.0, 50.0, 50.0)


def test_the_seconds_of_interrupted_runs_add_up(comparison: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "phase0").mkdir()
    for folder, times in ((tmp_path, [1.0, 2.0, 0.5, 3.0]), (tmp_path / "phase0", [4.0])):
        (folder / "log.jsonl").write_text("".join(json.dumps({"elapsed_s": t}) + "\n" for t in times))
    assert comparison.seconds_of(tmp_path) == 2.0 + 3.0 + 4.0


@pytest.mark.parametrize(
    "names",
    [
        ["without geometry"],
        pytest.param(
            ["rela", "one expression an image", "scenes first", "joint", "generation alone, half the time"], marks=pytest.mark.long
        ),
    ],
)
def test_a_comparison_from_data_to_table(
    names: list[str], comparison: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import coco_templates

    monkeypatch.setattr("grex_mllm.metrics.language.java_missing", lambda: "left out: it takes seconds")
    coco = made_coco(tmp_path / "coco")
    sources = [f"--source={n}={file}:{coco / n / 'images'}" for n in ("cats", "traffic") for file in [next((coco / n).glob("instances*"))]]
    assert coco_templates.main([*sources, "--out", str(tmp_path / "data"), "--splits", "train=0.5,test=0.5"]) == 0
    ground, _, joint = made_stages(tmp_path / "configs")
    given = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--seconds", "0.01", "--threads", "1", "--seeds", "0", "1"]
    given += ["--ground", ground, "--joint", joint, "--variants", "instance_selection", *names]
    comparison.main(given)
    text = capsys.readouterr().out
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")}
    assert {"instance_selection", *names, *comparison.RULES} <= set(rows)
    assert rows["oracle"][1:7] == ["100.0 [100.0, 100.0]"] * 6 and rows["always_empty"][2].startswith("100.0")
    assert all("[" in cell for name in ["instance_selection", *names] for cell in rows[name][1:4] if "generation" not in name)
    steps = json.loads((tmp_path / "out" / "steps.json").read_text())
    assert steps["seconds"] == 0.01 and all(number == 2 for each in steps["steps"].values() for number in each)
    monkeypatch.setattr(comparison, "grex", None)  # nothing is done twice
    comparison.main(given)
    assert capsys.readouterr().out.endswith(text[text.index("| variant") :])
    with pytest.raises(SystemExit, match=r"of 0\.01 seconds a run"):
        comparison.main([*given, "--seconds", "2"])
    shutil.rmtree(tmp_path / "out")
