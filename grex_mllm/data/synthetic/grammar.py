"""The grammar of synthetic expressions: its syntax trees and their wording.

`to_text` chooses among the surface forms of a tree, `parser.parse` reads every one of them back to the same tree, and `meaning.evaluate`
says what a tree denotes in a scene. Postnominal modifiers are kept out of the places where English would attach them to two nouns ("A and B
on the left").
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from grex_mllm.data.synthetic.shapes import COLOUR, COLOURS, SHAPE, SHAPES, SIZE, TEXTURE, TEXTURES

ALL, THE = 0, 1  # quantifiers; a larger one is the stated number of objects

SHAPE_PLURALS = ("circles", "squares", "triangles", "stars", "bars", "crosses", "rings")
GENERIC_SINGULAR, GENERIC_PLURAL = ("shape", "object"), ("shapes", "objects")
SIZE_WORDS = (("small",), ("large", "big"))
MARKS = {1: "stripes", 2: "dots"}  # texture index -> what it consists of
NUMBERS = ("two", "three", "four", "five", "six")  # from 2
ORDINALS = ("first", "second", "third", "fourth", "fifth")  # from 1
MOST = {"left": "leftmost", "right": "rightmost", "top": "topmost", "bottom": "bottommost"}
EXTREMES = {True: ("largest", "biggest"), False: ("smallest",)}
PLACES = {
    "left": ("on the left", "in the left half"),
    "right": ("on the right", "in the right half"),
    "top": ("at the top", "in the top half"),
    "bottom": ("at the bottom", "in the bottom half"),
}
RELATIONS = {"left": ("to the left of", "left of"), "right": ("to the right of", "right of"), "top": ("above",), "bottom": ("below",)}
EXCEPTS = ("except", "except for", "but")


@dataclass(frozen=True, slots=True)
class Condition:
    """kind: "not" (one term), "neither" (two) or "either" (two).  terms: (attribute, value) class indices."""

    kind: str
    terms: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Description:
    """values: shape, colour, size, texture, each a class index or None."""

    values: tuple[int | None, ...] = (None, None, None, None)
    condition: Condition | None = None

    @property
    def stated(self) -> list[tuple[int, int]]:
        """The values that are not None, as (attribute, value)."""
        return [(k, value) for k, value in enumerate(self.values) if value is not None]

    @property
    def free(self) -> list[int]:
        """The attributes without a value."""
        return [k for k, value in enumerate(self.values) if value is None]

    def having(self, attribute: int, value: int | None) -> Description:
        """Return the values with one changed, without the condition."""
        return Description((*self.values[:attribute], value, *self.values[attribute + 1 :]))


@dataclass(frozen=True, slots=True)
class Ordinal:
    """The object at `rank` (from 1) counted from `side`: "the second star from the left"."""

    rank: int
    side: str
    description: Description


@dataclass(frozen=True, slots=True)
class Extreme:
    """The largest or smallest object."""

    largest: bool
    description: Description


@dataclass(frozen=True, slots=True)
class Relation:
    """side: left, right, top (above) or bottom (below) of the one object that `anchor` denotes."""

    side: str
    anchor: Reference | Extreme


@dataclass(frozen=True, slots=True)
class Reference:
    """quantifier: ALL, THE (exactly one), or a stated number.  place: a side of the image.  A relation excludes place and condition."""

    quantifier: int
    description: Description
    place: str | None = None
    relation: Relation | None = None


@dataclass(frozen=True, slots=True)
class Shared:
    """One attribute list over two shapes: "the red circles and stars".  description.values[SHAPE] is None.

    quantifier: ALL or THE (of each).
    """

    quantifier: int
    description: Description
    shapes: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Exclusion:
    """base without minus: "all circles except the red ones"."""

    base: Reference
    minus: Part


@dataclass(frozen=True, slots=True)
class Union:
    """parts: two or three: "the red circle and the largest star"."""

    parts: tuple[Part, ...]


Part: TypeAlias = Reference | Ordinal | Extreme
Expression: TypeAlias = Reference | Ordinal | Extreme | Shared | Exclusion | Union


def descriptions(tree: Expression) -> list[Description]:
    """Return every description in the tree."""
    if isinstance(tree, Union):
        return [found for part in tree.parts for found in descriptions(part)]
    if isinstance(tree, Exclusion):
        return descriptions(tree.base) + descriptions(tree.minus)
    if isinstance(tree, Shared):
        return [Description((shape, *tree.description.values[1:]), tree.description.condition) for shape in tree.shapes]
    if isinstance(tree, Reference) and tree.relation is not None:
        return [tree.description, *descriptions(tree.relation.anchor)]
    return [tree.description]


def vocabulary() -> list[str]:
    """Return every word of the grammar, sorted."""
    words = (*SHAPES, *SHAPE_PLURALS, *COLOURS, *TEXTURES, *MARKS.values(), *GENERIC_SINGULAR, *GENERIC_PLURAL, *NUMBERS, *ORDINALS)
    groups = (*SIZE_WORDS, *EXTREMES.values(), *PLACES.values(), *RELATIONS.values(), EXCEPTS)
    phrases = [*words, *MOST.values(), *(phrase for group in groups for phrase in group)]
    phrases.append("all every both the everything that is are not a neither nor or and with without one ones from")
    return sorted({word for phrase in phrases for word in phrase.split()})


def to_text(tree: Expression, rng: random.Random) -> str:
    """Word the tree in one of its surface forms, chosen with `rng`: lower case, no punctuation, at most about 20 words."""
    r = rng.random
    if isinstance(tree, Exclusion):
        return f"{_reference(tree.base, r)} {_pick(EXCEPTS, r)} {_minus(tree, r)}"
    if isinstance(tree, Shared):
        return _shared(tree, r)
    if isinstance(tree, Union):
        last = len(tree.parts) - 1
        return " and ".join(_part(part, r, closed=True, last=k == last) for k, part in enumerate(tree.parts))
    return _part(tree, r)


def _pick(options: tuple[str, ...], r: Callable[[], float]) -> str:
    return options[int(r() * len(options))] if len(options) > 1 else options[0]


def _part(tree: Part, r: Callable[[], float], closed: bool = False, last: bool = False) -> str:
    """closed: part of a list, so nothing may hang on that could attach elsewhere. last: not even a place after the noun."""
    if isinstance(tree, Reference):
        return _reference(tree, r, closed, last)
    return _ranked(tree, _noun(tree.description, False, r, closed=True)[0], r)


def _ranked(tree: Ordinal | Extreme, noun: str, r: Callable[[], float]) -> str:
    if isinstance(tree, Extreme):
        return f"the {_pick(EXTREMES[tree.largest], r)} {noun}"
    if tree.rank == 1 and r() < 0.7:
        return f"the {MOST[tree.side]} {noun}"
    return f"the {ORDINALS[tree.rank - 1]} {noun} from the {tree.side}"


def _reference(tree: Reference, r: Callable[[], float], closed: bool = False, last: bool = False) -> str:
    place, closed = tree.place, closed or tree.relation is not None
    prefix, plural = _determiner(tree, r, closed)
    if place is not None and tree.quantifier == THE and (last or r() < 0.4):
        prefix, place = f"{prefix} {place}", None
    bare = prefix == "everything"
    noun, clause = ("", "") if bare else _noun(tree.description, plural, r, closed)
    after = "" if place is None else _pick(PLACES[place], r)
    pieces = [prefix, noun, after, _clause(tree.description, r) if bare else clause]
    if tree.relation is not None:
        pieces += [_pick(RELATIONS[tree.relation.side], r), _part(tree.relation.anchor, r, closed=True, last=True)]
    return " ".join(piece for piece in pieces if piece)


def _determiner(tree: Reference, r: Callable[[], float], closed: bool) -> tuple[str, bool]:
    """Return (words before the noun phrase, whether the noun is plural)."""
    if tree.quantifier == THE:
        return "the", False
    if tree.quantifier > 1:
        if tree.quantifier == 2 and r() < 0.2:
            return "both", True
        number = NUMBERS[tree.quantifier - 2]
        return (f"the {number}" if closed or r() < 0.7 else number), True
    stated = tree.description.stated
    if not stated and r() < 0.6:
        return "everything", False
    if len(stated) == 1 and stated[0][0] != SHAPE and tree.description.condition is None and not closed and r() < 0.25:
        return "everything", False
    choice = r()
    if choice < 0.3:
        return "all", True
    if choice < 0.45:
        return "every", False
    if choice < 0.55 and not closed:
        return "all the", True
    return ("the" if closed or choice < 0.85 else ""), True


def _noun(tree: Description, plural: bool, r: Callable[[], float], closed: bool) -> tuple[str, str]:
    """Return (adjectives, noun and a with-phrase; a that-clause), the second empty where closed."""
    values, condition = tree.values, tree.condition
    moved = None
    if condition is None and not closed:
        free = [k for k in (COLOUR, SIZE, TEXTURE) if values[k] is not None]
        if free and r() < 0.2:
            moved = free[int(r() * len(free))]
    order = (SIZE, COLOUR, TEXTURE) if r() < 0.5 else (SIZE, TEXTURE, COLOUR)
    words = [_adjectives(values, r, [k for k in order if k != moved])]
    shape = values[SHAPE]
    if shape is None:
        words.append(_pick(GENERIC_PLURAL if plural else GENERIC_SINGULAR, r))
    else:
        words.append(SHAPE_PLURALS[shape] if plural else SHAPES[shape])
    clause = ""
    if moved is not None:
        value = values[moved]
        assert value is not None
        if moved == TEXTURE and value in MARKS and r() < 0.5:
            words.append(f"with {MARKS[value]}")
        else:
            clause = f"{_that(plural)} {_adjective(moved, value, r)}"
    elif condition is not None:
        clause = _condition(condition, plural, r)
        if clause.startswith("with"):
            words.append(clause)
            clause = ""
    return " ".join(word for word in words if word), clause


def _clause(tree: Description, r: Callable[[], float]) -> str:
    """Return the clause after "everything": its condition or its only attribute, or nothing."""
    if tree.condition is not None:
        return _condition(tree.condition, False, r)
    return f"that is {_adjective(*tree.stated[0], r)}" if tree.stated else ""


def _that(plural: bool) -> str:
    return "that are" if plural else "that is"


def _adjective(attribute: int, value: int, r: Callable[[], float]) -> str:
    if attribute == SIZE:
        return _pick(SIZE_WORDS[value], r)
    return COLOURS[value] if attribute == COLOUR else TEXTURES[value]


def _adjectives(values: tuple[int | None, ...], r: Callable[[], float], order: Sequence[int] = (SIZE, COLOUR, TEXTURE)) -> str:
    return " ".join(_adjective(k, value, r) for k in order if (value := values[k]) is not None)


def _predicate(term: tuple[int, int], plural: bool, r: Callable[[], float]) -> str:
    attribute, value = term
    if attribute == SHAPE:
        return SHAPE_PLURALS[value] if plural else f"{'an' if SHAPES[value][0] in 'aeiou' else 'a'} {SHAPES[value]}"
    return _adjective(attribute, value, r)


def _condition(tree: Condition, plural: bool, r: Callable[[], float]) -> str:
    marks = [MARKS.get(value) if attribute == TEXTURE else None for attribute, value in tree.terms]
    if tree.kind == "not":
        if marks[0] and r() < 0.5:
            return f"without {marks[0]}"
        return f"{_that(plural)} not {_predicate(tree.terms[0], plural, r)}"
    first, second = (_predicate(term, plural, r) for term in tree.terms)
    if tree.kind == "neither":
        return f"{_that(plural)} neither {first} nor {second}"
    if all(marks) and r() < 0.7:
        return f"with {marks[0]} or {marks[1]}"
    return f"{_that(plural)} {first} or {second}"


def _shared(tree: Shared, r: Callable[[], float]) -> str:
    plural = tree.quantifier == ALL
    choice = r()
    every = plural and choice < 0.2
    names = SHAPES if every or not plural else SHAPE_PLURALS
    first, second = (names[shape] for shape in tree.shapes)
    stated = tree.description.stated
    if len(stated) == 1 and not every and choice > 0.7:
        adjective = _adjective(*stated[0], r)
        return f"the {first} and the {second} that are {'both ' if not plural and r() < 0.5 else ''}{adjective}"
    adjectives = _adjectives(tree.description.values, r)
    determiner = "every" if every else "the" if not plural or choice < 0.45 else "all" if choice < 0.6 else ""
    return f"{determiner} {adjectives} {first} and {second}".strip()


def _minus(tree: Exclusion, r: Callable[[], float]) -> str:
    """Word the part after "except", often with "one" or "ones" for the noun of the base."""
    base, minus = tree.base.description, tree.minus
    if isinstance(minus, Reference):
        extra = [k for k in (SIZE, COLOUR, TEXTURE) if minus.description.values[k] is not None and base.values[k] is None]
        inherits = all(ours is None or ours == theirs for ours, theirs in zip(base.values, minus.description.values, strict=True))
        same_shape = base.values[SHAPE] == minus.description.values[SHAPE]
        bare = minus.place is None and minus.relation is None and minus.description.condition is None and base.condition is None
        if extra and inherits and same_shape and bare and minus.quantifier in (ALL, THE) and r() < 0.6:
            return f"the {_adjectives(minus.description.values, r, extra)} {'one' if minus.quantifier == THE else 'ones'}"
    elif minus.description == base and base.condition is None and tree.base.place is None and r() < 0.7:
        return _ranked(minus, "one", r)
    if isinstance(minus, Reference) and minus.quantifier == ALL:
        return f"the {_noun(minus.description, True, r, closed=True)[0]}"
    return _part(minus, r, closed=True, last=True)
