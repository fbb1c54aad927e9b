"""What a templated expression, or one in that style, means: text to meanings, all readings of it.

A small grammar, read with backtracking; `lexicon.py` holds its words. Articles, letter case, hyphens, a full stop and "that is" do not
matter; numbers may be words or digits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TypeVar

from grex_mllm.data.templates.lexicon import (
    AFTER,
    BEFORE,
    COLOURS,
    DIRECTIONS_FROM,
    EXCEPT,
    LINKS,
    NEAREST,
    NUMBERS,
    ORDER,
    RELATIONS_AFTER,
    Words,
    vocabulary,
)
from grex_mllm.data.templates.meaning import PLURAL, Except, Meaning, Phrase, Pick, Relation, Union, Where

MOST_TOKENS = 48
MOST_DEPTH = 3  # anchors of anchors
SPELLING = ((r"\b(left|right|top|bottom|front|back|upper|rear)[- ]most\b", r"\1most"), (r"\b(left|right)[- ]?hand( side)?\b", r"\1\2"))
Value = TypeVar("Value")
Noun = tuple[tuple[str, ...], bool | None]  # categories, plural (None = either)


def parse(text: str, categories: Sequence[str]) -> list[Meaning]:
    """Return every reading of a text, none where it is not understood. categories: those that can be named."""
    tokens = _tokens(text)
    if not tokens or len(tokens) > MOST_TOKENS:
        return []
    reader = _Reader(tuple(tokens), vocabulary(tuple(categories)))
    return list(dict.fromkeys(meaning for meaning, end in reader.union(0, ()) if end == len(tokens)))


def _tokens(text: str) -> list[str]:
    text = " ".join(text.lower().split()).strip(" .!")
    for pattern, replacement in SPELLING:
        text = re.sub(pattern, replacement, text)
    text = re.sub(r"^there (?:is|are) ", "", text.replace("-", " "))
    tokens = re.findall(r"[^\W_]+|[^\w\s]", text)
    return tokens


@dataclass
class _Draft:
    """A phrase while it is read."""

    number: int | None = None
    every: bool = False
    several: bool = False  # "all", "both": the noun is a plural
    order: int = 0
    colour: str = ""
    negated_colour: bool = False
    conditions: tuple[Where | Relation, ...] = ()
    pick: Pick | None = None

    def with_item(self, item: Where | Relation | Pick | int | str) -> _Draft | None:
        """Return the draft with one more item, None where it has one of this kind."""
        if isinstance(item, int):
            return replace(self, number=item) if self.number is None else None
        if isinstance(item, str):
            return None if self.colour else replace(self, colour=item)
        if isinstance(item, Pick):
            if self.pick is not None:
                return None
            if self.order and item.by in DIRECTIONS_FROM.values() and not item.rank:
                return replace(self, pick=Pick(item.by, self.order), order=0)
            return replace(self, pick=item)
        return replace(self, conditions=(*self.conditions, item))


@dataclass
class _Reader:
    tokens: tuple[str, ...]
    nouns: Words[Noun]
    depth: int = field(default=0)

    def token(self, pos: int) -> str:
        return self.tokens[pos] if pos < len(self.tokens) else ""

    def after(self, pos: int, *words: str) -> int:
        """Return the position behind one of the words, or the same position."""
        return pos + 1 if self.token(pos) in words else pos

    def matches(self, words: Words[Value], pos: int) -> Iterator[tuple[Value, int]]:
        """Yield (value, end) of all entries that stand at a position."""
        for entry, value in words.get(self.token(pos), ()):
            if self.tokens[pos : pos + len(entry)] == entry:
                yield value, pos + len(entry)

    def union(self, pos: int, context: tuple[str, ...]) -> Iterator[tuple[Meaning, int]]:
        """Yield one term, or several with commas and "and" between them."""
        if self.token(pos) == "both":
            for first, end in self.term(pos + 1, context):
                if self.token(end) == "and":
                    for second, last in self.term(end + 1, _categories(first)):
                        yield _joined((first, second)), last
        for first, end in self.term(pos, context):
            yield from self._rest((first,), end)

    def _rest(self, parts: tuple[Meaning, ...], pos: int) -> Iterator[tuple[Meaning, int]]:
        yield _joined(parts), pos
        after = self.after(self.after(pos, ","), "and", "&")
        if after > pos:
            after = self.after(after, "also")
            for part, end in self.term(after, _categories(parts[-1])):
                yield from self._rest((*parts, part), end)

    def term(self, pos: int, context: tuple[str, ...]) -> Iterator[tuple[Meaning, int]]:
        """Yield a phrase, or one with an exception."""
        yield from self._all_but(pos)
        for phrase, end in self.phrase(pos, context):
            yield phrase, end
            if not isinstance(phrase, Phrase):
                continue
            for _, start in self.matches(EXCEPT, end):
                for minus, last in self.union(start, phrase.categories):
                    yield Except(phrase, minus), last

    def _all_but(self, pos: int) -> Iterator[tuple[Meaning, int]]:
        """Yield "all but the largest cat", "everyone except the person on the left"."""
        everyone = self.token(pos) in ("everyone", "everybody")
        if not everyone and self.token(pos) != "all":
            return
        everybody = Phrase(("person",), PLURAL)
        if everyone:
            yield everybody, pos + 1
        for _, start in self.matches(EXCEPT, pos + 1):
            for minus, end in self.union(start, everybody.categories if everyone else ()):
                categories = _categories(minus)
                if categories and (not everyone or categories == everybody.categories):
                    yield Except(Phrase(categories, PLURAL), minus), end

    def phrase(self, pos: int, context: tuple[str, ...]) -> Iterator[tuple[Meaning, int]]:
        """Yield phrases: a lead, words before the noun, the noun, words after it."""
        for draft, start in self._lead(pos):
            for before, end in self._before(draft, start):
                yield from self._noun(before, end, context, end > start)
                if self.token(end) == "and" and end > start:
                    yield from self._two(before, draft, end + 1)

    def _two(self, first: _Draft, draft: _Draft, pos: int) -> Iterator[tuple[Meaning, int]]:
        """Yield "the leftmost and (the) rightmost cats"."""
        start = self.after(pos, "the")
        for second, end in self._before(draft, start):
            if end > start and first.number is None and second.number is None and not draft.every:
                for (categories, _), last in self._nouns(end):
                    parts = [_built(one, categories, False) for one in (first, second)]
                    if parts[0] is not None and parts[1] is not None:
                        yield _joined((parts[0], parts[1])), last

    def _lead(self, pos: int) -> Iterator[tuple[_Draft, int]]:
        token = self.token(pos)
        if token == "all":
            yield _Draft(several=True), self.after(self.after(self.after(pos + 1, "of"), "the"), "of")
            return
        if token in ("every", "each", "any"):
            yield _Draft(every=True), self.after(self.after(pos + 1, "single"), "of")
            return
        if token == "both":
            yield _Draft(number=2, several=True), self.after(self.after(pos + 1, "of"), "the")
            return
        pos = self.after(pos, "the", "a", "an", "just", "only")
        yield _Draft(), self.after(pos, "only", "single")

    def _before(self, draft: _Draft, pos: int) -> Iterator[tuple[_Draft, int]]:
        yield draft, pos
        token = self.token(pos)
        found: list[tuple[_Draft | None, int]] = []
        if token in NUMBERS:
            found.append((draft.with_item(NUMBERS[token]), pos + 1))
        if token in COLOURS:
            found.append((draft.with_item(COLOURS[token]), pos + 1))
        if token in ORDER and not draft.order:
            found.append((replace(draft, order=ORDER[token]), pos + 1))
        found += [(draft.with_item(item), end) for item, end in self.matches(BEFORE, pos)]
        for longer, end in found:
            if longer is not None:
                yield from self._before(longer, end)

    def _nouns(self, pos: int) -> Iterator[tuple[Noun, int]]:
        yield from self.matches(self.nouns, pos)

    def _noun(self, draft: _Draft, pos: int, context: tuple[str, ...], described: bool) -> Iterator[tuple[Meaning, int]]:
        for (categories, plural), end in self._nouns(pos):
            for one in (False, True) if plural is None and not draft.every else (bool(plural),):
                yield from self._after(draft, categories, one, end)
        if context and self.token(pos) in ("one", "ones"):
            yield from self._after(draft, context, self.token(pos) == "ones", pos + 1)
        elif context and described and draft.number is None:
            yield from self._after(draft, context, False, pos)

    def _after(self, draft: _Draft, categories: tuple[str, ...], plural: bool | None, pos: int) -> Iterator[tuple[Meaning, int]]:
        phrase = _built(draft, categories, plural)
        if phrase is not None:
            yield phrase, pos
        start, linked = pos, False
        for _, end in self.matches(LINKS, pos):
            start, linked = max(start, end), True
        negated = self.token(start) == "not"
        start += negated
        if linked and self.token(start) in COLOURS and not draft.colour:
            longer = replace(draft, colour=COLOURS[self.token(start)], negated_colour=negated)
            yield from self._after(longer, categories, plural, start + 1)
        for item, end in self._items(start, draft):
            if negated:
                if not isinstance(item, Where):
                    continue
                item = replace(item, negated=True)
            with_item = (replace(draft, order=0) if isinstance(item, Pick) and item.rank else draft).with_item(item)
            if with_item is not None:
                yield from self._after(with_item, categories, plural, end)

    def _items(self, pos: int, draft: _Draft) -> Iterator[tuple[Where | Relation | Pick, int]]:
        """Yield what may stand behind a noun: a place, an order, a relation."""
        yield from self.matches(AFTER, pos)
        order, start = draft.order, pos
        if not order and self.token(self.after(pos, "the")) in ORDER:
            start = self.after(pos, "the") + 1
            order = ORDER[self.token(start - 1)]
        if order and self.token(start) in ("from", "on", "to", "in"):
            side = self.after(start + 1, "the")
            if self.token(side) in DIRECTIONS_FROM:
                yield Pick(DIRECTIONS_FROM[self.token(side)], order), self.after(side + 1, "side")
        if self.depth >= MOST_DEPTH:
            return
        self.depth += 1
        for words in (RELATIONS_AFTER, NEAREST):
            for kind, start in self.matches(words, pos):
                for anchor, end in list(self.phrase(start, ())):
                    if isinstance(anchor, Phrase) and anchor.number == 1:
                        yield (Pick("nearest", 0, anchor) if kind == "nearest" else Relation(str(kind), anchor)), end
        self.depth -= 1


def _built(draft: _Draft, categories: tuple[str, ...], plural: bool | None) -> Phrase | None:
    """Return the phrase of a draft, None where its parts do not go together."""
    if draft.order:
        return None
    if draft.several and plural is False:
        return None
    number = draft.number
    if draft.every:
        number = PLURAL
        if draft.pick:
            return None
    elif number is None:
        number = PLURAL if plural or draft.several else 1
    if draft.pick and draft.pick.rank and number != 1:
        return None
    return Phrase(categories, number, draft.colour, draft.negated_colour, draft.conditions, draft.pick)


def _joined(parts: tuple[Meaning, ...]) -> Meaning:
    if len(parts) == 1:
        return parts[0]
    flat: list[Meaning] = []
    for part in parts:
        flat += part.parts if isinstance(part, Union) else (part,)
    return Union(tuple(flat))


def _categories(meaning: Meaning) -> tuple[str, ...]:
    """Return the categories that all parts share, () where they differ."""
    if isinstance(meaning, Phrase):
        return meaning.categories
    if isinstance(meaning, Except):
        return meaning.base.categories
    found = {_categories(part) for part in meaning.parts}
    return found.pop() if len(found) == 1 else ()


@lru_cache(maxsize=4096)
def parse_once(text: str, categories: tuple[str, ...]) -> tuple[Meaning, ...]:
    """Do as `parse`, and remember the last texts."""
    return tuple(parse(text, categories))
