"""data_prep/photos.py on drawn pictures at tiny size: everything once, nothing twice, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT
from made_photos import made_coco, made_human, made_parts, made_stages

from grex_mllm import job
from grex_mllm.config import load_config, read_yaml
from grex_mllm.data.records import load_dataset
from grex_mllm.errors import GrexError
from grex_mllm.metrics import language


@pytest.fixture
def photos(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "data_prep"))
    import photos as module

    monkeypatch.setattr(module, "SPLITS", "train=0.5,val=0.2,test=0.3")
    return module


def words(tmp_path: Path, *more: str) -> list[str]:
    stages = [str(tmp_path / "configs" / f"{name}.yaml") for name in ("ground", "align", "joint")]
    given = ["--coco", str(tmp_path / "coco"), "--out", str(tmp_path / "run"), "--models", str(tmp_path / "models"), "--candidates", "2"]
    return [*given, "--expressions-per-image", "4", *more, "--stages", *stages]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    made_coco(tmp_path / "coco")
    made_parts(tmp_path / "models")
    made_stages(tmp_path / "configs")
    return tmp_path


def test_the_whole_job_from_photographs_to_a_report(
    photos: ModuleType, made: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "java_missing", lambda: "left out: it takes seconds")
    monkeypatch.setattr("grex_mllm.training.forecast.MEASURED", 1)
    made_human(made / "human", made / "coco")
    given = words(made, "--human", str(made / "human"))
    assert photos.main(given) == 0
    said = capfd.readouterr().out
    assert "expected on this machine" in said and "precision: fp32" in said and "were announced" in said
    run = made / "run"
    results = json.loads((run / "results.json").read_text())
    assert {*job.RULES} <= {*results["baselines"]} and set(results["by_source"]) == {"cats", "traffic"}
    assert results["baselines"]["oracle"]["gres"]["gIoU"] == 1.0 == results["baselines"]["oracle"]["greg"]["all"]["correct"]
    mean = results["mean_of_sources"]
    assert mean["oracle"]["gres"]["gIoU"] == 1.0 and mean["strict"]["greg"]["listener"]["all"]["num_samples"] > 0
    assert "round_trip_gIoU" in results["baselines"]["category_side"]["greg"]["all"]
    assert all((run / "stages" / name / "model.safetensors").is_file() for name in ("ground", "align"))
    assert load_dataset(run / "data").info["excluded"]["file"] == "excluded.txt"
    human = json.loads((run / "human" / "test" / "results.json").read_text())
    assert human["provenance"]["dataset"]["num_expressions"] == 9 and "correct" not in human["results"]["strict"]["greg"]["all"]
    assert "Unselected" in (run / "report.html").read_text() and (run / "human" / "test" / "report.html").is_file()
    times = json.loads((run / "times.json").read_text())
    assert {"ground", "align", "joint", "prediction", "baselines", "scores", "human test"} == set(times)

    monkeypatch.setattr("grex_mllm.training.run.train_from_config", None)  # a second call trains, predicts and scores nothing
    monkeypatch.setattr("grex_mllm.predict.predict_split", None)
    monkeypatch.setattr("grex_mllm.score.score", None)
    assert photos.main(given) == 0
    said = capfd.readouterr().out
    assert said.count("is there already") == 4 and "expected on this machine" not in said
    with pytest.raises(GrexError, match="3 photographs of --human"):
        photos.check_apart(tmp_data(photos, made), run / "human" / "data")


def test_parts_may_lie_elsewhere(photos: ModuleType, tmp_path: Path) -> None:
    """Every stage that ships names its parts in `models`; with another folder each is looked for there, and nothing else changes."""
    assert photos.stages_with(Path("models"), photos.STAGES, tmp_path / "none") == photos.STAGES and not (tmp_path / "none").exists()
    copies = photos.stages_with(tmp_path / "parts, mine", photos.STAGES, tmp_path / "configs")
    named = set()
    for file, copy in zip(photos.STAGES, copies, strict=True):
        before, after = read_yaml(ROOT / file)["model"], read_yaml(copy)["model"]
        named |= {after["vision"].get("weights"), after["text"].get("path"), after.get("generator", {}).get("lm")}
        text = json.dumps(after).replace(str(tmp_path / "parts, mine"), "models")
        assert json.loads(text) == before and load_config(copy, []).train.steps == load_config(ROOT / file, []).train.steps
    parts = ("efficientnet_lite0.safetensors", "all-minilm-l6-v2", "smollm2-135m-instruct")
    assert named == {None, *(str(tmp_path / "parts, mine" / name) for name in parts)}


def test_the_stages_that_run_look_for_their_parts_there(photos: ModuleType, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(photos, "run_job", lambda data, files, *rest, **more: ran.extend(files) or {})
    assert photos.main(words(made)) == 0
    assert ran == [str(made / "run" / "configs" / f"{name}.yaml") for name in ("ground", "align", "joint")]
    assert all(Path(file).is_file() for file in ran)


def tmp_data(photos: ModuleType, made: Path) -> Path:
    """The same data with nothing excluded."""
    sources = photos.find_sources(made / "coco")
    return Path(photos.make_data(sources, made / "other", None, "2"))


def test_without_a_folder_it_says_what_to_give() -> None:
    program = [sys.executable, str(ROOT / "data_prep" / "photos.py")]
    run = subprocess.run(program, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "--coco" in run.stderr
    run = subprocess.run(["make", "-C", str(ROOT), "photos"], capture_output=True, text=True, check=False)
    assert run.returncode != 0 and "make photos COCO=FOLDER" in run.stderr and "instances" in run.stderr


def test_folders_of_other_layouts_are_refused(photos: ModuleType, made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def said(*given: str) -> str:
        assert photos.main(list(given)) == 2
        return capfd.readouterr().err

    assert "is no folder" in said("--coco", str(made / "nowhere"))
    assert "without instances" in said("--coco", str(made / "models"))
    assert "the argument --seed=1" in said("--coco", str(made / "coco"), "--seed=1")
    assert "no instances" in said("--coco", str(made / "coco"), "--human", str(made / "models"))
    (made / "coco" / "cats" / "images").rename(made / "coco" / "cats" / "pictures")
    assert "without images beside it" in said("--coco", str(made / "coco"))
    (made / "coco" / "cats" / "instances_val.json").write_text("{}")
    assert "one instance file a source" in said("--coco", str(made / "coco"))


def test_one_source_lies_in_the_folder_itself_or_as_coco_publishes_it(photos: ModuleType, made: Path) -> None:
    cats = made / "coco" / "cats"
    assert photos.find_sources(cats) == {"cats": (cats / "instances.json.gz", cats / "images")}
    (cats / "annotations").mkdir()
    (cats / "instances.json.gz").rename(cats / "annotations" / "instances_val2017.json.gz")
    (cats / "images").rename(cats / "val2017")
    assert photos.find_sources(cats) == {"cats": (cats / "annotations" / "instances_val2017.json.gz", cats / "val2017")}
    assert set(photos.find_sources(made / "coco")) == {"cats", "traffic"}


def test_other_photographs_need_another_run_folder(photos: ModuleType, made: Path) -> None:
    sources = photos.find_sources(made / "coco")
    photos.make_data(sources, made / "run", None, "2")
    with pytest.raises(GrexError, match="of other instance files"):
        photos.make_data({"cats": sources["cats"]}, made / "run", None, "2")


def test_stages_follow_one_another(made: Path) -> None:
    files = [str(made / "configs" / f"{name}.yaml") for name in ("ground", "align", "joint")]
    for file, train in zip(files[:2], ("synthetic", "data/photos"), strict=True):
        Path(file).write_text(Path(file).read_text().replace("data:\n", f"data:\n  train: {train}\n", 1))
    stages = job.plan_stages(Path("data"), files, Path("run"), ["--train.seed=5"])
    assert [str(stage.out) for stage in stages] == [str(Path("run", "stages", "ground")), str(Path("run", "stages", "align")), "run"]
    assert [stage.config.train.start for stage in stages] == [None, *(str(stage.out) for stage in stages[:2])]
    assert [stage.config.data.train for stage in stages] == ["synthetic", "data", "data"]
    assert all(stage.config.train.seed == 5 and stage.config.train.resume for stage in stages)
    for wrong in ([], [files[0], files[0]]):
        with pytest.raises(GrexError, match="of different names"):
            job.plan_stages(Path("data"), wrong, Path("run"))
