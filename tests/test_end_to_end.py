"""The main job at tiny size: data, joint training, prediction, scores, report; interrupted runs; equal seeds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_config

import grex_mllm.demo as demo
from grex_mllm import GrexModel
from grex_mllm.config import save_config
from grex_mllm.data.synthetic.export import export
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.report.page import SERVED_AT
from grex_mllm.training.run import train_from_config

SMALL = {
    "model__generator__lm": "tiny", "model__generator__vocab_size": 300, "model__generator__hidden_size": 16,
    "model__generator__num_heads": 2,
    "model__generator__num_layers": 1, "model__generator__intermediate_size": 32, "model__generator__projector_width": 16,
    "model__generator__max_new_tokens": 8, "data__sources__synthetic__image_size": 64, "data__expressions_per_image": 3,
    "train__batch_images": 2,
    "train__steps": 6, "train__log_every": 1, "train__save_every": 2, "train__pretraining__steps": 3,
    "train__optim__average_decay": 0.9, "model__text__dropout": 0.1,
}  # fmt: skip


def small(**changes: object):
    return tiny_config(**{**SMALL, **changes})


@pytest.fixture
def few(monkeypatch):
    """A demo of few scenes."""
    monkeypatch.setattr(demo, "TEST_SCENES", 4)
    monkeypatch.setattr(demo, "EXPRESSIONS_PER_SCENE", 3)
    monkeypatch.setattr(demo, "LISTENER_CANDIDATES", 2)
    monkeypatch.setattr("grex_mllm.training.run.CORPUS_LINES", 300)
    monkeypatch.setattr("grex_mllm.training.pretraining.TEXT_LINES", 300)


def losses(out: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(row["step"], {k: v for k, v in row.items() if k.startswith("loss/")}) for row in rows]


@pytest.mark.usefixtures("without_java")
def test_demo_runs_from_data_to_report(tmp_path, few):
    config = tmp_path / "small.yaml"
    save_config(small(), config)
    results = demo.run_demo(tmp_path / "run", str(config), [])
    strict = results["results"]["strict"]
    assert strict["gres"]["num_samples"] == 12 and {"gIoU", "cIoU", "N_acc", "T_acc", "Pr@0.7"} <= strict["gres"].keys()
    assert "Pr@F1" in strict["grec"] and "accuracy" in strict["count"] and "official" in results["results"]
    assert results["baselines"]["oracle"] and results["baselines"]["always_empty"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "data:image/jpeg" in page and "http://" not in page.replace("http://www.w3.org", "").replace(SERVED_AT, "")
    assert "grex serve --model run</code>" in page
    rows = losses(tmp_path / "run")
    assert {name.split("/")[1] for _, terms in rows for name in terms} == {"ground", "generate", "total"}
    assert all(np.isfinite(v) for _, terms in rows for v in terms.values())
    model = GrexModel.from_pretrained(tmp_path / "run")
    image = tmp_path / "run" / "data" / "images" / "test-0.png"
    assert model.ground(image, "the red circle").mask.shape == (64, 64)
    shown = model.describe(image, boxes_xyxy=[[2, 2, 20, 20], [30, 30, 50, 50]], candidates=3, rerank="listener", details=True)
    assert shown.score is not None and 0 <= shown.score <= 1 and shown.candidates
    sets = model.describe(image, boxes_xyxy=[[2, 2, 20, 20], [30, 30, 50, 50]], object_sets=[[0], [1], [0, 1]])
    assert len(sets) == 3 and all(isinstance(text, str) for text in sets)
    again = demo.run_demo(tmp_path / "run", str(config), [])  # nothing is done twice
    assert again["results"] == results["results"]


@pytest.mark.long
def test_two_runs_with_one_seed_are_equal_and_another_seed_is_not(tmp_path, few):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_from_config(small(train__seed=seed, train__out=tmp_path / name))
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.long
def test_resume_after_a_kill_equals_the_uninterrupted_run(tmp_path, few):
    train_from_config(small(train__steps=12, train__precision="fp32", train__out=tmp_path / "whole"))
    config = tmp_path / "small.yaml"
    save_config(small(train__steps=12, train__precision="fp32"), config)  # bfloat16 rounds with the number of threads
    command = [
        sys.executable, "-c",
        "import sys; from grex_mllm.training import pretraining, run; run.CORPUS_LINES = pretraining.TEXT_LINES = 300; "
        "from grex_mllm.cli import main; sys.exit(main(sys.argv[1:]))",
        "train", "--config", str(config), f"--train.out={tmp_path / 'cut'}", "--train.resume=true",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "cut").glob("checkpoints/*4*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=200)
    # a text tokenizer, its language model and every loss are the same; the log holds each step once
    assert [row[0] for row in losses(tmp_path / "cut")] == list(range(1, 13))
    for (_, first), (_, second) in zip(losses(tmp_path / "whole"), losses(tmp_path / "cut"), strict=True):
        assert first.keys() == second.keys()
        for name in first:
            assert first[name] == pytest.approx(second[name], rel=1e-5), name


def test_training_on_a_folder(tmp_path, few):
    export(SyntheticConfig(image_size=64), "train", 6, tmp_path / "d", 3)
    config = small(data__train=tmp_path / "d", train__out=tmp_path / "run", data__resize="pad")
    train_from_config(config)
    model = GrexModel.from_pretrained(tmp_path / "run")
    assert model.ground(np.zeros((40, 90, 3), np.uint8), "the star").mask.shape == (40, 90)
