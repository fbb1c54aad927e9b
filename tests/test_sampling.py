"""A sample that stands for a split: by hand, by proportion, and through the command line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from score_case import make_dataset, read_lines

from grex_mllm.cli import main
from grex_mllm.data.records import load_dataset
from grex_mllm.data.sampling import draw
from grex_mllm.errors import GrexError
from grex_mllm.types import ExpressionRecord


def records(counts: dict[tuple[str, int], int]) -> list[ExpressionRecord]:
    made = [(source, targets, n) for (source, targets), number in counts.items() for n in range(number)]
    return [
        ExpressionRecord(f"{s}-{t}-{n}", "", f"{n}", "x", "x", [str(k) for k in range(t)], "val", s) for s, t, n in made
    ]  # fmt: skip


def strata(found: list[ExpressionRecord]) -> Counter[tuple[str, int]]:
    return Counter((record.source, min(len(record.targets), 3)) for record in found)


def test_every_stratum_gives_its_share_by_largest_remainders() -> None:
    whole = records({("a", 0): 60, ("a", 1): 25, ("b", 2): 10, ("b", 3): 3, ("b", 5): 2})
    assert strata(draw(whole, 10, "stratified")) == {("a", 0): 6, ("a", 1): 3, ("b", 2): 1}  # 6.0, 2.5, 1.0, 0.5: a tie, by name
    assert strata(draw(whole, 40, "stratified")) == {("a", 0): 24, ("a", 1): 10, ("b", 2): 4, ("b", 3): 2}
    assert draw(whole, 100, "stratified") == whole


def test_a_draw_depends_on_ids_and_seed_alone() -> None:
    whole = records({("a", 0): 30, ("a", 1): 70})
    for way in ("stratified", "random"):
        first = draw(whole, 20, way)
        assert [r.expression_id for r in whole if r in first] == [r.expression_id for r in first] and len(first) == 20
        assert {r.expression_id for r in draw(whole[::-1], 20, way)} == {r.expression_id for r in first}
        assert draw(whole, 20, way, seed=1) != first
    assert len({strata(draw(whole, 20, "random", seed))["a", 0] for seed in range(20)}) > 3  # no strata: the number varies


@pytest.mark.parametrize(("number", "way", "message"), [(0, "random", "a sample of 0"), (101, "random", "101"), (5, "even", "stratified")])
def test_what_cannot_be_drawn_is_refused(number: int, way: str, message: str) -> None:
    with pytest.raises(GrexError, match=message):
        draw(records({("a", 1): 100}), number, way)


@pytest.mark.usefixtures("without_java")
def test_predict_and_score_a_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_dataset(tmp_path / "d")
    words = ["predict", "--model", "oracle", "--data", f"{tmp_path / 'd'}", "--split", "val", "--out", f"{tmp_path / 'x.jsonl'}"]
    assert main([*words, "--limit", "8", "--sample", "stratified"]) == 0
    sample = load_dataset(tmp_path / "x.data")
    assert Counter(len(record.targets) for record in sample.expressions) == {0: 2, 1: 2, 2: 2, 3: 2}
    assert sample.info["sample"] == {"folder": "d", "way": "stratified", "number": 8, "seed": 0, "of": 20, "split": "val"}
    lines = read_lines(tmp_path / "x.jsonl")
    assert sum("expression_id" in line for line in lines) == 8
    said = ["score", f"{tmp_path / 'x.jsonl'}", "--data", f"{tmp_path / 'x.data'}", "--split", "val", "--out", f"{tmp_path / 'x.json'}"]
    assert main(said) == 0
    assert json.loads((tmp_path / "x.json").read_text())["results"]["strict"]["gres"]["gIoU"] == 1
    (tmp_path / "x.jsonl").unlink()
    assert main([*words, "--limit", "9", "--sample", "stratified"]) == 2  # another sample than the one that lies there
    assert "holds other data than this sample" in capsys.readouterr().err
    assert main([*words, "--sample", "stratified"]) == 2 and "--limit" in capsys.readouterr().err
    assert main([*words, "--dry-run"]) == 2 and "a model that is asked" in capsys.readouterr().err
    assert main([*words, "--base-url", "http://localhost:1/v1"]) == 2 and "--base_url with oracle" in capsys.readouterr().err
