"""Results by source, by kind and by number of targets, and their mean over sources: numbers by hand, for grounding and generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from score_case import PROTOCOLS, answer, generation, make_dataset, object_box, right_answers, write_lines

from grex_mllm.metrics import METRICS
from grex_mllm.report import tables
from grex_mllm.score import print_results, score
from grex_mllm.score.results import mean_of

pytestmark = pytest.mark.usefixtures("without_java")
NUM_SETS = {"refcoco": 3, "made": 12}  # image 0 is of refcoco, images 1 to 4 are of made; sets of one, two and three squares


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "data")


def texts() -> list[dict[str, Any]]:
    """Refcoco: one of three exact, re-ranked two. Made: nine of twelve exact (all but those of image 1), re-ranked all."""
    lines = []
    for i in range(5):
        for k in (1, 2, 3):
            right = k == 1 if i == 0 else i != 1
            line = generation(i, k, f"the {k} squares", "exact" if right else "wrong")
            better = {"expression": "squares", "status": "ok", "judgement": "wrong" if i == 0 and k == 3 else "exact"}
            trip = {"boxes_xyxy": [object_box(0)], "box_scores": [0.9], "no_target": False}
            lines.append(line | {"listener": better, "round_trip": trip})
    return lines


def run(data: Path, lines: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    return score(write_lines(data.parent / "predictions.jsonl", lines), data, "val", PROTOCOLS / "all.yaml", **options)


def test_grounding_by_source_and_the_mean_that_counts_each_source_the_same(data: Path) -> None:
    lines = right_answers()
    lines[0] = answer(0, 0, [0])  # refcoco: no target missed, three of four right
    lines[5] = answer(1, 1, [])  # made: a target rejected, fifteen of sixteen right
    results = run(data, lines)
    found = {name: both["strict"] for name, both in results["by_source"].items()}
    assert {name: block["gres"]["gIoU"] for name, block in found.items()} == {"refcoco": 3 / 4, "made": 15 / 16}
    assert {name: block["gres"]["N_acc"] for name, block in found.items()} == {"refcoco": 0.0, "made": 1.0}
    mean = results["mean_of_sources"]["strict"]
    assert mean["gres"]["gIoU"] == (3 / 4 + 15 / 16) / 2 != results["results"]["strict"]["gres"]["gIoU"] == 18 / 20
    assert mean["gres"]["N_acc"] == 0.5 and mean["gres"]["T_acc"] == (1 + 11 / 12) / 2
    assert mean["gres"]["num_samples"] == 20 and mean["count"]["accuracy"] == (3 / 4 + 15 / 16) / 2
    assert results["mean_of_sources"]["official"]["gres"]["gIoU"] == (3 / 4 + 15 / 16) / 2


def test_generation_by_source_kind_and_number(data: Path) -> None:
    results = run(data, texts())
    greg = {name: both["strict"]["greg"] for name, both in results["by_source"].items()}
    assert {name: block["all"]["num_samples"] for name, block in greg.items()} == NUM_SETS
    assert {name: block["all"]["correct"] for name, block in greg.items()} == {"refcoco": 1 / 3, "made": 9 / 12}
    assert {name: block["listener"]["all"]["correct"] for name, block in greg.items()} == {"refcoco": 2 / 3, "made": 1.0}
    assert "METEOR" not in greg["made"]["all"], "texts are compared within the whole corpus alone"
    mean = results["mean_of_sources"]["strict"]["greg"]
    assert mean["all"]["correct"] == pytest.approx((1 / 3 + 3 / 4) / 2) and mean["all"]["num_samples"] == 15
    assert mean["listener"]["all"]["correct"] == pytest.approx((2 / 3 + 1) / 2)
    assert "judgements" not in mean["all"] and results["results"]["strict"]["greg"]["all"]["judgements"]["exact"] == 10
    kinds = {name: block["greg"]["all"]["correct"] for name, block in results["by_tag"].items()}
    assert kinds == {"attribute": 4 / 5, "counting": 6 / 10}
    numbers = {name: block["greg"]["all"]["round_trip_Pr@F1"] for name, block in results["by_num_targets"].items()}
    assert numbers == {"1": 1.0, "2": 0.0, "3+": 0.0}


def test_a_source_whose_sets_have_no_answer_counts_as_wrong(data: Path) -> None:
    results = run(data, [line for line in texts() if line["image_id"] != "0"], allow_missing=True)
    assert results["by_source"]["refcoco"]["strict"]["greg"]["all"]["correct"] == 0.0
    assert results["mean_of_sources"]["strict"]["greg"]["all"]["correct"] == 9 / 24


def test_other_systems_stand_among_the_baselines(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = run(data, [answer(i, k, []) for i in range(5) for k in range(4)])
    words = run(data, texts())
    results = run(data, [*right_answers(), *texts()], beside={"nothing": none, "words": words}, show=True)
    assert list(results["baselines"]) == ["always_empty", "oracle", "nothing", "words"]
    assert results["baselines"]["nothing"]["gres"]["gIoU"] == 0.25 and "gres" not in results["baselines"]["words"]
    assert list(results["mean_of_sources"]) == ["strict", "official", "nothing", "words"]
    printed = capsys.readouterr().out
    assert "mean of sources, nothing" in printed and "by group" in printed and "source refcoco" in printed
    page = tables.breakdown(results["mean_of_sources"], "mean", set(METRICS))
    assert "exact set, listener" in page and "87.5" not in page and "83.3" in page
    print_results(run(data, right_answers()))


def test_the_mean_leaves_out_what_a_block_does_not_have() -> None:
    blocks = [{"gres": {"num_samples": 2, "N_acc": None, "gIoU": 0.25, "confusion": [[1]]}}, {"gres": {"num_samples": 6, "N_acc": 0.5}}]
    assert mean_of(blocks) == {"gres": {"num_samples": 8, "N_acc": 0.5, "gIoU": 0.25}}
    assert mean_of([{"N_acc": None}, {"N_acc": None}]) == {"N_acc": None} and mean_of([]) == {}
