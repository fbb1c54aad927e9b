"""Expressions, counts, yes and no out of answers of multimodal models."""

from __future__ import annotations

import pytest

from grex_mllm.zeroshot.base import RawAnswer
from grex_mllm.zeroshot.parsing import parse_count, parse_expression, parse_yes_no

PHRASES = [
    ("the two men in red", "the two men in red"),
    ("The two men in red.", "The two men in red"),
    ('"the two men in red"', "the two men in red"),
    ("**the two men in red**", "the two men in red"),
    ("The expression is: the two men in red", "the two men in red"),
    ('The expression is: "the two men in red".', "the two men in red"),
    ("Expression: the two men in red", "the two men in red"),
    ('Sure! Here\'s a referring expression for these objects:\n\n"the two men in red"', "the two men in red"),
    ("Here is a short phrase: the two men in red", "the two men in red"),
    ("1. the two men in red\n2. the men on the left", "the two men in red"),
    ("- the two men in red", "the two men in red"),
    ("`the two men in red`", "the two men in red"),
    ("```\nthe two men in red\n```", "the two men in red"),
    ('{"expression": "the two men in red"}', "the two men in red"),
    ('```json\n{"phrase": "the two men in red"}\n```', "the two men in red"),
    ('["the two men in red"]', "the two men in red"),
    ("<think>two men\nin red</think>\n\nthe two men in red", "the two men in red"),
    ("<answer>the two men in red</answer>", "the two men in red"),
    ("The two men in red\n\nThis expression distinguishes them from the others.", "The two men in red"),
    ("“the two men in red”", "the two men in red"),
    ("«les deux hommes en rouge»", "les deux hommes en rouge"),
    ("描述：两个穿红衣的男人。", "两个穿红衣的男人"),
    ("the man's red hat", "the man's red hat"),
    ('the "stop" sign', 'the "stop" sign'),
    ("Referring expression: **the two men in red**", "the two men in red"),
    ('The referring expression for the objects is "the two men in red".', "the two men in red"),
    ("the two men in red<|im_end|>", "the two men in red"),
    ("## the two men in red", "the two men in red"),
    ("Answer: the two men in red", "the two men in red"),
    ("The answer is the two men in red", "the two men in red"),
    ("the two men in red [100, 200, 300, 400]", "the two men in red"),
    ("players wearing white", "players wearing white"),
    ("man in white box truck", "man in white box truck"),
    ("Final answer: the two men in red", "the two men in red"),
    ("A possible expression could be: the two men in red", "the two men in red"),
    ("\n\n  the two men in red  \n", "the two men in red"),
    ("The description of the dog on the sign", "The description of the dog on the sign"),
    ("text on the sign", "text on the sign"),
    ("Okay, the two men in red", "the two men in red"),
    ('"The two men in red" - this phrase covers both.', "The two men in red"),
    ("Los dos hombres de rojo", "Los dos hombres de rojo"),
    ("Two men: one in red, one in blue", "Two men: one in red, one in blue"),
    ("Group of people (left)", "Group of people (left)"),
    ("phrase: 'the two men in red'", "the two men in red"),
    ("The phrase that fits: the two men in red", "the two men in red"),
    ("All three: the zebras", "All three: the zebras"),
]
NO_PHRASES = [
    ("", "unparsable"),
    ("  \n", "unparsable"),
    ("I'm sorry, I can't help with identifying people.", "refused"),
    ("I cannot see the image.", "refused"),
    ("None", "unparsable"),
    ("<think>a man", "unparsable"),
    ("...", "unparsable"),
    ('""', "unparsable"),
    (
        "word " * 100,
        "unparsable",
    ),
    ("{}", "unparsable"),
    ("I'm sorry, but I can't assist with that.", "refused"),
    ("As an AI, I cannot describe people.", "refused"),
    ("people who cannot see the picture", "ok"),
    ("no parking sign", "ok"),
    ("nobody's bag", "ok"),
    ("the men with no hats", "ok"),
    ("[]", "unparsable"),
    ("There is no object to describe.", "unparsable"),
    ("no", "unparsable"),
]
LEAKS = [
    ("the objects in the red boxes", True),
    ("the man with the red outline", True),
    ("objects 1 and 2", True),
    ("the two men numbered 1 and 2", True),
    ("the man in red", False),
    ("the marked objects", True),
    ("the two men labeled 3 and 4", True),
    ("two people inside bounding boxes", True),
    ("the highlighted zebras", True),
    ("2 men", False),
]
COUNTS = [
    ("3", 3),
    ("three", 3),
    ("There are three people.", 3),
    ("There are 3 people in the image.", 3),
    ('{"count": 3}', 3),
    ('```json\n{"count": 3}\n```', 3),
    ("The answer is 2.", 2),
    ("Count: 4", 4),
    ("0", 0),
    ("zero", 0),
    ("None", 0),
    ("There are no dogs.", 0),
    ("没有", 0),
    ("两个", 2),
    ("图中有三个人", 3),
    ("**5**", 5),
    ("I count 2 men and 3 women, for a total of 5.", 5),
    ("Answer: 7", 7),
    ("1. man in red\n2. man in blue\nAnswer: 2", 2),
    ("There is one man.", 1),
    ("one", 1),
    ("a single dog", 1),
    ("a couple of dogs", 2),
    ("drei", 3),
    ("Il y a deux chiens.", 2),
    ('[{"bbox":[1,2,3,4]},{"bbox":[1,2,3,5]}]', 2),
    ("<think>2 or 3</think>3", 3),
    ("3.0", 3),
    ("12 zebras", 12),
    ("I see 4.", 4),
    ("３", 3),
    ("\\boxed{6}", 6),
    ("two (2)", 2),
    ("There is no zebra, but 3 horses.", 0),
    ("5 people", 5),
    ("[]", 0),
]
NO_COUNTS = [
    ("", "unparsable"),
    ("many", "unparsable"),
    ("I can't help with that.", "refused"),
    ("-", "unparsable"),
    ("99999999999", "unparsable"),
    ("As an AI, I cannot view images.", "refused"),
    ("a few", "unparsable"),
    ("3.7", "unparsable"),
]
YES_NO = [
    ("yes", True),
    ("Yes.", True),
    ("Yes, there is a dog.", True),
    ("no", False),
    ("No, there isn't.", False),
    ("No", False),
    ("**No**", False),
    ("not really", None),
    ("There is a dog.", True),
    ("There is no dog.", False),
    ("是", True),
    ("否", False),
    ("没有", False),
    ("有", True),
    ("Oui", True),
    ("Non", False),
    ("Ja, es gibt einen Hund.", True),
    ("Nein.", False),
    ("Sí", True),
    ("はい", True),
    ("いいえ", False),
    ("네", True),
    ("아니요", False),
    ("да", True),
    ("нет", False),
    ('{"answer": "yes"}', True),
    ('{"exists": false}', False),
    ("True", True),
    ("I'm not sure.", None),
    ("", None),
    ("I cannot see the image.", None),
    ("Answer: no", False),
    ("The answer is yes.", True),
    ("The image shows a dog.", True),
    ("Nothing matches.", False),
    ("Nobody does.", None),
    ("The described object is present.", True),
    ("The described object is not present in the image.", False),
    ("<think>yes?</think>No", False),
    ("Yes and no", True),
    ('"yes"', True),
    ("yes\n\nExplanation: there is no doubt", True),
    ("Based on the image, yes.", True),
    ("I don't see a dog.", False),
    ("Sure, here is the answer: no", False),
    ("Notably, a dog is visible.", True),
]


@pytest.mark.parametrize(("text", "phrase"), PHRASES)
def test_the_phrase_is_bare(text: str, phrase: str) -> None:
    parsed = parse_expression(RawAnswer(text))
    assert (parsed.text, parsed.status, parsed.reason) == (phrase, "ok", "")


@pytest.mark.parametrize(("text", "status"), NO_PHRASES)
def test_what_is_no_phrase_has_a_status(text: str, status: str) -> None:
    parsed = parse_expression(RawAnswer(text))
    assert parsed.status == status and bool(parsed.text) == (status == "ok") and bool(parsed.reason) == (status != "ok")


@pytest.mark.parametrize(("text", "leaks"), LEAKS)
def test_leaks_of_the_marks_are_told(text: str, leaks: bool) -> None:
    assert ("mark" in parse_expression(RawAnswer(text)).flags) == leaks


def test_flags_of_an_expression() -> None:
    told = "Here is the phrase:\nthe dogs [1, 2, 3, 4]\nIt fits both."
    flags = parse_expression(RawAnswer(f"<think>x</think>{told}", "length")).flags
    assert flags == (
        "thinking",
        "lead",
        "lines",
        "coordinates",
        "truncated",
    )
    assert parse_expression(RawAnswer("the dogs")).flags == ()


@pytest.mark.parametrize(("text", "count"), COUNTS)
def test_a_count_is_read(text: str, count: int) -> None:
    parsed = parse_count(RawAnswer(text))
    assert (parsed.count, parsed.status, parsed.reason) == (count, "ok", "")


@pytest.mark.parametrize(("text", "status"), NO_COUNTS)
def test_what_is_no_count_has_a_status(text: str, status: str) -> None:
    parsed = parse_count(RawAnswer(text))
    assert (parsed.count, parsed.status) == (0, status) and parsed.reason


@pytest.mark.parametrize(("text", "meaning"), YES_NO)
def test_yes_and_no(text: str, meaning: bool | None) -> None:
    assert parse_yes_no(RawAnswer(text)) is meaning


def test_answers_that_did_not_come() -> None:
    for raw, status in (
        (RawAnswer(None, "error", error="gone"), "error"),
        (RawAnswer("yes", "content_filter"), "refused"),
        (RawAnswer(None, refusal="no"), "refused"),
    ):
        assert parse_expression(raw).status == parse_count(raw).status == status and parse_yes_no(raw) is None
    assert parse_count(RawAnswer("<think>3", "length")).flags == ("thinking", "truncated")
