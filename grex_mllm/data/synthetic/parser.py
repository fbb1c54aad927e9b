"""Read a text of the synthetic grammar back to its syntax tree, strictly: anything outside the grammar is None, never a guess."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from grex_mllm.data.synthetic import grammar
from grex_mllm.data.synthetic.grammar import ALL, THE, Condition, Description, Exclusion, Extreme, Ordinal, Part, Reference, Shared, Union
from grex_mllm.data.synthetic.shapes import COLOUR, COLOURS, SHAPE, SHAPES, SIZE, TEXTURE, TEXTURES

_MAX_WORDS = 60
_T = TypeVar("_T")

_ADJECTIVES: dict[str, tuple[int, int]] = {
    **{word: (COLOUR, k) for k, word in enumerate(COLOURS)},
    **{word: (TEXTURE, k) for k, word in enumerate(TEXTURES)},
    **{word: (SIZE, k) for k, words in enumerate(grammar.SIZE_WORDS) for word in words},
}
_MARKS = {word: (TEXTURE, k) for k, word in grammar.MARKS.items()}
_SINGULAR: dict[str, int | None] = {**{word: k for k, word in enumerate(SHAPES)}, **dict.fromkeys(grammar.GENERIC_SINGULAR)}
_PLURAL: dict[str, int | None] = {**{word: k for k, word in enumerate(grammar.SHAPE_PLURALS)}, **dict.fromkeys(grammar.GENERIC_PLURAL)}
_NUMBERS = {word: k + 2 for k, word in enumerate(grammar.NUMBERS)}
_ORDINALS = {word: k + 1 for k, word in enumerate(grammar.ORDINALS)}
_MOST = {word: side for side, word in grammar.MOST.items()}
_SIDES = {side: side for side in grammar.MOST}
_EXTREMES = {word: largest for largest, words in grammar.EXTREMES.items() for word in words}


def _phrases(table: Mapping[str, tuple[str, ...]]) -> list[tuple[list[str], str]]:
    return [(phrase.split(), side) for side, phrases in table.items() for phrase in phrases]


_PLACES, _RELATIONS = _phrases(grammar.PLACES), _phrases(grammar.RELATIONS)


class _Outside(Exception):
    """The text left the grammar."""


class _Words:
    """A cursor over the words."""

    def __init__(self, words: list[str]) -> None:
        self.words, self.at = words, 0

    def next(self) -> str:
        return self.words[self.at] if self.at < len(self.words) else ""

    def take(self, *words: str) -> bool:
        """Move past these words if they come next."""
        if self.words[self.at : self.at + len(words)] != list(words):
            return False
        self.at += len(words)
        return True

    def look_up(self, table: Mapping[str, _T]) -> _T | None:
        """Move past a word of the table and return what it stands for; None where another one comes next."""
        found = table.get(self.next())
        if found is not None:
            self.at += 1
        return found

    def need(self, table: Mapping[str, _T]) -> _T:
        found = self.look_up(table)
        if found is None:
            raise _Outside
        return found

    def phrase(self, phrases: list[tuple[list[str], str]]) -> str | None:
        for words, meaning in phrases:
            if self.take(*words):
                return meaning
        return None

    def expect(self, holds: bool) -> None:
        if not holds:
            raise _Outside


def parse(text: str) -> grammar.Expression | None:
    """Return the syntax tree of a lower-case text without punctuation, or None where it is outside the grammar."""
    words = text.split()
    if not words or len(words) > _MAX_WORDS:
        return None
    try:
        for at, word in enumerate(words):
            if word in ("except", "but"):
                return _exclusion(words[:at], words[at + 1 :])
        if "and" in words:
            return _conjunction(words)
        return _whole(words, _part, False, False)
    except _Outside:
        return None


def _whole(words: list[str], rule: Callable[..., _T], *options: Any) -> _T:
    cursor = _Words(words)
    found = rule(cursor, *options)
    cursor.expect(cursor.at == len(words))
    return found


def _exclusion(before: list[str], after: list[str]) -> Exclusion:
    base = _whole(before, _part, False, False)
    if not isinstance(base, Reference) or base.quantifier != ALL or base.relation is not None:
        raise _Outside
    if after[:1] == ["for"] and after[1:]:
        after = after[1:]
    if "one" in after or "ones" in after:
        return Exclusion(base, _whole(after, _elided, base))
    return Exclusion(base, _whole(after, _part, True, True))


def _elided(cursor: _Words, base: Reference) -> Part:
    """Read "the smallest one", "the second one from the left", "the red ones": the noun is that of the base."""

    def noun() -> Description:
        cursor.expect(base.place is None and cursor.take("one"))
        return base.description

    cursor.expect(base.description.condition is None and cursor.take("the"))
    ranked = _ranked(cursor, noun)
    if ranked is not None:
        return ranked
    values = _adjectives(cursor, base.description.values)
    cursor.expect(tuple(values) != base.description.values)
    if cursor.take("one"):
        return Reference(THE, Description(tuple(values)))
    cursor.expect(cursor.take("ones"))
    return Reference(ALL, Description(tuple(values)))


def _ranked(cursor: _Words, noun: Callable[[], Description]) -> Ordinal | Extreme | None:
    """Read "smallest ...", "leftmost ...", "second ... from the left"; None where no such word comes next."""
    largest = cursor.look_up(_EXTREMES)
    if largest is not None:
        return Extreme(largest, noun())
    side = cursor.look_up(_MOST)
    if side is not None:
        return Ordinal(1, side, noun())
    rank = cursor.look_up(_ORDINALS)
    if rank is None:
        return None
    description = noun()
    cursor.expect(cursor.take("from", "the"))
    return Ordinal(rank, cursor.need(_SIDES), description)


def _conjunction(words: list[str]) -> Shared | Union:
    segments = [segment.split() for segment in " ".join(words).split(" and ")]
    if len(segments) == 2:
        shared = _shared(segments[0], segments[1])
        if shared is not None:
            return shared
    if not 2 <= len(segments) <= 3:
        raise _Outside
    last = len(segments) - 1
    return Union(tuple(_whole(segment, _part, True, k == last) for k, segment in enumerate(segments)))


def _shared(first: list[str], second: list[str]) -> Shared | Union | None:
    """Read "the red circles and stars" and "the circles and the stars that are red"; None where it is neither."""
    cursor = _Words(first)
    if len(second) == 1:
        determiner = next((word for word in ("every", "all", "the") if cursor.take(word)), "")
        values = _adjectives(cursor)
        plural = cursor.next() in _PLURAL
        nouns = _PLURAL if plural else _SINGULAR
        known = len(first) - cursor.at == 1 and first[-1] in nouns and second[0] in nouns
        if not known or determiner in (("every",) if plural else ("", "all")):
            raise _Outside
    else:
        tail = _Words(second)
        if not (cursor.take("the") and tail.take("the") and len(first) == 2):
            return None
        plural = first[1] in _PLURAL
        nouns = _PLURAL if plural else _SINGULAR
        if first[1] not in nouns or tail.next() not in nouns or second[2:4] != ["that", "are"]:
            return None
        tail.at = 4
        if tail.take("both") and plural:
            raise _Outside
        values = _adjectives(tail)
        tail.expect(tail.at == len(second) and sum(value is not None for value in values) == 1)
        second, determiner = second[1:2], "the"
    shapes = nouns[first[-1]], nouns[second[0]]
    if shapes[0] is None or shapes[1] is None or shapes[0] == shapes[1]:
        raise _Outside
    quantifier = THE if not plural and determiner != "every" else ALL
    if all(value is None for value in values):
        return Union(tuple(Reference(quantifier, Description((shape, None, None, None))) for shape in shapes))
    return Shared(quantifier, Description(tuple(values)), (shapes[0], shapes[1]))


def _adjectives(cursor: _Words, stated: Iterable[int | None] = (None, None, None, None)) -> list[int | None]:
    values = list(stated)
    while (term := cursor.look_up(_ADJECTIVES)) is not None:
        cursor.expect(values[term[0]] is None)
        values[term[0]] = term[1]
    return values


def _part(cursor: _Words, closed: bool, last: bool) -> Part:
    """closed, last: as in `grammar`: what may not hang on the noun there."""
    if cursor.take("everything"):
        return _everything(cursor, closed)
    quantifier, place, singular = _determiner(cursor, closed)
    if singular:  # "the" with a noun in the singular or plural, or an ordinal or extreme
        ranked = _ranked(cursor, lambda: _singular(cursor))
        if ranked is not None:
            return ranked
    return _reference(cursor, quantifier, place, bare_the=singular, closed=closed, last=last)


def _determiner(cursor: _Words, closed: bool) -> tuple[int | None, str | None, bool]:
    """Return (quantifier or None for "by the noun's number", prenominal place, whether it is a bare "the")."""
    if cursor.take("all"):
        cursor.take("the")
        return ALL, None, False
    if cursor.take("every"):
        return -1, None, False
    if cursor.take("both"):
        return 2, None, False
    definite = cursor.take("the")
    number = cursor.look_up(_NUMBERS)
    if number is not None:
        cursor.expect(definite or not closed)
        return number, None, False
    if not definite:
        cursor.expect(not closed)
        return ALL, None, False
    place = cursor.look_up(_SIDES)
    return (None, None, True) if place is None else (THE, place, False)


def _singular(cursor: _Words) -> Description:
    values = _adjectives(cursor)
    values[SHAPE] = _noun(cursor, plural=False)
    return Description(tuple(values))


def _noun(cursor: _Words, plural: bool) -> int | None:
    """Read a noun: its shape, or None for one that fits all."""
    nouns, word = _PLURAL if plural else _SINGULAR, cursor.next()
    cursor.expect(word in nouns)
    cursor.at += 1
    return nouns[word]


def _everything(cursor: _Words, closed: bool) -> Reference:
    place = cursor.phrase(_PLACES)
    cursor.expect(place is None or not closed)
    values: list[int | None] = [None] * 4
    condition = _clause(cursor, False, values)
    cursor.expect(not closed or (condition is None and values == [None] * 4))
    relation = _relation(cursor) if place is None and condition is None else None
    return Reference(ALL, Description(tuple(values), condition), place, relation)


def _reference(cursor: _Words, quantifier: int | None, place: str | None, *, bare_the: bool, closed: bool, last: bool) -> Reference:
    values = _adjectives(cursor)
    plural = cursor.next() in _PLURAL
    values[SHAPE] = _noun(cursor, plural)
    if bare_the:
        quantifier = ALL if plural else THE
    elif quantifier in (-1, THE):
        cursor.expect(not plural)
        quantifier = ALL if quantifier == -1 else THE
    else:
        cursor.expect(plural)
    assert quantifier is not None
    adjectives = list(values)
    condition = _with(cursor, values)
    after = cursor.phrase(_PLACES)
    cursor.expect(after is None or (place is None and not last))
    place = place or after
    if condition is None and values == adjectives:
        condition = _clause(cursor, plural, values)
    hanging = condition is not None or values != adjectives
    cursor.expect(not (hanging and closed))
    relation = None if closed or hanging or place is not None else _relation(cursor)
    return Reference(quantifier, Description(tuple(values), condition), place, relation)


def _relation(cursor: _Words) -> grammar.Relation | None:
    side = cursor.phrase(_RELATIONS)
    if side is None:
        return None
    anchor = _part(cursor, closed=True, last=True)
    if isinstance(anchor, Ordinal) or (isinstance(anchor, Reference) and anchor.quantifier != THE):
        raise _Outside
    return grammar.Relation(side, anchor)


def _with(cursor: _Words, values: list[int | None]) -> Condition | None:
    """Read "with stripes", "with stripes or dots", "without dots"."""
    if cursor.take("without"):
        return Condition("not", (cursor.need(_MARKS),))
    if not cursor.take("with"):
        return None
    term = cursor.need(_MARKS)
    if cursor.take("or"):
        other = cursor.need(_MARKS)
        cursor.expect(other != term)
        return Condition("either", (term, other))
    cursor.expect(values[TEXTURE] is None)
    values[TEXTURE] = term[1]
    return None


def _clause(cursor: _Words, plural: bool, values: list[int | None]) -> Condition | None:
    """Read "that is red" (into `values`), "that are not red", "which are neither red nor blue", "that is red or striped"."""
    condition = _with(cursor, values)
    if condition is not None:
        return condition
    if not cursor.take("that"):
        return None
    cursor.expect(cursor.take("are" if plural else "is"))
    if cursor.take("not"):
        return Condition("not", (_predicate(cursor, plural),))
    neither = cursor.take("neither")
    first = _predicate(cursor, plural)
    if cursor.take("nor" if neither else "or"):
        second = _predicate(cursor, plural)
        cursor.expect(first != second)
        return Condition("neither" if neither else "either", (first, second))
    cursor.expect(not neither)
    cursor.expect(first[0] != SHAPE and values[first[0]] is None)
    values[first[0]] = first[1]
    return None


def _predicate(cursor: _Words, plural: bool) -> tuple[int, int]:
    term = cursor.look_up(_ADJECTIVES)
    if term is not None:
        return term
    if not plural:
        cursor.expect(cursor.take("a") or cursor.take("an"))
    shape = _noun(cursor, plural)
    if shape is None:
        raise _Outside
    return SHAPE, shape
