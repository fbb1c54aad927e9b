"""Reads values that look like JSON and often are not: a tree out of brackets, keys, numbers and words, whatever is missing (rule E).

One pass, linear in the length of the text, and nothing is ever run. Nothing is completed: a number or text that is cut off is dropped.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

MAX_DEPTH = 40  # deeper brackets are read as if they were not there
CLOSERS = {"]": "[", "}": "{", ")": "("}
NUMBER = r"[-+]?(?:\d++(?:\.\d*+)?+|\.\d++)(?:[eE][-+]?\d++)?+"
_UNIT = r"(?:\s?+px\b|\s?+pixels?\b)?+"
_TOKEN = re.compile(
    rf"""\s++|(?://|\#[ ])[^\n]*+|/\*.*?(?:\*/|\Z)
    |(?P<open>[\[{{(])|(?P<close>[\]}})])|(?P<sep>[,;|/])|(?P<colon>[:=])
    |(?P<number>{NUMBER})(?:\s?+(?P<percent>%))?+{_UNIT}(?!\w)
    |(?P<quote>["“])|(?P<single>')
    |(?P<word>[^\s\[\]{{}}(),;:="“'%][^\s\[\]{{}}(),;:="“]*+)|.""",
    re.VERBOSE | re.DOTALL,
)
# A quote inside a text does not end it: behind the closing one stands a separator or a closer, or nothing.
_ENDS = {
    '"': re.compile(r'(?:[^"\\]|\\.|"(?!\s*+(?:[,:;\]})=]|\Z)))*+"', re.DOTALL),
    "'": re.compile(r"(?:[^'\\]|\\.|'(?!\s*+(?:[,:;\]})=]|\Z)))*+'", re.DOTALL),
    "“": re.compile(r"[^”]*+”"),
}
_CONSTANTS: dict[str, object] = {"true": True, "false": False, "null": None, "none": None, "nil": None, "undefined": None}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
_ESCAPED = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)


class Number(NamedTuple):
    """A number as it was written. fraction: with a decimal point.  percent: with a per cent sign."""

    value: float
    fraction: bool = False
    percent: bool = False


class Word(str):
    """Text without quotes."""


@dataclass
class Node:
    """What a pair of brackets holds: values, and pairs of key and value, in either kind of bracket. closed: its own end was there."""

    opener: str
    start: int
    items: list[object] = field(default_factory=list)
    pairs: list[tuple[str, object]] = field(default_factory=list)
    closed: bool = False
    end: int = 0

    @property
    def empty(self) -> bool:
        """Nothing in it."""
        return not self.items and not self.pairs

    @property
    def numbers(self) -> bool:
        """Numbers alone, at least one."""
        return bool(self.items) and not self.pairs and all(isinstance(item, Number) for item in self.items)


def number(text: str, percent: bool = False) -> Number:
    """Return a number that matched NUMBER; however long, it is read in linear time."""
    try:
        value = float(text)
    except OverflowError:
        value = math.inf
    return Number(value, "." in text or "e-" in text.lower(), percent)


def values(text: str) -> list[Node]:
    """Return the outermost bracketed values of a text, in order; their `start` and `end` tell where they stand."""
    found, place = [], 0
    dead: set[str] = set()  # quotes that open no text any more: no end comes
    opener = re.compile(r"[\[{(]")
    while match := opener.search(text, place):
        node, place = _read(text, match.start(), dead)
        found += _hoisted(node)
    return found


def _hoisted(node: Node) -> list[Node]:
    """Return the node; of a bracket of prose that nothing closes (":(", "[see ...") the values in it instead."""
    prose = node.opener == "(" or (node.opener == "[" and bool(node.items) and type(node.items[0]) is Word)
    if node.closed or not prose:
        return [node]
    inner = [value for value in (*node.items, *(value for _, value in node.pairs)) if isinstance(value, Node)]
    return [hoisted for value in sorted(inner, key=lambda value: value.start) for hoisted in _hoisted(value)]


def _read(text: str, place: int, dead: set[str]) -> tuple[Node, int]:
    """Return the value whose bracket opens at `place`, and where it ends."""
    reader = _Reader(text, dead)
    while place < len(text):
        token = _TOKEN.match(text, place)
        assert token is not None
        place = reader.take(token)
        if not reader.stack:
            break
    for node in reader.stack:
        node.end = len(text)
    return reader.root, place


class _Reader:
    """Builds one value. `last`: kind of the token before, within the innermost bracket."""

    def __init__(self, text: str, dead: set[str]) -> None:
        self.text, self.dead = text, dead
        self.stack: list[Node] = []
        self.keys: list[str | None] = []
        self.open = dict.fromkeys("[{(", 0)
        self.root = Node("", 0)
        self.skipped = 0
        self.last = ""

    def take(self, token: re.Match[str]) -> int:
        """Take a token in; return where the next one starts."""
        kind, end = token.lastgroup, token.end()
        if kind == "open":
            self._push(token["open"], token.start())
        elif kind == "close":
            self._close(CLOSERS[token["close"]], end)
        elif kind in ("number", "percent"):
            if end < len(self.text):
                self._add(number(token["number"], token["percent"] is not None))
        elif kind in ("quote", "single"):
            return self._string(token.group(), end)
        elif kind == "word":
            self._word(token["word"])
        elif kind == "colon":
            self._colon()
        elif kind is None:
            return end
        self.last = kind or ""
        return end

    def _push(self, opener: str, place: int) -> None:
        if len(self.stack) >= MAX_DEPTH:
            self.skipped += 1
            return
        node = Node(opener, place)
        if self.stack:
            self._add(node)
        else:
            self.root = node
        self.stack.append(node)
        self.keys.append(None)
        self.open[opener] += 1

    def _close(self, opener: str, end: int) -> None:
        if self.skipped:
            self.skipped -= 1
            return
        if not self.open[opener]:  # the wrong kind of bracket ends the innermost one, unless it is but a parenthesis of prose
            numbers = sum(isinstance(item, Number) for item in self.stack[-1].items)
            if opener == "(" and numbers not in (2, 4):
                return
            opener = self.stack[-1].opener
        while self.stack:
            node = self.stack.pop()
            self.keys.pop()
            self.open[node.opener] -= 1
            node.closed, node.end = True, end
            if node.opener == opener:
                return

    def _add(self, value: object) -> None:
        node, key = self.stack[-1], self.keys[-1]
        if key is None:
            node.items.append(value)
        else:
            node.pairs.append((key, value))
            self.keys[-1] = None

    def _colon(self) -> None:
        items = self.stack[-1].items
        if self.keys[-1] is None and items and self.last in ("string", "word", "number", "percent"):
            key = items.pop()
            self.keys[-1] = f"{key.value:g}" if isinstance(key, Number) else str(key)

    def _word(self, word: str) -> None:
        lower = word.lower().strip(".!*`$\\")
        items = self.stack[-1].items
        if lower in ("nan", "inf", "infinity", "-inf", "-infinity", "+inf"):
            self._add(Number(math.nan))
        elif self.last == "word" and items and type(items[-1]) is Word and self.keys[-1] is None:
            items[-1] = Word(f"{items[-1]} {word}")
        elif lower in _CONSTANTS:
            self._add(_CONSTANTS[lower])
        elif lower:
            self._add(Word(word))

    def _string(self, quote: str, place: int) -> int:
        """Take a quoted text in; return where the next token starts."""
        self.last = "string"
        if place >= 2 and self.text[place - 2] == "\\":  # \" outside of a text: the whole value was escaped once more
            close = re.compile(rf"\\?{re.escape(quote)}").search(self.text, place)
            if close is not None:
                self._add(self.text[place : close.start()])
                return close.end()
        match = None if quote in self.dead else _ENDS[quote].match(self.text, place)
        if match is None:
            self.dead.add(quote)
            return place
        self._add(_ESCAPED.sub(_unescape, match.group()[:-1]))
        return match.end()


def _unescape(match: re.Match[str]) -> str:
    sign = match[1]
    return chr(int(sign[1:], 16)) if len(sign) == 5 else _ESCAPES.get(sign, sign)
