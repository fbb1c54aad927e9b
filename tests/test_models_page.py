"""One page for several models, and what is counted of models that were asked in words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from score_case import PROTOCOLS, answer, generation, make_dataset, right_answers, write_lines
from test_report import HOSTILE, Page

from grex_mllm.cli import main
from grex_mllm.compare import compare
from grex_mllm.errors import GrexError
from grex_mllm.predictors.protocol import costs_file
from grex_mllm.report.models import write_models_page
from grex_mllm.score import score
from grex_mllm.score.asked import Asked


def asked(line: dict[str, Any], by: str, text: str, flags: tuple[str, ...] = ()) -> dict[str, Any]:
    raw = [{"step": "locate", "text": text, "finish": "stop", "usage": {"prompt_tokens": 100, "completion_tokens": 7}}]
    line = {key: value for key, value in line.items() if key not in ("mask_rle_input", "no_target_prob")}
    return line | {"raw": raw, "by": by} | ({"flags": list(flags)} if flags else {})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def runs(place: Path) -> list[Path]:
    """Two models that were asked, one of them wrong and unreadable here and there; and a trained one."""
    tmp_path, data = place, make_dataset(place / "data")
    good, bad = right_answers(), right_answers()
    bad[1], bad[6] = answer(0, 1, []), answer(1, 2, [2])
    bad[3] = {"expression_id": bad[3]["expression_id"], "status": "unparsable", "reason": "no box"}
    bad[5] = {"expression_id": bad[5]["expression_id"], "status": "refused", "reason": "no"}
    texts = [generation(i, k, HOSTILE) for i in range(5) for k in (1, 2, 3)]
    found = {
        "one": [asked(line, "qwen, native+box", "[]") for line in good] + [asked(line, "qwen, native+box", "x") for line in texts],
        "two": [asked(line, "gpt, uniform+box", "{}", ("clipped",)) for line in bad]
        + [asked(line | {"expression": "squares"}, "gpt, uniform+box", "squares") for line in texts],
        "trained": [{k: v for k, v in line.items() if k != "mask_rle_input"} for line in right_answers()]
        + [generation(i, k, "the squares") for i in range(5) for k in (1, 2, 3)],
    }
    made = []
    for name, lines in found.items():
        path = write_lines(tmp_path / f"{name}.jsonl", lines)
        if name == "one":
            spent = {"calls": 2, "cached": 1, "seconds": 3.0, "cost": 0.5, "cached_tokens": 4}
            costs_file(path).write_text((json.dumps({"task": "ground", **spent}) + "\n") * 20 + '{"task": "gro', encoding="utf-8")
        made.append(tmp_path / f"{name}.json")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("grex_mllm.metrics.language.java_missing", lambda: "left out: it takes seconds")
            score(path, data, "val", PROTOCOLS / "all.yaml", made[-1], per_sample=True)
    return made


def test_answers_are_counted_by_kind(runs: list[Path]) -> None:
    one, two, trained = (json.loads(path.read_text())["provenance"]["predictions"] for path in runs)
    assert "asked" not in trained and one["by"] == ["qwen, native+box"]
    assert one["asked"]["ground"]["shares"] == {"boxes": 0.75, "no_target": 0.25} and one["asked"]["generate"]["shares"] == {"text": 1.0}
    assert two["asked"]["ground"]["shares"] == {"boxes": 0.6, "no_target": 0.3, "refused": 0.05, "unparsable": 0.05}
    assert two["asked"]["ground"]["flags"] == {"clipped": 20} and two["asked"]["ground"]["num_calls"] == 20
    assert two["asked"]["ground"]["num_prompt_tokens"] == 2000 and "spent" not in two["asked"]["ground"]
    assert one["asked"]["ground"]["spent"] == {"calls": 40.0, "cached": 20.0, "seconds": 60.0, "cost": 10.0, "cached_tokens": 80.0}


def test_a_line_that_is_no_answer_of_a_server_counts_as_it_stands() -> None:
    tally = Asked()
    for line in ({"raw": "x"}, {"raw": [7, {"usage": 3}], "expression_id": "a", "status": "error"}, {"by": 3}):
        tally.add(line)
    assert tally.provenance()["asked"]["ground"]["shares"] == {"error": 1.0} and tally.provenance()["by"] == ["3"]


def test_page_holds_models_shares_costs_disagreements_and_published_rows(runs: list[Path], place: Path, tmp_path: Path) -> None:
    page = Page(write_models_page(runs, tmp_path / "m.html", data=place / "data", num_draws=50).read_text(encoding="utf-8"))
    for text in ("one (qwen, native+box)", "two (gpt, uniform+box)", "unparsable", "clipped 20", "Where they disagree", "GPT-4o mini"):
        assert text in page.text, text
    assert "4 of 20 expressions are answered differently" in page.text
    assert "15 of 15 object sets are described differently" in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 2 * 4 + 12  # cards of two images: truth and three answers; and of sets
    assert not any(tag == "script" and "alert" in str(attributes) for tag, attributes in page.tags) and "alert(1)" in page.text
    assert "1.50" in page.text and "0.250000" in page.text  # 60 s and 10 for 40 calls; one call a sample


def test_the_best_of_a_column_is_marked(runs: list[Path], tmp_path: Path) -> None:
    """gIoU: two models are right everywhere, one is not; a dummy is never marked, though the oracle is as good."""
    html = write_models_page(runs, tmp_path / "m.html", published=False, num_draws=5).read_text(encoding="utf-8")
    first = {name: cell for name, cell in re.findall(r'<tr[^>]*><th scope="row">([^<]*)</th><td>(.*?)</td>', html.partition("</table>")[0])}
    assert first["one (qwen, native+box)"] == first["trained"] == "<b>100.0</b>" and first["dummy: oracle"] == "100.0"
    assert re.fullmatch(r"\d\d\.\d", first["two (gpt, uniform+box)"])


def test_command(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", *map(str, runs), "--out", str(tmp_path / "c.html")]
    assert main([*words, "--format", "html"]) == 0
    assert "No pictures" in (tmp_path / "c.html").read_text(encoding="utf-8")
    assert main([*words, "--format", "csv", "--data", str(tmp_path)]) == 2
    assert "--format html, whose pictures need it" in capsys.readouterr().err


def test_spread_of_one_model_over_prompts(runs: list[Path], tmp_path: Path) -> None:
    """`two` under the name of `one`'s model: 20 expressions, of which 16 and 20 are right."""
    other = json.loads(runs[1].read_text())
    other["provenance"]["predictions"]["by"] = ["qwen, uniform+box"]
    (tmp_path / "two.json").write_text(json.dumps(other))
    text = compare([runs[0], tmp_path / "two.json", runs[2]], spread=True, published=False, num_draws=20)
    block = text.partition("**qwen: grec, strict, over 2 runs**")[2].partition("**")[0]
    rows = {row[1]: row[2:] for row in (list(map(str.strip, line.split("|"))) for line in block.splitlines() if line.startswith("|"))}
    place = rows[""].index("Pr@F1")
    assert [rows[name][place] for name in ("mean", "standard deviation", "least", "most")] == ["90.00", "14.14", "80.00", "100.00"]
    assert "runs: one, two" in block and "over 3 runs" not in text


def test_results_of_two_splits_are_refused(runs: list[Path], tmp_path: Path) -> None:
    other = json.loads(runs[0].read_text())
    other["provenance"]["dataset"]["split"] = "test"
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(GrexError, match="one dataset and split"):
        write_models_page([runs[1], tmp_path / "other.json"], tmp_path / "m.html")
    assert not (tmp_path / "m.html").exists()
