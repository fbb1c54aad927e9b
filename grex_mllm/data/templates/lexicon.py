"""The words of templated expressions, as `parsing.py` looks them up: by the first word, each entry a tuple of words."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import product
from typing import TypeVar

from grex_mllm.data.plurals import NUMBERS as NUMBER_WORDS
from grex_mllm.data.plurals import plural_phrase, singular_phrase
from grex_mllm.data.templates.colours import COLOUR_WORDS
from grex_mllm.data.templates.meaning import Pick, Where
from grex_mllm.data.templates.scene import KINDS
from grex_mllm.data.templates.wording import DIGIT_ORDINALS, ORDINALS, SYNONYMS

Value = TypeVar("Value")
Words = dict[str, list[tuple[tuple[str, ...], Value]]]

NUMBERS = {word: n for n, word in enumerate(NUMBER_WORDS) if n} | {str(n): n for n in range(1, 100)}
ORDER = {word: n for words in (ORDINALS, DIGIT_ORDINALS) for n, word in enumerate(words) if word}
COLOURS = COLOUR_WORDS
DIRECTIONS_FROM = {"left": "left", "right": "right", "top": "top", "bottom": "bottom"}
PICTURE = ("", "of the picture", "of the image", "of the photo", "of the scene", "of the frame", "of picture", "of image", "of photo")
PREPOSITIONS = ("on", "at", "in", "to", "towards")
SIDE_NAMES = {"left": ("left",), "right": ("right",), "top": ("top", "upper"), "bottom": ("bottom", "lower")}
SIDE_NAMES |= {"middle": ("middle", "center", "centre", "central")}
SIDE_NAMES |= {
    f"{one} {other}": tuple(f"{word} {other}" for word in SIDE_NAMES[one]) for one in ("top", "bottom") for other in ("left", "right")
}
FAR = {"left": "left", "right": "right"}


def _words(pairs: Iterable[tuple[str, Value]]) -> Words[Value]:
    """Return entries by their first word, none twice."""
    found: Words[Value] = {}
    for text, value in dict.fromkeys(pairs):
        entry = tuple(text.split())
        found.setdefault(entry[0], []).append((entry, value))
    return found


def _before() -> Iterable[tuple[str, Where | Pick]]:
    for side, names in SIDE_NAMES.items():
        yield from ((name, Where(side)) for name in names)
    for by, texts in {
        "left": ("leftmost", "far left", "furthest left", "farthest left", "extreme left"),
        "right": ("rightmost", "far right", "furthest right", "farthest right", "extreme right"),
        "top": ("topmost", "uppermost", "highest"),
        "bottom": ("bottommost", "lowest"),
        "largest": ("largest", "biggest"),
        "smallest": ("smallest", "tiniest", "littlest"),
        "front": ("front", "frontmost", "foremost", "foreground"),
        "back": ("back", "rear", "rearmost", "backmost", "background"),
    }.items():
        yield from ((text, Pick(by)) for text in texts)


def _after() -> Iterable[tuple[str, Where | Pick]]:
    for side, names in SIDE_NAMES.items():
        for name in names:
            for prep, article, part, picture in product(PREPOSITIONS, ("", "the"), ("", "side", "half", "part", "corner", "edge"), PICTURE):
                framed = bool(picture) or part in ("half", "part")
                yield " ".join(filter(None, (prep, article, name, part, picture))), Where(side, framed)
            if side != "middle":
                yield name, Where(side)
    yield "up top", Where("top")
    yield from _furthest()


def _furthest() -> Iterable[tuple[str, Pick]]:
    for side in ("left", "right", "top", "bottom"):
        for picture in PICTURE:
            for prep, word in product(("on", "at", "to"), ("far", "very", "extreme", "furthest", "farthest")):
                yield f"{prep} the {word} {side} {picture}", Pick(side)
            for word, link in product(("furthest", "farthest"), ("to the", "on the", "to", "")):
                yield f"{word} {link} {side} {picture}", Pick(side)
        for edge in ("edge", "side", "edge of the picture", "edge of the image"):
            yield f"closest to the {side} {edge}", Pick(side)
    for where in ("", "in the picture", "in the image", "in the photo"):
        for text, by in (("highest up", "top"), ("highest", "top"), ("lowest down", "bottom"), ("lowest", "bottom")):
            yield f"{text} {where}", Pick(by)
    for text in ("in front", "in the front", "at the front", "in the foreground", "in foreground", "closest to the camera", "up front"):
        yield text, Pick("front")
    back = ("in the back", "at the back", "in back", "in the background", "in background", "furthest back", "farthest back")
    for text in (*back, "furthest from the camera", "farthest from the camera"):
        yield text, Pick("back")
    for by, text in (("largest", "that looks biggest"), ("smallest", "that looks smallest")):
        yield text, Pick(by)


BEFORE: Words[Where | Pick] = _words(_before())
AFTER: Words[Where | Pick] = _words((" ".join(text.split()), item) for text, item in _after())
EXCEPT: Words[None] = _words(
    (text, None)
    for text in (
        *("except", "except for", "but", "but not", "other than", "besides", "apart from", "excluding", "minus", "not including"),
        *("aside from", "without"),
    )
)
LINKS: Words[None] = _words((f"{who} {verb}", None) for who, verb in product(("that", "which", "who"), ("is", "are", "s")))
LINKS["is"], LINKS["are"] = [(("is",), None)], [(("are",), None)]
RELATIONS_AFTER: Words[str] = _words(
    [
        *(
            (f"{prep}{side} {part}of", f"{side} of")
            for side in ("left", "right")
            for prep in ("to the ", "on the ", "")
            for part in ("", "side ")
        ),
        *(("above", "above"), ("over", "above"), ("below", "below"), ("under", "below"), ("beneath", "below"), ("underneath", "below")),
        *(("in front of", "in front of"), ("before", "in front of"), ("behind", "behind")),
    ]
)
NEAREST: Words[str] = _words(
    (text, "nearest")
    for text in ("closest to", "nearest to", "nearest", "next to", "near", "beside", "by", "close to", "right next to", "near to")
)


@lru_cache(maxsize=16)
def vocabulary(categories: tuple[str, ...]) -> Words[tuple[tuple[str, ...], bool | None]]:
    """Return what objects of the categories are called: noun -> (categories, is it a plural; None = either)."""
    forms: dict[str, dict[tuple[str, ...], set[bool]]] = {}

    def add(text: str, named: tuple[str, ...], plural: bool) -> None:
        forms.setdefault(text, {}).setdefault(named, set()).add(plural)

    for category in categories:
        named = (category,)
        for one, many in ((singular_phrase(category), plural_phrase(category)), *SYNONYMS.get(category, ())):
            add(one, named, False)
            add(many, named, True)
        add(category, named, False)
    if "person" in categories:
        add("persons", ("person",), True)
    for word, members in KINDS.items():
        if set(members) & set(categories):
            add(word, members, False)
            add(plural_phrase(word), members, True)
    return _words(
        (text, (named, None if len(plural) == 2 else plural.pop())) for text, found in forms.items() for named, plural in found.items()
    )
