"""What a follow-up leaves over, in words that a model knows: "the red one" becomes "all red circles" where circles were spoken of.

A model is asked for all objects that fit, because which of them is meant depends on the selection, which it does not know; how many are
wanted, and an order such as "the biggest" or "the second from the left", are left to the composition of sets.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from grex_mllm.data.plurals import IRREGULAR, NUMBERS, PAIRS, UNCHANGED, WITH_VES, plural_phrase

LARGEST, SMALLEST = "largest", "smallest"
GENERIC = {
    "one",
    "ones",
    "object",
    "objects",
    "thing",
    "things",
    "shape",
    "shapes",
    "item",
    "items",
    "everything",
    "all",
    "something",
    "someone",
}
_COUNTS = {word: number for number, word in enumerate(NUMBERS) if number > 1} | {"both": 2}
_DETERMINERS = {"the", "all", "every", "each", "any", "this", "that", "these", "those", "a", "an", "its", "their", "of", "just", "only"}
_HANGS_ON = {
    "that",
    "which",
    "who",
    "with",
    "without",
    "on",
    "in",
    "at",
    "to",
    "from",
    "of",
    "near",
    "next",
    "above",
    "below",
    "under",
    "behind",
}
_HANGS_ON |= {"between", "having", "not", "by", "closest", "nearest", "farthest", "furthest"}
_ORDINALS = {word: rank for rank, word in enumerate(("first", "second", "third", "fourth", "fifth"), start=1)}
_SIZES = {
    **dict.fromkeys(("largest", "biggest", "bigger", "larger", "greatest"), LARGEST),
    **dict.fromkeys(("smallest", "smaller", "littlest", "tiniest"), SMALLEST),
}
_SIDES = {
    **dict.fromkeys(("leftmost", "left"), "left"),
    **dict.fromkeys(("rightmost", "right"), "right"),
    **dict.fromkeys(("topmost", "top", "upper", "uppermost", "highest"), "top"),
    **dict.fromkeys(("bottommost", "bottom", "lower", "lowermost", "lowest"), "bottom"),
}
_SIDE = r"(?P<side>left|right|top|bottom)"
_PLACE = re.compile(rf"(?:on|at|to|in) the (?:far )?{_SIDE}(?: (?:side|half))?|farthest (?:to the )?(?P<far>left|right)")
_LARGE, _SMALL = "large", "small"


@dataclass(frozen=True)
class Phrase:
    """What is looked for.

    texts: ways to ask for all objects that fit; none where everything does.  number: how many are wanted, None for all that fit.
    order: (LARGEST, SMALLEST or a side, rank from 1) among those that fit, None for no order.
    """

    texts: tuple[str, ...]
    number: int | None = None
    order: tuple[str, int] | None = None


def read_phrase(rest: str, kind: str | None) -> Phrase:
    """Read what a follow-up leaves over. kind: plural noun of what was spoken of, which "one" and "ones" stand for."""
    words = re.sub(r"^(?:all )?(?:of )?those (?=(?:that|which|who|with|without|on|in|at)\b)", "ones ", rest).split()
    number, every = None, False
    while words and (words[0] in _DETERMINERS or words[0] in _COUNTS or words[0].isdecimal()):
        if len(words) > 1 and words[0] in ("that", "which") and words[1] in ("is", "are"):
            break
        word = words.pop(0)
        every = every or word in ("every", "each", "all", "any")
        if word in _COUNTS or (word.isdecimal() and int(word) > 0):
            number = _COUNTS.get(word) or int(word)
    order, words = _order(words)
    before, after = _split(words)
    head = before[-1] if before else "one"
    adjectives = before[:-1]
    several = is_plural(head) or (not before and number is not None)
    if not several and not every and number is None:
        number = 1
    if order is not None and several and number is None:  # "the biggest ones", "the left ones": no order, a property
        adjectives, after, order = _as_property(order[0], adjectives, after)
    elif order is None and number is not None:
        order, after = _place_as_order(after)
    nouns = [noun for noun in (kind, "objects") if noun] if head in GENERIC else [plural_of(head)]
    if head in GENERIC and not adjectives and not after:
        return Phrase((), number, order)
    tail = re.sub(r"\b(that|which|who) is\b", r"\1 are", " ".join(after))
    bodies = [" ".join([*adjectives, noun, *([tail] if tail else [])]) for noun in nouns]
    return Phrase(tuple(f"{quantifier} {body}" for body in bodies for quantifier in ("all", "the")), number, order)


def addressed(rest: str, kind: str | None) -> str:
    """Return what is left as an expression of its own: "the red one" as "the red circle" where circles were spoken of."""
    plural = kind or "objects"
    words = rest.split()
    before, _ = _split(words)
    place = len(before) - 1
    if before and before[place] in ("one", "ones"):
        words[place] = plural if before[place] == "ones" else singular_of(plural)
    return " ".join(words)


def kind_of(expression: str) -> str | None:
    """Return the plural of the noun that an expression is about, or None where it names several kinds, or none."""
    text = re.sub(r"[^\w\s'-]", " ", expression.lower())
    text = re.split(r"\b(?:except|but|besides)\b", text)[0]
    found = set()
    for part in re.split(r"\b(?:and|or)\b", text):
        before, _ = _split(part.split())
        if not before or before[-1] in GENERIC:
            return None
        found.add(plural_of(before[-1]))
    return found.pop() if len(found) == 1 else None


def is_plural(word: str) -> bool:
    """Tell whether a noun is in the plural, as far as its ending tells."""
    return word in IRREGULAR.values() or word in PAIRS or (word.endswith("s") and not word.endswith("ss"))


def plural_of(word: str) -> str:
    """Return the plural of a noun that may be in the plural already."""
    return word if is_plural(word) else plural_phrase(word).split()[-1]


def singular_of(word: str) -> str:
    """Return the singular of a noun that may be in the singular already."""
    irregular = {plural: noun for noun, plural in IRREGULAR.items()} | {plural_phrase(noun): noun for noun in WITH_VES}
    if word in irregular:
        return irregular[word]
    if not is_plural(word) or word in PAIRS or word in UNCHANGED:
        return word
    if word.endswith("ies") and len(word) > 4:
        return f"{word[:-3]}y"
    return word[:-2] if word.endswith(("sses", "xes", "zes", "ches", "shes")) else word[:-1]


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Split words before what hangs on the noun ("red circles", "on the left")."""
    for place, word in enumerate(words):
        if word in _HANGS_ON or (place > 0 and word.endswith("ing") and word not in ("ring", "building", "king", "ceiling", "painting")):
            return words[:place], words[place:]
    return words, []


def _order(words: list[str]) -> tuple[tuple[str, int] | None, list[str]]:
    """Take an order off the words: "biggest", "second ... from the left", "leftmost"."""
    rank = _ORDINALS.get(words[0]) if words else None
    counted = re.fullmatch(rf"(?P<what>.*?)\s?from (?:the )?{_SIDE}", " ".join(words[1:])) if rank else None
    if rank and counted:
        return (counted["side"], rank), counted["what"].split() or ["one"]
    for place, word in enumerate(words[:2]):
        name = _SIZES.get(word) or _SIDES.get(word)
        ranked = _ORDINALS.get(words[0], 1) if place else 1
        if name and (place == 0 or words[0] in _ORDINALS):
            return (name, ranked), words[place + 1 :] or ["one"]
    return None, words


def _as_property(name: str, adjectives: list[str], after: list[str]) -> tuple[list[str], list[str], None]:
    if name in (LARGEST, SMALLEST):
        return [_LARGE if name == LARGEST else _SMALL, *adjectives], after, None
    return adjectives, [*("on the" if name in ("left", "right") else "at the").split(), name, *after], None


def _place_as_order(after: list[str]) -> tuple[tuple[str, int] | None, list[str]]:
    """Read "on the left" of a stated number as an order: of several selected ones, the one on the left is the leftmost."""
    found = _PLACE.fullmatch(" ".join(after))
    return ((found["side"] or found["far"], 1), []) if found else (None, after)
