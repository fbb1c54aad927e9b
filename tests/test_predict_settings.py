"""Prediction on a machine's devices and precisions, on folders with attributes, and on synthetic scenes from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_speaker
from tiny_folder import tiny_records, write_folder

import grex_mllm.demo as demo
from grex_mllm.cli import main
from grex_mllm.data.synthetic.export import EXPRESSIONS_PER_SCENE, NUM_SCENES, export
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.errors import GrexError
from grex_mllm.models.grex import GrexModel
from grex_mllm.ops.masks import decode_rle
from grex_mllm.precision import pick_device
from grex_mllm.predict import predict_split, synthetic_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("settings")
    tiny_speaker(root / "t").save_pretrained(root / "m")
    return root / "m"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("gpus", "variables", "expected"),
    [
        (4, {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "2"}, "cuda:2"),
        (4, {"WORLD_SIZE": "8", "RANK": "6", "LOCAL_RANK": "2"}, "cuda:2"),  # the second machine
        (2, {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3"}, "cuda:1"),  # fewer GPUs than processes
        (1, {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, "cuda:0"),  # a launcher that shows each process its own GPU
        (4, {"WORLD_SIZE": "4", "RANK": "3"}, "cuda:3"),
        (4, {}, "cuda"),
    ],
)
def test_each_process_takes_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, name: str, gpus: int, variables: dict[str, str], expected: str
) -> None:
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)  # stands for an allocation on a GPU
    assert pick_device(name) == expected
    assert pick_device("cpu") == "cpu" and pick_device("cuda:1") == "cuda:1"


def test_several_processes_without_a_gpu_share_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto") == "cpu"


def predicted(model: Path, data: Path, out: Path, *overrides: str) -> list[dict[str, Any]]:
    return lines_of(
        predict_split(str(model), str(data), out, "test", ["ground", "generate"], listener=2, device="cpu", overrides=list(overrides))
    )


def test_bf16_predictions_agree_with_those_in_fp32(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(SyntheticConfig(image_size=64), "test", 4, tmp_path / "d", 5)
    shown = []
    found = []
    for precision in ("fp32", "bf16"):
        found.append(predicted(model, tmp_path / "d", tmp_path / f"{precision}.jsonl", f"--predict.precision={precision}"))
        shown.append(capsys.readouterr().err)
    assert "in fp32 on cpu" in shown[0] and "in bf16 on cpu" in shown[1]
    full, half = ({line["expression_id"]: line for line in lines if "expression_id" in line} for lines in found)
    assert full.keys() == half.keys() and len(full) == 20
    probabilities = np.array([[lines[key]["no_target_prob"] for key in full] for lines in (full, half)])
    assert 0 < np.abs(probabilities[0] - probabilities[1]).max() < 0.02  # computed otherwise, and close
    same = [np.mean(decode_rle(full[key]["mask_rle"]) == decode_rle(half[key]["mask_rle"])) for key in full]
    assert np.mean(same) > 0.95
    assert sum("targets" in line for line in found[0]) == sum("targets" in line for line in found[1]) > 0


def test_precision_and_part_files(model: Path, tmp_path: Path) -> None:
    export(SyntheticConfig(image_size=64), "test", 1, tmp_path / "d", 2)
    with pytest.raises(GrexError, match="fp8"):
        predicted(model, tmp_path / "d", tmp_path / "p.jsonl", "--predict.precision=fp8")
    assert not list(tmp_path.glob("p.*"))


def with_attributes(folder: Path) -> Path:
    """A hand-made folder whose images carry attributes that no synthetic scene has."""
    images, expressions = tiny_records()
    for image in images:
        for number, instance in enumerate(image["instances"]):
            instance["attributes"] = {"fur": number}
    return write_folder(folder, images, expressions)


def test_attributes_alone_make_no_synthetic_scene(model: Path, tmp_path: Path) -> None:
    out = predict_split(
        str(model), str(with_attributes(tmp_path / "d")), tmp_path / "p.jsonl", "train", ["ground", "generate"], listener=2, device="cpu"
    )
    generated = [line for line in lines_of(out) if "targets" in line]
    assert len(generated) == 2 and not any("judgement" in line or "judgement" in line["listener"] for line in generated)


def test_the_judge_of_synthetic_scenes_reads_dataset_json(model: Path, tmp_path: Path) -> None:
    export(SyntheticConfig(image_size=64), "test", 2, tmp_path / "d", 3)
    generated = [line for line in predicted(model, tmp_path / "d", tmp_path / "a.jsonl") if "targets" in line]
    assert generated and all("judgement" in line and "judgement" in line["listener"] for line in generated)
    info = json.loads((tmp_path / "d" / "dataset.json").read_text())
    (tmp_path / "d" / "dataset.json").write_text(json.dumps(info | {"tool": "another program"}))
    generated = [line for line in predicted(model, tmp_path / "d", tmp_path / "b.jsonl") if "targets" in line]
    assert generated and not any("judgement" in line for line in generated)


@pytest.mark.usefixtures("without_java")
def test_synthetic_data_from_the_command_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["predict", "--model", str(model), "--data", "synthetic", "--split", "val", "--limit", "3", "--device", "cpu"]
    words += ["--data.sources.synthetic.image_size=64", "--predict.precision=fp32", "--out", "runs/x.jsonl"]
    assert main(words) == 0
    lines = lines_of(Path("runs/x.jsonl"))
    assert sum("expression_id" in line for line in lines) == 3 * EXPRESSIONS_PER_SCENE and any("judgement" in line for line in lines)
    export(SyntheticConfig(image_size=64), "val", 3, tmp_path / "same")
    for name in ("images.jsonl", "expressions.jsonl", "dataset.json"):
        assert (tmp_path / "same" / name).read_bytes() == (tmp_path / "runs" / "x.data" / name).read_bytes()
    capsys.readouterr()
    assert main(["score", "runs/x.jsonl", "--data", "runs/x.data", "--split", "val", "--out", "runs/results.json"]) == 0
    assert json.loads(Path("runs/results.json").read_text())["results"]["strict"]["gres"]["num_samples"] == 3 * EXPRESSIONS_PER_SCENE
    for verb, place in (("predict", "x.data beside x.jsonl"), ("score", "x.data beside them")):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        assert place in " ".join(capsys.readouterr().out.split())


def test_synthetic_scenes_of_other_settings_are_not_mixed(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ask(*more: str) -> int:
        words = ["predict", "--model", str(model), "--data", "synthetic", "--device", "cpu", "--tasks", "ground"]
        return main([*words, "--out", str(tmp_path / "x.jsonl"), "--data.sources.synthetic.image_size=64", *more])

    assert ask("--limit", "1") == 0
    assert ask("--limit", "1") == 2 and "x.jsonl exists" in capsys.readouterr().err
    before = sorted(path.name for path in tmp_path.rglob("*"))
    (tmp_path / "x.jsonl").unlink()
    assert ask("--limit", "2") == 2 and "x.data holds other data than 2 synthetic scenes" in capsys.readouterr().err
    assert ask("--limit", "1", "--data.sources.synthetic.seed=7") == 2 and "remove it" in capsys.readouterr().err
    assert ask("--limit", "0") == 2 and "at least 1 image" in capsys.readouterr().err
    assert ask("--limit", "1", "--image-root", "here") == 2 and "--image-root" in capsys.readouterr().err
    assert ask("--limit", "1") == 0 and sorted(path.name for path in tmp_path.rglob("*")) == before
    shutil.rmtree(tmp_path / "x.data")
    (tmp_path / "x.jsonl").unlink()
    assert ask("--split", "exam", "--limit", "1") == 2 and not list(tmp_path.iterdir())


def test_synthetic_predictions_are_of_as_many_scenes_as_the_demo() -> None:
    assert (NUM_SCENES, EXPRESSIONS_PER_SCENE) == (demo.TEST_SCENES, demo.EXPRESSIONS_PER_SCENE)
    assert synthetic_folder(Path("runs/a.b.jsonl")) == Path("runs/a.b.data")


def test_no_target_threshold_from_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    words = ["ground", "--model", str(model), "--image", str(tmp_path / "photo.png"), "--expression", "the red circle", "two stars"]
    words += ["--device", "cpu", "--out", str(tmp_path / "a")]

    def said(*more: str) -> list[bool]:
        assert main([*words, *more]) == 0
        return [answer["no_target"] for answer in json.loads(capsys.readouterr().out)]

    assert said("--threshold", "0") == [True, True] and said("--threshold", "0.5") == said() == said("--threshold", "1")
    for value in ("1.5", "-0.1"):
        assert main([*words, f"--threshold={value}"]) == 2
        error = capsys.readouterr().err
        assert value in error and "from 0 to 1" in error and error.count(";") == 2
    net = GrexModel.from_pretrained(model)
    for number in (float("nan"), True, "0.5"):
        with pytest.raises(GrexError, match="from 0 to 1"):
            net.ground(tmp_path / "photo.png", "the red circle", threshold=number)
    image = tmp_path / "photo.png"
    prob = net.ground(image, "the red circle").no_target_prob
    assert 0 < prob < 0.5
    assert net.ground(image, "the red circle", threshold=prob * 0.99).no_target and net.config.predict.no_target_threshold == 0.5
    assert net.ground(image, "the red circle", threshold=prob * 0.99).head_no_target
    assert not net.ground(image, "the red circle", threshold=prob * 1.01).head_no_target
    export(SyntheticConfig(image_size=64), "test", 1, tmp_path / "d", 3)
    ground = [line for line in predicted(model, tmp_path / "d", tmp_path / "p.jsonl", "--predict.no_target_threshold=0")
              if "expression_id" in line]  # fmt: skip
    assert all(line["no_target"] and line["boxes_xyxy"] == [] for line in ground)
