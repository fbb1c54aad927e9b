"""Text metrics: published numbers on real expressions, any text, subsets, no Java."""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from pathlib import Path

import pytest

from grex_mllm.errors import GrexError
from grex_mllm.metrics import GREG, language, spice

STRANGE = ["", "\n", "a \"quoted\" 'one'", "the man\non the left", "a ||| b", "|||", "😀", "the 😀 man", "x" * 10_000, "the " * 2500]
STRANGE += ["\ud83d bad", "\u2028 line \x85 break \x00", "-", "(left) man", "don't", "человек слева", "a\tb\r\nc"]

needs_java = pytest.mark.skipif(bool(language.java_missing()), reason=language.NEEDS_JAVA)


@needs_java
def test_published_numbers_and_any_text(shared: Path) -> None:
    """One Java run for both: the published testA numbers (to all printed digits), beside texts that break line protocols."""
    references: dict[int, list[str]] = {}
    for item in json.loads((shared / "data" / "reg_gold" / "references" / "testA.json").read_text())["items"]:
        references.setdefault(int(item["mask"].split("/")[-1].split("_")[1]), []).append(item["text"])
    generated = {
        p["ref_id"]: p["sent"]
        for p in json.loads((shared / "data" / "reg_gold" / "sample_expressions_testA.json").read_text())["predictions"]
    }
    pairs = [(text, references[ref]) for ref, text in generated.items() if ref in references]
    expressions = [text for text, _ in pairs] + STRANGE + ["the man"] * len(STRANGE)
    wanted = [group for _, group in pairs] + [["the man on the left", 'left guy ||| "x"\n']] * len(STRANGE) + [[s] for s in STRANGE]
    subsets = {"gold": list(range(len(pairs))), "strange": list(range(len(pairs), len(expressions)))}
    scores = language.score_texts(expressions, wanted, subsets)
    assert scores["gold"]["num_samples"] == 1975
    printed = {"BLEU-1": 0.480, "BLEU-2": 0.293, "BLEU-3": 0.182, "BLEU-4": 0.080, "METEOR": 0.172, "ROUGE-L": 0.414, "CIDEr": 0.669}
    assert {name: round(scores["gold"][name], 3) for name in printed} == printed
    assert all(0 <= scores["strange"][name] <= 10 for name in printed)


@needs_java
def test_tokens_are_those_of_the_toolkit_and_lines_stay_apart() -> None:
    texts = ["The man, on the LEFT!", "", "a\nb", "don't", "person (left)", "\u2028"]
    assert language.ptb_tokens(texts) == ["the man on the left", "", "a b", "do n't", "person -lrb- left -rrb-", ""]
    assert language.ptb_tokens([]) == []


def test_without_java_nothing_is_invented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "java_missing", lambda: language.NEEDS_JAVA)
    metric = GREG()
    metric.update("left man", ["left man"])
    result = metric.compute()["all"]
    assert all(result[name] is None for name in language.NAMES)
    assert set(result["not_computed"]) == set(language.NAMES)
    plain = GREG("whitespace")
    plain.update("Left man", ["left man", "man"])
    plain.update("a", ["the two"], 2)
    result = plain.compute()
    assert result["single"]["BLEU-1"] == pytest.approx(1.0)
    assert (result["multi"]["ROUGE-L"], result["all"]["METEOR"]) == (0.0, None)
    assert set(result["all"]["not_computed"]) == {"METEOR"}


def test_spice_without_its_jars_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No download, whatever is missing: first Java, then the jars."""
    monkeypatch.setattr(urllib.request, "urlretrieve", lambda *_: pytest.fail("a download"))
    metric = GREG("whitespace", spice=True)
    metric.update("the left man", ["the left man"])
    monkeypatch.setattr(language, "java_missing", lambda: language.NEEDS_JAVA)
    result = metric.compute()["all"]
    assert (result["SPICE"], result["not_computed"]["SPICE"]) == (None, language.NEEDS_JAVA)
    monkeypatch.setattr(language, "java_missing", lambda: "")
    monkeypatch.setattr(language, "meteor_scores", lambda *_: {"all": 0.5})
    (tmp_path / "spice-1.0.jar").touch()
    monkeypatch.setattr(spice, "_folder", lambda: tmp_path)
    result = metric.compute()["all"]
    assert result["SPICE"] is None and result["METEOR"] == 0.5
    assert "stanford-corenlp-3.6.0-models.jar" in result["not_computed"]["SPICE"]
    assert "SPICE" not in GREG("whitespace").load_state(metric.state()).compute()["all"]
    with pytest.raises(GrexError, match="spice"):
        metric.merge(GREG("whitespace"))


FAKE_SPICE = """#!{python}
import json, sys
source, out = sys.argv[4], sys.argv[sys.argv.index("-out") + 1]
rows = json.load(open(source))
assert sys.argv[1:4] == ["-Xmx8G", "-jar", "{jar}"] and all(row["test"] and all(row["refs"]) for row in rows)
scores = [{{"All": {{"f": float(row["test"] in row["refs"]) if row["test"] != "of" else None}}}} for row in rows]
if any(row["test"] == "boom" for row in rows): sys.exit("out of memory")
json.dump([{{"image_id": row["image_id"], "scores": s}} for row, s in zip(rows, scores)][::-1], open(out, "w"))
"""


def test_spice_asks_once_and_averages_each_subset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stand-in for Java with the jar's files and arguments: the parts around it, not the metric itself, are what is tested."""
    (tmp_path / "lib").mkdir()
    for name in ("spice-1.0.jar", *(f"lib/{jar}" for jar in spice.JARS)):
        (tmp_path / name).touch()
    java = tmp_path / "java"
    java.write_text(FAKE_SPICE.format(python=sys.executable, jar=tmp_path / "spice-1.0.jar"))
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(spice, "_folder", lambda: tmp_path)
    assert spice.spice_missing() == ""
    said = ["left man", "left man", "dog", "", "of", "cat"]
    wanted = [["left man", ""], ["left man"], ["cat"], ["x"], ["of"], [""]]
    scores = spice.spice_scores(said, wanted, {"single": [0, 2], "all": list(range(6))})
    assert scores == {"single": 0.5, "all": pytest.approx(2 / 6)}
    monkeypatch.setattr(language, "java_missing", lambda: "")
    monkeypatch.setattr(language, "meteor_scores", lambda *_: {"all": 0.5})
    broken = language.score_texts(["boom"], [["x"]], {"all": [0]}, "whitespace", True)["all"]
    assert broken["SPICE"] is None and "out of memory" in broken["not_computed"]["SPICE"] and broken["METEOR"] == 0.5


def test_order_and_merging_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "java_missing", lambda: language.NEEDS_JAVA)
    pairs = [(f"the {n} men on the left side", [f"the {n} men", "all the men on the left"], 1 + n % 2) for n in range(12)]
    whole, left, right = (GREG("whitespace") for _ in range(3))
    for n, pair in enumerate(pairs):
        whole.update(*pair)
        (left if n % 3 else right).update(*pair)
    assert left.merge(GREG("whitespace").load_state(right.state())).compute() == whole.compute()
    with pytest.raises(GrexError, match="tokenizer"):
        left.merge(GREG("ptb"))
    with pytest.raises(GrexError, match="references"):
        whole.update("x", [])
    with pytest.raises(GrexError, match="targets"):
        whole.update("x", ["y"], 0)


def test_empty_corpora() -> None:
    metric = GREG("whitespace")
    assert metric.compute() == {}
    metric.update("", [""])
    result = metric.compute()["all"]
    assert (result["CIDEr"], result["BLEU-4"]) == (0.0, 0.0)
