"""Results side by side, and where the points are lost."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from score_case import PROTOCOLS, answer, make_dataset, right_answers, write_lines

from grex_mllm.compare import Bootstrap, compare, published_tables, read_run
from grex_mllm.error_analysis import errors, outcome
from grex_mllm.errors import GrexError
from grex_mllm.score import score
from grex_mllm.shipped import PUBLISHED_FOLDER


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two runs on one dataset: `good` answers everything, `bad` makes one mistake of each kind."""
    data = make_dataset(tmp_path / "data")
    lines = right_answers()
    lines[0] = answer(0, 0, [0])
    lines[1] = answer(0, 1, [])
    lines[2] = answer(0, 2, [0])
    lines[5] = answer(1, 1, [2])
    lines[7] = {"expression_id": lines[7]["expression_id"], "status": "refused"}
    for name, chosen in (("good", right_answers()), ("bad", lines)):
        path = write_lines(tmp_path / f"{name}.jsonl", chosen)
        score(path, data, "val", PROTOCOLS / "all.yaml", tmp_path / name / "results.json", per_sample=True)
    return tmp_path


def both(folder: Path) -> list[Path]:
    return [folder / name / "results.json" for name in ("good", "bad")]


def test_markdown_holds_systems_dummies_intervals_and_published_rows(folder: Path) -> None:
    text = compare(both(folder), num_draws=200)
    assert "**made val: gres, strict**" in text
    assert "| good | 20 | 25.00 | 100.00 [100.00, 100.00] |" in text
    assert "| dummy: always_empty | 20 | 25.00 | 25.00 |" in text
    assert "by number of targets" in text
    assert "| bad - good | gres gIoU |" in text
    assert "GRES (CVPR 2023), table 5" in text
    assert "62.42" in text
    assert "62.42" not in compare(both(folder), published=False, num_draws=50)
    assert compare(both(folder), num_draws=200) == text


def test_latex_and_csv(folder: Path) -> None:
    tex = compare(both(folder), format="latex", published=False, num_draws=50)
    assert tex.count("\\begin{tabular}") == tex.count("\\end{tabular}") > 3
    assert "always\\_empty" in tex
    rows = list(csv.reader(compare(both(folder), format="csv", published=False, num_draws=50).splitlines()))
    assert rows[1][:3] == ["system", "N", "f0"]
    with pytest.raises(GrexError, match="format"):
        compare(both(folder), format="html")


def test_intervals_are_paired(folder: Path) -> None:
    runs = [read_run(path) for path in both(folder)]
    draws = Bootstrap(runs, 400, 0)
    low, high = draws.interval("bad", "gres", "strict", "gIoU") or (0, 0)
    value = runs[1].results["results"]["strict"]["gres"]["gIoU"]
    assert low < value < high
    difference = draws.interval("bad", "gres", "strict", "gIoU", "good") or (0, 0)
    assert difference == pytest.approx((low - 1, high - 1))  # `good` is 1 in every draw: only a paired difference keeps the width
    ious = np.array([row["strict"]["iou"] for row in runs[1].rows.values()])
    assert high - low == pytest.approx(2 * 1.96 * ious.std() / np.sqrt(len(ious)), rel=0.25)


def test_protocols_must_agree_unless_told(folder: Path) -> None:
    path = folder / "bad" / "results.json"
    results = json.loads(path.read_text())
    results["provenance"]["protocol"]["version"] = 2
    path.write_text(json.dumps(results))
    with pytest.raises(GrexError, match="all v1, bad: all v2"):
        compare(both(folder))
    assert "bad" in compare(both(folder), any_protocol=True, num_draws=50)


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(GrexError, match="do not exist"):
        compare([tmp_path / "x.json"])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(GrexError, match="is no results"):
        compare([tmp_path / "x.json"])


def test_every_published_row_names_its_source() -> None:
    tasks = set()
    for file in PUBLISHED_FOLDER.glob("*.json"):
        for table in json.loads(file.read_text())["tables"]:
            tasks.add(table["task"])
            assert table["source"]
            assert table["paper"]
            for row in table["rows"]:
                assert row["method"]
                assert row["split"]
                assert all(0 <= v <= 100 for v in row["values"].values())
    assert {"gres", "grec", "greg", "res", "rvos"} <= tasks
    assert all(
        len(row) == len(table.header) for table in published_tables(tasks - {"gres_ablation", "grec_ablation"}) for row in table.rows
    )


def test_errors_name_every_loss_and_draw_it(folder: Path) -> None:
    text = errors(folder / "bad" / "results.json", folder / "errors", data=folder / "data", predictions=folder / "bad.jsonl")
    found = json.loads((folder / "errors" / "errors.json").read_text())["outcomes"]
    counts = {name: entry["count"] for name, entry in found.items() if entry["count"]}
    assert counts == {"unanswered": 1, "no_target_missed": 1, "target_rejected": 1, "wrong_count": 1, "wrong_instance": 1, "right": 15}
    results = json.loads((folder / "bad" / "results.json").read_text())["results"]["strict"]
    assert sum(entry["gIoU_lost"] for entry in found.values()) == pytest.approx(1 - results["gres"]["gIoU"])
    assert sum(entry["Pr@F1_lost"] for entry in found.values()) == pytest.approx(1 - results["grec"]["Pr@F1"])
    assert found["wrong_instance"]["examples"] == ["made:1-1"]
    assert (folder / "errors" / "wrong_instance.png").stat().st_size > 1000
    assert "| wrong_count | 1 | 5.00 |" in text
    plot = ElementTree.parse(folder / "errors" / "calibration.svg")
    assert len(plot.findall(".//{http://www.w3.org/2000/svg}circle")) > 10
    (folder / "good" / "results.samples.jsonl").unlink()
    with pytest.raises(GrexError, match="--per-sample"):
        errors(folder / "good" / "results.json", folder / "errors")


def test_errors_tell_what_a_threshold_would_give(folder: Path) -> None:
    text = errors(folder / "bad" / "results.json", folder / "errors")
    found = json.loads((folder / "errors" / "errors.json").read_text())["selection"]
    assert (found["num_samples"], found["num_without"]) == (19, 1)  # one answer was refused
    # sure of "no target" with 0.9 or of a target with 0.8: of 5 answers without objects one is wrong (0-1), of the other 14 one (0-0)
    decision = found["decision"]
    assert decision["risk"] == pytest.approx(2 / 19)
    risks = [1 / 5] * 5 + [(1 + (k - 5) / 14) / k for k in range(6, 20)]
    assert decision["AURC"] == pytest.approx(sum(risks) / 19)
    assert decision["curve"][-1] == {"coverage": 1.0, "risk": pytest.approx(2 / 19)}
    rows = [json.loads(line) for line in (folder / "bad" / "results.samples.jsonl").read_text().splitlines()]
    assert found["mask"]["risk"] == pytest.approx(np.mean([1 - row["strict"]["iou"] for row in rows if row["status"] == "ok"]))
    at = {entry["threshold"]: entry for entry in found["thresholds"]}
    assert (at[0.5]["N_acc"], at[0.5]["T_acc"]) == (4 / 5, 13 / 14)
    assert (at[0.0]["N_acc"], at[0.0]["T_acc"], at[1.0]["N_acc"], at[1.0]["T_acc"]) == (1.0, 0.0, 0.0, 1.0)
    assert "| 0.50 | 80.00 | 92.86 |" in text and "risk-coverage, wrong target/no-target decisions" in text
    plot = ElementTree.parse(folder / "errors" / "risk_coverage.svg")
    drawn = [element.text or "" for element in plot.iter("{http://www.w3.org/2000/svg}text")]
    assert any(words.startswith("wrong no-target decisions (area") for words in drawn) and "coverage" in drawn and "risk" in drawn
    before = (folder / "errors" / "errors.json").read_bytes(), (folder / "errors" / "risk_coverage.svg").read_bytes()
    samples = folder / "bad" / "results.samples.jsonl"
    samples.write_text("".join(line + "\n" for line in reversed(samples.read_text().splitlines())))
    errors(folder / "bad" / "results.json", folder / "errors")
    assert (
        before[0] == (folder / "errors" / "errors.json").read_bytes()
        and before[1] == (folder / "errors" / "risk_coverage.svg").read_bytes()
    )


def test_errors_without_probabilities_tell_nothing_of_thresholds(folder: Path) -> None:
    lines = [{key: value for key, value in line.items() if key != "no_target_prob"} for line in right_answers()]
    score(write_lines(folder / "plain.jsonl", lines), folder / "data", "val", PROTOCOLS / "all.yaml", folder / "plain" / "results.json",
          per_sample=True)  # fmt: skip
    assert "threshold" not in errors(folder / "plain" / "results.json", folder / "none")
    assert "selection" not in json.loads((folder / "none" / "errors.json").read_text())
    assert not (folder / "none" / "risk_coverage.svg").exists()


def test_outcome_of_masks_alone() -> None:
    row = {"status": "ok", "num_targets": 1, "strict": {"no_target": False, "iou": 0.3}}
    assert outcome(row) == "poor_mask"
    assert outcome(row | {"strict": {"no_target": False, "iou": 0.7}}) == "rough_mask"
    assert outcome(row | {"strict": {"no_target": False, "iou": 0.05}}) == "wrong_instance"
    assert outcome(row | {"strict": {"no_target": True, "iou": 0.0}}) == "target_rejected"
