"""Expressions of a picture that is flipped from left to right."""

from __future__ import annotations

import re

SIDES = {"left": "right", "right": "left", "l": "r", "r": "l"}
WORD = re.compile(r"[^\W\d_]+")
# What may stand around the side in one word: "leftmost", "topright", "righthand", "lhs".
SIDE_WORD = re.compile(r"(top|bottom|upper|lower|mid|middle|far)?(left|right)(most|hand|handed|side|ward|wards|er)?|([lr])hs")
OTHER_WORDS = re.compile(r"(?:up|out|b|f)right\w*|copyright\w*|wright\w*|playwright\w*|cleft\w*")  # hold the letters, but mean no side
# Words that say what a flip changes, but that have no partner, or slips of the pen that hide a side.
UNKNOWN = re.compile(
    r"\w*clockwise|east\w*|west\w*|lft|rgt|rght|rigth|righ|rigt|rigjt|rihgt|leftt|lef|leftmsot|rite|letters?|writing|numbers?|digits?|reads|says|word|words",
)
# "right" as an adverb ("right behind the car"), "left" as a verb ("left over", "to be left alone").
NO_SIDE = re.compile(
    r"\bright\s+(?:next|beside|behind|in|above|below|under|underneath|over|before|after|at|there|here|by|near|where|now|up|down|through|against)\b"
    r"|\bo'?clock\b|\b(?:alright|all\s+right|right\s+away|right\s+angle\w*)\b"
    r"|\bleft\s*-?\s*(?:over|overs|behind|alone|open|out|in|unattended)\b|\b(?:is|are|was|were|being|been|has|have|had|be)\s+left\b(?!\s+(?:of|hand|side))",
    re.IGNORECASE,
)
QUOTED = re.compile(r"[\"“”«»]")


def mirrored_text(text: str) -> str | None:
    """Return what an expression says of the picture flipped from left to right, None where that is not certain.

    Left and right change places in all their words ("leftmost", "top-right", "left-hand"); letter case stays. A text without a side stays
    as it is. None: writing in the picture, clock faces and compass points, "right" and "left" in other senses, or a likely slip of the pen.
    """
    if NO_SIDE.search(text) or QUOTED.search(text):
        return None
    uncertain = False

    def swap(match: re.Match[str]) -> str:
        nonlocal uncertain
        word = match[0].lower()
        found = SIDE_WORD.fullmatch(word)
        if found:
            group = 2 if found[2] else 4
            start, end = found.span(group)
            given = match[0][start:end]
            return match[0][:start] + _in_case(SIDES[given.lower()], given) + match[0][end:]
        holds_side = ("left" in word or "right" in word) and not OTHER_WORDS.fullmatch(word)
        uncertain = uncertain or holds_side or UNKNOWN.fullmatch(word) is not None
        return match[0]

    swapped = WORD.sub(swap, text)
    return None if uncertain else swapped


def _in_case(word: str, like: str) -> str:
    """Return the word in upper case, with a capital, or as it is, as in the word that it replaces."""
    if like.isupper():
        return word.upper()
    return word.capitalize() if like[0].isupper() else word
