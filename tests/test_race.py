"""The race of all systems: every one of them can be built with the shared encoders, and a whole race runs at tiny size, once."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

from grex_mllm.cli import main
from grex_mllm.config import load_config
from grex_mllm.entries import DECODERS
from grex_mllm.errors import GrexError
from grex_mllm.models import build_grounding
from grex_mllm.training.combinations import check_combinations

TINY = ["--data.image_size=64", "--model.vision.embed_width=8", "--model.vision.swin_heads=[1, 1, 2, 2]", "--model.text.num_layers=1"]
TINY += ["--train.batch_images=2", "--data.expressions_per_image=2"]


@pytest.fixture
def race(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import photo_comparison
    import race as module

    monkeypatch.setattr(photo_comparison, "grex", lambda *words: main(list(words)))
    monkeypatch.setattr(module, "ROUNDS", 1)
    monkeypatch.setattr("grex_mllm.training.run.CORPUS_LINES", 300)
    monkeypatch.setattr("grex_mllm.metrics.language.java_missing", lambda: "left out: it takes seconds")
    return module


def options(race: ModuleType, tmp_path: Path) -> list[str]:
    config = str(ROOT / "configs" / "race.yaml")
    sizes = ["--seconds", "0.01", "--threads", "1", "--scenes", "2", "--config", config]
    return ["--out", str(tmp_path / "out"), *sizes, "--seeds", "0", "--systems", "ISFP", *(f"--set={change}" for change in TINY)]


def test_every_system_has_the_shared_encoders_and_learns_all_that_grex_asks(race: ModuleType, tmp_path: Path) -> None:
    given = Namespace(data=None, config=str(ROOT / "configs" / "race.yaml"), threads=1, set=TINY, out=tmp_path)
    found, raced = {}, set()
    for name in race.SYSTEMS:
        config = load_config(given.config, race.fields(name, 0, given))
        check_combinations(config)
        raced.add(config.model.decoder.name)
        model = build_grounding(config.model)
        vision = config.model.vision
        found[name] = (
            vision.name,
            vision.embed_width,
            tuple(vision.swin_depths),
            config.model.text.num_layers,
            config.model.pixel_decoder.width,
        )
        assert getattr(model.decoder, "answers_boxes", False), name
    assert len(set(found.values())) == 1
    assert raced == set(DECODERS)


def test_a_race_from_scenes_to_table(
    race: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(race, tmp_path)
    monkeypatch.chdir(ROOT)
    race.main(given)
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("| ISFP"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert all("[" in cell for cell in cells[1:6]) and all(float(cell) > 0 for cell in cells[6:11])
    assert json.loads((tmp_path / "out" / "steps.json").read_text())["steps"]["ISFP"] == 2
    import photo_comparison

    monkeypatch.setattr(photo_comparison, "grex", None)  # nothing is done twice
    race.main(given)
    assert capsys.readouterr().out.endswith(text[text.index("| system") :])
    with pytest.raises(SystemExit, match=r"of 0\.01 seconds a run"):
        race.main([*given, "--seconds", "2"])


def test_options_change_the_race_of_rela_alone_and_a_teacher_is_the_run_of_its_seed(
    race: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    given = options(race, tmp_path)
    given[given.index("ISFP")] = "ReLA"
    taught = [*given, "--systems", "small ReLA, distilled", "ReLA, hardest masks", "ReLA", "--table", "options.md"]
    with pytest.raises(GrexError, match=r"train\.teacher .*ReLA-0 has no"):
        race.main(taught)
    race.main([*given, "--steps-only"])
    assert not (tmp_path / "out" / "ReLA-0").exists() and (tmp_path / "out" / "steps.json").exists()
    race.main(given)
    race.main(taught)
    lines = (tmp_path / "out" / "options.md").read_text().splitlines()
    weights = {line.split("|")[1].strip(): float(line.split("|")[7]) for line in lines[2:5]}
    assert weights["small ReLA, distilled"] < weights["ReLA"] == weights["ReLA, hardest masks"]
    assert "options" not in (tmp_path / "out" / "table.md").read_text()
    student = load_config(tmp_path / "out" / "small_ReLA_distilled-0" / "config.yaml")
    assert student.train.teacher == str(tmp_path / "out" / "ReLA-0") and student.loss.distill == 1.0
    log = (tmp_path / "out" / "small_ReLA_distilled-0" / "log.jsonl").read_text()
    assert "distill" in log
    asked = Namespace(data=None, config=str(ROOT / "configs" / "race.yaml"), threads=1, set=[], out=tmp_path / "out")
    assert f"--train.teacher={tmp_path / 'out' / 'ReLA-7'}" in race.fields("small ReLA, distilled", 7, asked)
    masks = load_config(tmp_path / "out" / "ReLA_hardest_masks-0" / "config.yaml")
    assert masks.model.decoder.loss.hard.masks == 0.5 and masks.train.teacher is None
