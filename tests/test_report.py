"""The report of a made-up run: complete, self-contained, safe against hostile text, and right about its cases."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_run import SIDE, answer_line, index_sample, make_run, make_sample, write_log
from PIL import Image

from grex_mllm.errors import GrexError
from grex_mllm.ops.masks import encode_rle
from grex_mllm.report import cases, curves, tables, write_report
from grex_mllm.report.run_files import LogSeries, read_run
from grex_mllm.types import ExpressionRecord, Sample

HOSTILE = '<script>alert(1)</script> "><img src=x onerror=alert(2)> \u202e reversed & </q>'


class Page(HTMLParser):
    """Collect tags, attributes and the texts outside script and style; check that tags nest."""

    VOID = frozenset({"meta", "img", "input", "line", "circle", "path", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def page_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = make_run(tmp_path_factory.mktemp("runs") / "demo")
    return write_report(run, index_sample, num_cases=4).read_text(encoding="utf-8")


def test_page_is_whole_and_fetches_nothing(page_text: str) -> None:
    page = Page(page_text)
    assert {"summary", "results", "breakdown", "curves", "grounding", "generation", "configuration"} <= {
        a.get("id") for a in page.attributes("section")
    }
    targets = [a["href"] for a in page.attributes("a")]
    assert all(target and target.startswith("#") for target in targets)
    sources = [a["src"] for a in page.attributes("img")]
    assert len(sources) >= 4 * 2 * 3 and all(source and source.startswith("data:image/") for source in sources)
    assert not page.attributes("link") and not page.attributes("iframe")
    assert [attrs for attrs in page.attributes("script") if "src" in attrs] == []
    assert not re.search(r"(?:https?:)?//[a-z]|@import|url\(", re.sub(r"data:image/[^\"]+", "", page_text))
    policies = [a["content"] for a in page.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies and "default-src 'none'" in str(policies[0]) and "sha256-" in str(policies[0])


def test_the_page_tells_how_its_model_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a model: a command and a link, and no path of this machine."""
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "my runs" / "a & b")
    assert "grex serve" not in write_report(run).read_text(encoding="utf-8")
    (run / "model.safetensors").write_bytes(b"")
    for given, command in ((run, "grex serve --model 'a & b'"), (run.relative_to(tmp_path), "grex serve --model 'my runs/a & b'")):
        text = write_report(given).read_text(encoding="utf-8")
        page = Page(text)
        assert command in page.text and str(tmp_path) not in text
        assert [a["href"] for a in page.attributes("a") if not str(a["href"]).startswith("#")] == ["http://127.0.0.1:8000/"]


def test_pictures_have_words_and_decode(page_text: str) -> None:
    import base64
    import io

    pictures = Page(page_text).attributes("img")
    assert len(pictures) > 1
    for attrs in pictures:
        assert attrs.get("alt") and attrs.get("width") and attrs.get("height")
        with Image.open(io.BytesIO(base64.b64decode(str(attrs["src"]).split(",", 1)[1]))) as picture:
            assert picture.size == (int(str(attrs["width"])), int(str(attrs["height"])))


def test_numbers_stand_in_the_page(page_text: str) -> None:
    text = Page(page_text).text
    assert "80.8" in text, "gIoU 0.85 * 0.95 in percent"
    assert "22.6" in text and "always empty" in text and "oracle" in text
    assert "exact set, greedy95.0" in text and "exact set, listener97.0" in text
    assert "no answer" not in text and "ok 1,500" in text
    assert "instance_selection" in text and "0123abc" in text
    assert "METEOR: no Java runtime found" in text and "a note of the scorer" in text, "a metric that was not computed must say why"
    assert re.search(r"1 of \d+ lines are no JSON object", text), "the torn log line is reported"


def test_curves_show_both_tasks_and_both_axes(page_text: str) -> None:
    labels = [str(a["aria-label"]) for a in Page(page_text).attributes("svg")]
    for name in ("mask of grounding", "box_giou of grounding", "lm of generation", "total of generation"):
        assert {"linear", "logarithmic"} <= {
            "logarithmic" if "logarithmic" in label else "linear" for label in labels if label.startswith(name)
        }
    assert any(label.startswith("learning rate 0") for label in labels)
    numbers = re.findall(r'd="M([^"]+)"', page_text)
    assert numbers and all(math.isfinite(float(number)) for path in numbers for number in re.split(r"[ L]", path))


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>run", num_images=3)

    def hostile(image_id: str) -> Sample:
        sample = index_sample(image_id)
        for record in sample.expressions:
            record.expression = record.raw = HOSTILE
            record.tags = [HOSTILE]
        return sample

    text = write_report(run, hostile, num_cases=3).read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.attributes("script")) == 1 and not page.attributes("b")[0]
    assert "<script>alert" not in text and "<img src=x" not in text and "\u202e" not in text
    assert all(not any(name.startswith("on") for name in attrs) for _, attrs in page.tags)
    assert "alert(1)" in page.text, "the expression itself is still readable"


def test_long_and_empty_expressions_fit(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_images=2)

    def odd(image_id: str) -> Sample:
        sample = index_sample(image_id)
        sample.expressions[0].raw = "long " * 1000
        sample.expressions[1].raw = sample.expressions[1].expression = "  "
        return sample

    text = Page(write_report(run, odd, num_cases=6).read_text(encoding="utf-8")).text
    assert "(5,000 characters)" in text and "long " * 100 not in text and "(empty)" in text


def test_missing_parts_are_said_not_fatal(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(GrexError, match="holds no config"):
        write_report(run)
    with pytest.raises(GrexError, match="expected an existing folder"):
        write_report(tmp_path / "absent")
    write_log(run, 5)
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "results.json is not there" in text and "predictions.jsonl is not there" in text and "config.yaml is not there" in text
    assert sorted(file.name for file in run.iterdir()) == ["log.jsonl", "report.html"]


def test_samples_that_cannot_be_shown_are_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_images=4)

    def broken(image_id: str) -> Sample:
        if image_id == "2":
            raise GrexError("image 2 is truncated; expected a whole JPEG; fetch it again")
        return index_sample(image_id)

    text = Page(write_report(run, broken, num_cases=2).read_text(encoding="utf-8")).text
    assert "1 of 4 images could not be shown" in text and "image 2 is truncated" in text


def test_cases_are_scored_by_the_strict_rules() -> None:
    sample = make_sample(0)
    one, nothing, everything = sample.expressions
    right = answer_line(sample, everything.targets, 1.0, random.Random(0))
    exact = right | {"mask_rle": encode_rle(cases.union_mask(sample.record, everything.targets))}  # type: ignore[arg-type]
    empty = {"mask_rle": encode_rle(np.zeros((SIDE, SIDE), bool)), "boxes_xyxy": [], "no_target": False}

    def scores(record: ExpressionRecord, line: dict[str, Any]) -> tuple[float | None, float | None]:
        case = cases.judge_grounding(sample, record, line)
        return case.iou, case.f1

    assert scores(everything, exact) == (1.0, 1.0)
    assert scores(everything, exact | {"no_target": True}) == (0.0, 0.0)
    assert scores(nothing, empty) == (1.0, 1.0), "an empty mask says: nothing"
    assert scores(nothing, exact) == (0.0, 0.0)
    assert scores(one, empty) == (0.0, 0.0)
    area = np.count_nonzero(cases.union_mask(sample.record, one.targets))  # type: ignore[arg-type]
    whole = scores(one, {"mask_rle": encode_rle(np.ones((SIDE, SIDE), bool)), "no_target": False})
    assert whole == (pytest.approx(area / SIDE**2), None), "without boxes there is no F1"


def test_worst_are_the_worst_and_spread_over_tags() -> None:
    made = [cases.GroundingCase("0", str(n), n / 40, None, 0.0, ["often" if n < 30 else f"rare{n % 4}"]) for n in range(40)]
    chosen = cases.worst(made, 8)
    assert len(chosen) == 8 and chosen[0].score == 0.0
    assert sum(case.tags == ["often"] for case in chosen) == 2
    assert [case.score for case in chosen] == sorted(case.score for case in chosen)
    assert cases.worst([cases.GroundingCase("0", "0", 1.0, 1.0, 0.0, [])], 4) == [], "a perfect case is no bad case"
    assert len(cases.worst(made[:30], 8)) == 8, "one tag alone fills the sheet"


def test_log_is_read_after_a_resume(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "loss/ground/mask": 5.0, "lr/0": 0.1},
        {"step": 1, "loss/ground/mask": 4.0},
        {"step": 2, "task": "generate", "loss/lm": 2.0, "expressions_per_s": 7},
        {"step": 3, "loss/ground/mask": float("nan")},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(tmp_path)
    assert {(s.task, s.name): s.points for s in run.losses} == {("grounding", "mask"): [(1, 4.0)], ("generation", "lm"): [(2, 2.0)]}
    assert {s.name for s in run.rates} == {"learning rate 0", "expressions_per_s"}


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0, 2.0], [0.0, 0.0], [1e-9, 1e9], [-3.0, -2.0, 5.0], [1e5] + [1.0] * 300])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_charts_survive_any_numbers(values: list[float], logarithmic: bool) -> None:
    svg = curves.chart(LogSeries("grounding", "mask", list(enumerate(values))), "grounding", logarithmic)
    if not logarithmic or max(values) > 0:
        numbers = [float(number) for path in re.findall(r'd="M([^"]+)"', svg) for number in re.split(r"[ L]", path)]
        assert numbers and all(-20 <= number <= curves.WIDTH for number in numbers)
    else:
        assert svg == ""


def test_ticks_are_round_and_inside() -> None:
    assert curves.linear_ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1.0]
    assert curves.linear_ticks(0, 8000) == [0, 2000, 4000, 6000, 8000]
    assert curves.log_ticks(0.01, 10) == pytest.approx([0.01, 0.1, 1, 10])
    assert all(0.2 <= tick <= 0.9 for tick in curves.log_ticks(0.2, 0.9))


def test_thinning_keeps_spikes() -> None:
    points = [(float(n), 1.0) for n in range(10_000)]
    points[5_432] = (5_432.0, 99.0)
    thinned = curves.thin(points)
    assert len(thinned) <= curves.MAX_RAW_POINTS and (5_432.0, 99.0) in thinned


def test_published_rows_are_labelled_as_other_data(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_images=1)
    published = tmp_path / "published"
    published.mkdir()
    table = {"task": "gres", "dataset": "gRefCOCO", "source": "GRES, CVPR 2023, table 5"}
    rows = [
        {"method": "ReLA", "split": "val", "values": {"gIoU": 12.34, "cIoU": 62.42}},
        {"method": "ReLA", "split": "testA", "values": {"gIoU": 45.67}},
    ]
    (published / "gres.json").write_text(json.dumps(table | {"rows": rows}))
    text = write_report(run, published=published).read_text(encoding="utf-8")
    assert "45.67" not in text, "one split is enough here"
    assert text.count("12.34") == 1 and "Other data: gRefCOCO, as published" in text and "not comparable" in text


def test_tables_take_protocols_or_none() -> None:
    flat = {"gres": {"gIoU": 0.5}}
    assert tables.protocol_block(flat) == tables.protocol_block({"strict": flat}) == flat
    assert tables.protocol_block(flat, "official") == {}


def test_unselected_cases_lie_at_even_distances(tmp_path: Path) -> None:
    assert cases.spread(list(range(10)), 3) == [1, 5, 8] and cases.spread([1, 2], 3) == [1, 2]
    run = make_run(tmp_path / "run", num_images=12)
    text = write_report(run, index_sample, num_cases=1, num_unselected=4).read_text(encoding="utf-8")
    page = Page(text)
    assert "Unselected" in page.text and "Random" not in page.text and "not chosen" in page.text
    found = cases.scan(read_run(run), index_sample, [key[0] for key in read_run(run).generation], 2000, 0)
    shown = [f"{case.image_id}: {', '.join(case.key[1])}" for case in cases.spread(found.generation, 4)]
    assert len(shown) == 4 and all(name in page.text for name in shown)
