"""The example of CONTRIBUTING.md, "Add a predictor", runs from the command line by its dotted path."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from tiny_folder import expression, tiny_records, write_folder

from grex_mllm.cli import main
from grex_mllm.ops.masks import decode_rle


def folder(place: Path) -> Path:
    images, expressions = tiny_records()
    texts = ["the left dog", "the dog and the cat", "the bird on the right"]
    expressions[:3] = [expression(f"e{n}", "1", text, line["targets"]) for n, (text, line) in enumerate(zip(texts, expressions), start=1)]
    return write_folder(place / "d", images, expressions)


@pytest.mark.parametrize("name", ["tests.examples.predictor_example", "my_predictor"])
def test_a_module_of_ones_own_predicts_and_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(sys, "path", [item for item in sys.path if Path(item or ".").resolve() != ROOT])
    shutil.copy(ROOT / "tests" / "examples" / "predictor_example.py", tmp_path / "my_predictor.py")
    monkeypatch.chdir(ROOT if "." in name else tmp_path)
    data, out = str(folder(tmp_path)), tmp_path / "p.jsonl"
    assert main(["predict", "--model", name, "--data", data, "--split", "train", "--out", str(out)]) == 0
    assert "predicted train by the words left and right" in capsys.readouterr().err
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["expression_id"] for line in lines] == ["e1", "e2", "e3"]
    assert [line["status"] for line in lines] == ["ok", "unparsable", "ok"] and lines[1]["reason"] == "it names no side"
    left = decode_rle(lines[0]["mask_rle"])
    assert left[:, :20].all() and not left[:, 20:].any() and np.array_equal(decode_rle(lines[2]["mask_rle"]), ~left)
    assert main(["score", str(out), "--data", data, "--split", "train", "--out", str(tmp_path / "r.json")]) == 0
    results = json.loads((tmp_path / "r.json").read_text())
    assert results["provenance"]["predictions"]["statuses"] == {"ok": 2, "unparsable": 1}
    assert results["results"]["strict"]["gres"]["gIoU"] == pytest.approx(100 / 600 / 3)  # a dog of 10 x 10 pixels in a half of 20 x 30


def test_grex_ground_takes_it_and_refuses_who_knows_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    picture = str(folder(tmp_path) / "images" / "a.png")
    words = ["ground", "--image", picture, "--out", str(tmp_path / "o"), "--model"]
    assert main([*words, "tests.examples.predictor_example", "--expression", "left", "right"]) == 0
    assert [answer["mask_pixels"] for answer in json.loads(capsys.readouterr().out)] == [600, 600]
    for model, text, said in (
        ("tests.examples.predictor_example", "the dog", "answers unparsable (it names no side)"),
        ("oracle", "the dog", "oracle, which reads the targets"),
    ):
        assert main([*words, model, "--expression", text]) == 2 and said in capsys.readouterr().err
    assert main(["describe", "--image", picture, "--boxes", "[[2,3,12,13]]", "--model", "largest"]) == 2
    assert "without a generator" in capsys.readouterr().err
