"""The worked example of a metric: named by its dotted path, it gets its rules, results, columns, intervals and place in the report."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from score_case import HEIGHT, WIDTH, answer, make_dataset, read_lines, right_answers, write_lines

from grex_mllm.compare import compare
from grex_mllm.error_analysis import errors
from grex_mllm.errors import GrexError
from grex_mllm.report import write_report
from grex_mllm.score import score
from grex_mllm.score.protocol import load_protocol
from grex_mllm.score.table import print_results, table_rows, wide_console

NAME = "examples.metric_example"
DIAGONAL = math.hypot(WIDTH, HEIGHT)


def write_protocol(folder: Path, rules: str) -> Path:
    path = folder / "own.yaml"
    path.write_text(f"name: own\nversion: 1\ntasks:\n  grec: {{}}\n  {NAME}: {{{rules}}}\n", encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two runs: `good` answers everything right, `bad` is 20 pixels off once (1-1), gives no box (0-1) and no answer (2-1)."""
    data, protocol = make_dataset(tmp_path / "data"), write_protocol(tmp_path, "unit: pixels")
    lines = right_answers()
    lines[1], lines[5] = answer(0, 1, []), answer(1, 1, [2])
    lines[9] = {"expression_id": lines[9]["expression_id"], "status": "refused"}
    for name, chosen in (("good", right_answers()), ("bad", lines)):
        (tmp_path / name).mkdir()
        path = write_lines(tmp_path / name / "predictions.jsonl", chosen)
        score(path, data, "val", protocol, tmp_path / name / "results.json", per_sample=True, num_processes=1)
    return tmp_path


def expected(folder: Path, run: str) -> float:
    """By hand: of several targets the best box (the last one, as all scores are equal) lies 5 or 10 pixels off their middle."""
    errors = [0.0, 5.0, 10.0] * 5
    if run == "bad":
        errors[0], errors[3], errors[6] = DIAGONAL, 20.0, DIAGONAL
    return sum(errors) / len(errors)


def test_results_hold_the_number_by_hand(folder: Path) -> None:
    for run in ("good", "bad"):
        results = score(folder / run / "predictions.jsonl", folder / "data", "val", folder / "own.yaml", num_processes=2)
        block = results["results"]["strict"][NAME]
        assert block["num_samples"] == 15
        assert block["centre_error"] == pytest.approx(expected(folder, run), abs=1e-12)
        assert block["centre_hit"] == (5 if run == "good" else 2) / 15, "4 pixels are a tenth of the diagonal: only single targets hit"
        assert results["by_num_targets"]["2"][NAME]["centre_error"] == 5.0
        assert f"{NAME}: 5 of 20 expressions have no target and are left out" in results["provenance"]["notes"]
        assert results["provenance"]["protocol"]["tasks"][NAME] == {"unit": "pixels", "hit_radius": 0.1}
    rows = read_lines(folder / "bad" / "results.samples.jsonl")
    assert rows[5]["strict"]["centre_error"] == 20.0 and "centre_error" not in rows[0]["strict"]


def test_rules_are_checked_and_change_the_number(folder: Path) -> None:
    path = write_protocol(folder, "unit: diagonal, hit_radius: 0.3")
    block = score(folder / "bad" / "predictions.jsonl", folder / "data", "val", path)["results"]["strict"][NAME]
    assert block["centre_error"] == pytest.approx(expected(folder, "bad") / DIAGONAL)
    assert block["centre_hit"] == 12 / 15
    for rules, words in (
        ("unti: pixels", 'did you mean "unit"'),
        ("unit: metres", "one of pixels, diagonal"),
        ("hit_radius: big", "a number"),
    ):
        with pytest.raises(GrexError, match=words):
            load_protocol(write_protocol(folder, rules))
    (folder / "own.yaml").write_text("name: own\nversion: 1\ntasks: {examples.no_such_metric: {}}")
    with pytest.raises(GrexError, match="PYTHONPATH"):
        load_protocol(folder / "own.yaml")


def test_its_columns_stand_in_the_printed_table(folder: Path) -> None:
    results = score(folder / "bad" / "predictions.jsonl", folder / "data", "val", folder / "own.yaml")
    cells = dict(table_rows(results))["strict"]
    assert (cells["centre error"], cells["centre hit"]) == (f"{expected(folder, 'bad'):.3f}", "13.33")
    console = wide_console()
    with console.capture() as printed:
        print_results(results, console)
    assert "centre error" in printed.get() and f"{expected(folder, 'bad'):.3f}" in printed.get()


def test_compare_shows_it_with_paired_intervals(folder: Path) -> None:
    text = compare([folder / name / "results.json" for name in ("good", "bad")], published=False, num_draws=200, metrics=[NAME])
    table = text.split(f"**made val: {NAME}, strict**")[1].split("**")[0]
    assert "| system | N | f0 | centre error | centre hit |" in table
    number = re.escape(f"{expected(folder, 'bad'):.3f}")
    found = re.search(rf"\| bad \| 15 \| - \| {number} \[(\d+\.\d+), (\d+\.\d+)\] \|", table)
    assert found is not None
    assert float(found[1]) < expected(folder, "bad") < float(found[2])
    difference = re.search(rf"\| bad - good \| {NAME} centre error \| (\S+) \| \[(\S+), (\S+)\] \| (.*) \|", text)
    assert difference is not None
    assert float(difference[1]) == pytest.approx(expected(folder, "bad") - expected(folder, "good"), abs=1e-3)
    assert float(difference[2]) <= float(difference[1]) <= float(difference[3])
    assert difference[4] in ("yes, worse", "no"), "a larger error is no better"


def test_the_report_shows_it(folder: Path) -> None:
    page = write_report(folder / "bad", published=None, protocol=folder / "own.yaml").read_text(encoding="utf-8")
    number = f"{expected(folder, 'bad'):.3f}"
    assert "<h3>Centres</h3>" in page
    assert f'<div class="name">centre error</div><div class="value">{number}</div>' in page
    assert page.count(number) >= 2, "the tile and the result table"
    assert '<th scope="col">centre error</th>' in page


def test_a_results_file_from_elsewhere_imports_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that only the file names stays out; its raw numbers are shown with a note."""
    (folder / "trap_metric.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    for run in ("good", "bad"):
        for file in (folder / run / "results.json", folder / run / "results.samples.jsonl"):
            file.write_text(file.read_text(encoding="utf-8").replace(NAME, "trap_metric.inner"), encoding="utf-8")
    paths = [folder / run / "results.json" for run in ("good", "bad")]
    text = compare(paths, num_draws=50)
    assert "| system | N | f0 | centre_error | centre_hit |" in text and "(--metric trap_metric.inner)" in text
    page = write_report(folder / "bad").read_text(encoding="utf-8")
    assert "<h3>trap_metric.inner</h3>" in page and "Raw numbers" in page and "centre error" in page
    assert "trap_metric" not in errors(paths[1], folder / "errors")
    with pytest.raises(SystemExit, match="imported"):
        compare(paths, metrics=["trap_metric.inner"])
