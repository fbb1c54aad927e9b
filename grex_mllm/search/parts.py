"""What an image must hold all of: "the dog and two cats" asks for the dog, and for two cats.

A grounding model that finds one part of a union answers with it, as its training asks; an image that lacks the other part does not contain
what is said. English alone, by its determiners.
"""

from __future__ import annotations

import re

ARTICLES = ("the", "a", "an", "all", "every", "each", "both", "any", "some", "no", "my", "his", "her", "their")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DETERMINERS = frozenset(ARTICLES + NUMBERS)
# where one of these stands, an "and" binds tighter
UNDIVIDED = frozenset({"between", "except", "but", "neither", "either", "or", "not", "without", "other", "than"})
# behind one of these stands more than the noun
BEHIND = frozenset("on in at of with to from by near under above below behind beside inside wearing holding that who which".split())  # noqa: SIM905
MAX_PARTS = 4
COMMA = re.compile(rf",\s+(?=(?:and|{'|'.join(sorted(DETERMINERS))})\b)", re.IGNORECASE)  # of a list


def parts_of(expression: str) -> list[str]:
    """Return the parts of a union, at most MAX_PARTS, or the expression alone where it is none.

    A part without a determiner shares the words before the last noun: "the red circles and stars" -> "the red circles", "the red stars".
    """
    words = COMMA.sub(" and ", expression).split()
    small = [word.lower().strip(",.;:") for word in words]
    if "and" not in small or UNDIVIDED & set(small):
        return [expression]
    pieces: list[list[str]] = [[]]
    for word, plain in zip(words, small, strict=True):
        if plain == "and":
            pieces.append([])
        else:
            pieces[-1].append(word)
    pieces = [piece for piece in pieces if piece]  # ", and" leaves an empty one
    if not 2 <= len(pieces) <= MAX_PARTS or pieces[0][0].lower() not in DETERMINERS:
        return [expression]
    whole = pieces[:1]
    for piece in pieces[1:]:
        whole.append(piece if piece[0].lower() in DETERMINERS else [*_shared(whole[-1], piece), *piece])
    return [" ".join(piece).strip(" ,") for piece in whole]


def _shared(before: list[str], piece: list[str]) -> list[str]:
    """Return the words of a part that the noun of the next one shares: none behind "the dog on the bench", nor "a" before "birds"."""
    plural = piece[-1].lower().strip(",.;:").endswith("s")
    if BEHIND & {word.lower() for word in before} or (before[0].lower() in ("a", "an", "one") and plural):
        return []
    return before[:-1]
