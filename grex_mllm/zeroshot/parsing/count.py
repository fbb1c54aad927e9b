"""Counts and yes or no out of raw answers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from grex_mllm.zeroshot.base import RawAnswer
from grex_mllm.zeroshot.parsing.clean import clean
from grex_mllm.zeroshot.parsing.grounding import refusal_of
from grex_mllm.zeroshot.parsing.keys import COUNTS, PRESENT, normal
from grex_mllm.zeroshot.parsing.values import Node, Number, values
from grex_mllm.zeroshot.parsing.words import denies, plain, refuses, says_none, yes_or_no

MAX_COUNT = 10_000
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve|zéro un deux trois quatre cinq six sept huit neuf "
    "dix|null ein zwei drei "
    "vier fünf sechs sieben acht neun zehn|cero uno dos tres cuatro cinco seis siete ocho nueve diez|zero um dois três quatro "
    "cinco seis sete oito "
    "nove dez|zero uno due tre quattro cinque sei sette otto nove dieci|ноль один два три четыре пять шесть семь восемь девять десять"
)
_NAMED = {word: n for row in _WORDS.split("|") for n, word in reversed(list(enumerate(row.split())))}
_ARTICLES = {"a": 1, "an": 1, "eine": 1, "une": 1, "una": 1, "uma": 1}
_NAMED |= _ARTICLES | {"none": 0, "single": 1, "couple": 2, "pair": 2, "both": 2, "dozen": 12, "dua": 2, "duas": 2}
_UNSURE = {*_ARTICLES, "un", "um", "ein", "uno", "one", "null", "none"}  # numbers that are mostly no number within a sentence
_HAN = {sign: n for n, sign in enumerate("零一二三四五六七八九十")} | {"两": 2, "兩": 2, "〇": 0}
_DIGITS = re.compile(r"(?<![\w.])\d{1,6}(?:\.0+)?(?![\w%]|\.\d)")
_VAGUE = ("few", "lot", "number", "group", "bunch", "crowd")
_NONE_FIRST = re.compile(
    r"\W{0,20}(?:i'm sorry|sorry|unfortunately)?\W{0,5}there (?:is|are) no(?:ne)?\b(?! (?:more|fewer|less|doubt))", re.IGNORECASE
)
_PARTS = re.compile(r"(?<!\d)\d{1,12}\.(?!0{1,12}(?!\d))\d{1,12}")
_STATED = re.compile(
    r"(?:\btotal of|\b(?:answer|count|total(?! of)|number(?: of [\w ]{1,60})?)\b[^\w\n]{0,5}(?:is|are|=|:)?|\bthere (?:is|are)"
    r"|\bi (?:can )?(?:see|count|find)|\bexactly|\bfound)"
    r"[^\w\n]{0,5}(?:a total of |exactly |only |about |approximately )?(\w+)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ParsedCount:
    """A count. count: 0 unless status is ok.  status, reason, flags: as in `Parsed`."""

    count: int
    status: str
    reason: str = ""
    flags: tuple[str, ...] = ()


def parse_count(raw: RawAnswer) -> ParsedCount:
    """Return the number of objects that an answer states: as JSON, a number, or a number word of several languages; a denial is 0."""
    refused = refusal_of(raw)
    if refused is not None:
        return ParsedCount(0, refused.status, refused.reason)
    text = clean(raw.text or "")
    flags = ("thinking",) * text.thinking + ("truncated",) * (raw.finish == "length")
    if text.unclosed or not text.strip():
        return ParsedCount(0, "unparsable", "the answer's reasoning never ends" if text.unclosed else "an empty answer", flags)
    count = _in_values(text)
    if count is None:
        count = _in_words(plain(text))
    if count is not None:
        return ParsedCount(count, "ok", "", flags) if count <= MAX_COUNT else ParsedCount(0, "unparsable", f"more than {MAX_COUNT}", flags)
    if says_none(text) or denies(text):
        return ParsedCount(0, "ok", "", flags)
    if refuses(text):
        return ParsedCount(0, "refused", "refused in words", flags)
    return ParsedCount(0, "unparsable", "no number", flags)


def parse_yes_no(raw: RawAnswer) -> bool | None:
    """Return whether an answer says yes; None where it says neither, or did not come."""
    if refusal_of(raw) is not None:
        return None
    text = clean(raw.text or "")
    if text.unclosed or not text.strip():
        return None
    for node in reversed(values(text)):
        named = {normal(key): value for key, value in node.pairs}
        for name, value in named.items():
            if isinstance(value, bool):
                return value
            if isinstance(value, str) and (said := yes_or_no(value)) is not None and (name in PRESENT or len(value) < 40):
                return said
    return yes_or_no(text)


def _in_values(text: str) -> int | None:
    """Return the number under a key such as "count", or the length of a list of objects."""
    for node in reversed(values(text)):
        named = {normal(key): value for key, value in node.pairs}
        for name in (*COUNTS, "answer", "result", "number"):
            value = named.get(name)
            if isinstance(value, Number) and value.value == value.value and 0 <= value.value <= 1e6 and value.value == int(value.value):
                return int(value.value)
            if isinstance(value, str) and (number := _in_words(value)) is not None:
                return number
        if node.opener == "[" and node.closed and all(isinstance(i, Node) and (i.pairs or i.numbers) for i in node.items):
            return len(node.items)
    return None


def _in_words(text: str) -> int | None:
    """Return the only number, else the one that is stated as the answer, else the last one that opens or ends the answer."""
    if _NONE_FIRST.match(text):
        return 0
    text = _PARTS.sub(" ", text)
    stated = [n for match in _STATED.finditer(text) if (n := _named(match[1])) is not None]
    if stated:
        return stated[-1]
    digits = [int(float(match[0])) for match in _DIGITS.finditer(text)]
    if len(set(digits)) == 1:
        return digits[0]
    words = re.findall(r"[^\W_]+", text.lower())
    if digits:
        ends = [n for n in (_named(words[0]), _named(words[-1])) if n is not None]
        return ends[-1] if ends else None
    if words and words[0] in _ARTICLES:
        after = words[1] if len(words) > 1 else _VAGUE[0]
        return _NAMED.get(after, None if after in _VAGUE else 1)
    if words and (first := _named(words[0])) is not None:
        return first
    named = [n for word in words if (n := _named(word)) is not None and word not in _UNSURE]
    if len(set(named)) == 1:
        return named[0]
    han = re.findall(r"([零〇一二两兩三四五六七八九十])(?=[个個只隻名位条條辆輛张張匹头頭人]|$)", text)
    return _HAN[han[0]] if han else None


def _named(word: str) -> int | None:
    if word.isascii() and word.isdigit() and len(word) < 7:
        return int(word)
    return _NAMED.get(word.lower(), _HAN.get(word))
