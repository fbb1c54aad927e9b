"""The model card."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_exchange import predictions
from tiny import tiny_model
from tiny_folder import HEIGHT, WIDTH, tiny_folder

from grex_mllm.cli import main
from grex_mllm.errors import GrexError
from grex_mllm.export.card import write_card
from grex_mllm.ops.masks import encode_rle
from grex_mllm.score import score


def scored(work: Path) -> Path:
    nothing = encode_rle(np.zeros((HEIGHT, WIDTH), bool))
    answers = [{"expression_id": name, "mask_rle": nothing, "no_target": True} for name in ("e1", "e2", "e3")]
    score(predictions(work, answers), tiny_folder(work / "data"), "train", ROOT / "eval" / "protocols" / "gres.yaml", work / "results.json")
    return work / "results.json"


def test_card_says_data_protocol_numbers_and_limits(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    assert main(["card", "--model", str(tmp_path / "model"), "--results", str(scored(tmp_path))]) == 0
    text = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    for part in (
        "## Model",
        "## Data",
        "## Protocol",
        "## Numbers",
        "## Limits",
        "## Use",
        "instance_selection",
        "split train, 3 expressions",
    ):
        assert part in text
    count = sum(tensor.numel() for tensor in model.saved_state().values())
    assert f"parameters on file: {count:,}" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| strict |")]
    assert " 33.3" in row  # one of three expressions has no target


def test_what_is_no_model_or_no_results(tmp_path: Path) -> None:
    with pytest.raises(GrexError, match="model folder"):
        write_card(tmp_path, tmp_path / "results.json", tmp_path / "README.md")
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(GrexError, match="do not exist"):
        write_card(tmp_path / "model", tmp_path / "results.json", tmp_path / "README.md")
    for text in ("", "[]", json.dumps({"results": {}})):
        (tmp_path / "results.json").write_text(text, encoding="utf-8")
        with pytest.raises(GrexError, match=r"is no results\.json"):
            write_card(tmp_path / "model", tmp_path / "results.json", tmp_path / "README.md")
