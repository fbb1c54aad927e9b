"""Expressions that are longer than a model reads end no run: left out of generation, cut for grounding, counted and reported."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from test_fused_generator import GENERATOR
from tiny import tiny_config, tiny_speaker
from tiny_folder import expression, tiny_folder, tiny_records, write_folder

from grex_mllm import GrexModel
from grex_mllm.data.collate import collate
from grex_mllm.data.dataset import FolderDataset
from grex_mllm.models.generators.region_tokens import collate as collate_generation
from grex_mllm.models.generators.region_tokens.config import RegionTokensConfig
from grex_mllm.models.text import train_text_tokenizer
from grex_mllm.predict import predict_split
from grex_mllm.progress import list_ids
from grex_mllm.training.run import train_from_config
from grex_mllm.types import Batch

LONG = "the dog that stands beside the cat on the grass " * 8


def folder_with_long(folder: Path) -> Path:
    images, expressions = tiny_records()
    expressions.insert(1, expression("long", "1", LONG.strip(), ["11"]))
    return write_folder(folder, images, expressions)


def words(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode each word by its length, between 1 (BOS) and 2 (EOS)."""
    rows = [[1, *(len(word) + 2 for word in text.split()), 2] for text in texts]
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return ids, (ids > 0).long()


class Words:
    """A tokenizer."""

    encode = staticmethod(words)
    bos_id, eos_id = 1, 2


def batch_of(folder: Path, most: int) -> Batch:
    config = RegionTokensConfig(max_expression_tokens=most)
    return collate([FolderDataset(folder, "train")[0]], words, partial(collate_generation, config, Words()), image_size=32)


def test_long_ones_are_left_out_and_named(tmp_path: Path) -> None:
    batch = batch_of(folder_with_long(tmp_path), 7)
    assert batch.too_long == ["long"]
    assert [index.tolist() for index in batch.generation.target_index] == [[0], [0, 1]] and batch.generation.weight.tolist() == [1, 1]
    assert batch.generation.lm_ids.tolist() == [[1, 5, 5, 2, 0, 0, 0], [1, 5, 5, 5, 5, 5, 2]]  # without the columns of the long one
    assert "long" in batch.expression_ids  # grounding reads its first tokens
    assert batch_of(tmp_path, 200).too_long == []


def test_a_batch_of_long_ones_alone(tmp_path: Path) -> None:
    """A stand-in of weight zero keeps the step the same on every process."""
    batch = batch_of(folder_with_long(tmp_path), 3)
    assert batch.too_long == ["e1", "long", "e2"] and batch.generation.weight.tolist() == [0]
    assert batch.generation.lm_ids.tolist() == [[1, 2]] and len(batch.generation.target_index[0]) == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_goes_on_to_its_end_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int) -> None:
    changes: dict[str, object] = {
        "data__train": folder_with_long(tmp_path / "d"), "train__out": tmp_path / "run", "train__steps": 4, "train__batch_images": 1,
        "model__generator__max_expression_tokens": 40, "data__num_workers": workers,
        "train__precision": "fp32", "train__log_every": 2, "train__num_threads": 1,
    }  # fmt: skip
    result = train_from_config(tiny_config(**(GENERATOR | changes)))
    said = " ".join(capsys.readouterr().out.split())
    assert result.steps == 4 and set(result.too_long) == {"long"} and result.too_long["long"] >= 1
    shown = "1 expressions with more tokens than model.generator allows were left out of generation"
    assert said.count(shown) == 1 and f"({result.too_long['long']} times): long" in said
    assert said.count("1 expressions of more than model.text.max_tokens = 20 tokens are cut there by the text encoder: long") == 1
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert sum(line.get("too_long", 0) for line in logged) == result.too_long["long"]


def test_a_training_without_long_ones_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes: dict[str, object] = {"data__train": tiny_folder(tmp_path / "d"), "train__out": tmp_path / "run", "train__steps": 1,
                                  "train__batch_images": 1, "train__precision": "fp32", "train__num_threads": 1}  # fmt: skip
    result = train_from_config(tiny_config(**(GENERATOR | changes)))
    assert result.too_long == {} and "expressions of more than" not in capsys.readouterr().out
    assert '"too_long"' not in (tmp_path / "run" / "log.jsonl").read_text()


def test_prediction_tells_what_it_cuts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_speaker(tmp_path / "t").save_pretrained(tmp_path / "m")
    folder = folder_with_long(tmp_path / "d")
    tasks = ["ground", "generate"]
    lines = predict_split(str(tmp_path / "m"), str(folder), tmp_path / "p.jsonl", "train", tasks, device="cpu").read_text().splitlines()
    assert {json.loads(line).get("expression_id") for line in lines} >= {"e1", "long", "e2", "e3"}
    assert "1 expressions of more than model.text.max_tokens = 20 tokens were cut there: long\n" in capsys.readouterr().err


def test_which_expressions_the_text_tokenizer_cuts() -> None:
    tokenizer = train_text_tokenizer(["a b c d e f g h"], 300)
    texts = [" ".join("abcdefgh"[:n]) for n in range(1, 9)]
    cut = tokenizer.too_long(texts, 6)  # [CLS] and [SEP] count
    assert cut == [4, 5, 6, 7]
    assert [
        i for i, (full, short) in enumerate(zip(_lengths(tokenizer, texts, 99), _lengths(tokenizer, texts, 6), strict=True)) if full > short
    ] == cut
    assert list_ids("are cut", [f"e{i}" for i in range(7)]) == "7 are cut: e0, e1, e2, e3, e4, ..."
    assert list_ids("are cut", ["e0"]) == "1 are cut: e0"


def _lengths(tokenizer, texts: list[str], most: int) -> list[int]:
    return tokenizer.encode(texts, most)[1].sum(1).tolist()


def test_the_saved_model_of_such_a_run_loads(tmp_path: Path) -> None:
    changes: dict[str, object] = {"data__train": folder_with_long(tmp_path / "d"), "train__out": tmp_path / "run", "train__steps": 1,
                                  "train__batch_images": 1, "model__generator__max_expression_tokens": 2,
                                  "train__precision": "fp32", "train__num_threads": 1}  # fmt: skip
    result = train_from_config(tiny_config(**(GENERATOR | changes)))  # no expression at all is short enough
    assert result.lines[-1]["loss/generate/lm"] == 0 and set(result.too_long) == {"e1", "long", "e2"}
    assert GrexModel.from_pretrained(tmp_path / "run").generator is not None
