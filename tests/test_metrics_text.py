"""Text metrics: published numbers on real expressions, any text, subsets, no Java."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grex_mllm.errors import GrexError
from grex_mllm.metrics import GREG, language

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
