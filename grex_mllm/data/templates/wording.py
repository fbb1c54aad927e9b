"""How a meaning is said: one canonical wording, and several that people use for the same."""

from __future__ import annotations

from itertools import chain

from grex_mllm.data.plurals import number_word, plural_phrase, singular_phrase
from grex_mllm.data.templates.meaning import PLURAL, Except, Meaning, Phrase, Pick, Relation, Union, Where
from grex_mllm.data.templates.scene import KINDS

SYNONYMS: dict[str, tuple[tuple[str, str], ...]] = {  # category -> (singular, plural) as people say, where no other category is called so
    "motorcycle": (("motorbike", "motorbikes"),),
    "bicycle": (("bike", "bikes"),),
    "airplane": (("plane", "planes"),),
    "couch": (("sofa", "sofas"),),
    "cell phone": (("phone", "phones"),),
    "potted plant": (("plant", "plants"),),
    "dining table": (("table", "tables"),),
    "donut": (("doughnut", "doughnuts"),),
    "refrigerator": (("fridge", "fridges"),),
    "tv": (("television", "televisions"),),
}
ORDINALS = ("", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
DIGIT_ORDINALS = ("", "1st", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th", "9th", "10th")
SUPERLATIVES = {
    "left": "leftmost",
    "right": "rightmost",
    "top": "topmost",
    "bottom": "bottommost",
    "largest": "largest",
    "smallest": "smallest",
}
BEFORE_NOUN = {  # pick -> words before the noun
    "left": ("leftmost", "far left"),
    "right": ("rightmost", "far right"),
    "top": ("topmost", "highest", "uppermost"),
    "bottom": ("bottommost", "lowest"),
    "largest": ("largest", "biggest"),
    "smallest": ("smallest", "tiniest"),
    "front": ("frontmost", "foremost"),
    "back": ("rearmost",),
}
AFTER_NOUN = {  # pick -> words after the noun
    "left": ("on the far left", "furthest to the left", "farthest left"),
    "right": ("on the far right", "furthest to the right", "farthest right"),
    "top": ("at the very top", "highest up", "highest up in the picture"),
    "bottom": ("at the very bottom", "lowest down", "lowest in the picture"),
    "largest": (),
    "smallest": (),
    "front": ("in front", "in the foreground", "at the front"),
    "back": ("in the back", "in the background", "at the back", "furthest back"),
}
SIDE_AFTER = {
    "left": ("on the left", "on left", "to the left", "on the left side"),
    "right": ("on the right", "on right", "to the right", "on the right side"),
    "top": ("at the top", "up top"),
    "bottom": ("at the bottom", "on the bottom"),
    "middle": ("in the middle", "in the center", "in the centre", "in middle"),
    "top left": ("at the top left", "in the top left corner", "on the upper left", "top left"),
    "top right": ("at the top right", "in the top right corner", "on the upper right", "top right"),
    "bottom left": ("at the bottom left", "in the bottom left corner", "on the lower left", "bottom left"),
    "bottom right": ("at the bottom right", "in the bottom right corner", "on the lower right", "bottom right"),
}
SIDE_BEFORE = {
    "left": ("left",),
    "right": ("right",),
    "top": ("top", "upper"),
    "bottom": ("bottom", "lower"),
    "middle": ("middle", "center"),
}
SIDE_BEFORE |= {
    "top left": ("top left", "upper left"),
    "top right": ("top right", "upper right"),
    "bottom left": ("bottom left", "lower left"),
    "bottom right": ("bottom right", "lower right"),
}
FRAME_AFTER: dict[str, tuple[str, ...]] = {
    side: (f"on the {side} side of the picture", f"in the {side} half of the image", f"on the {side} side of the photo")
    for side in ("left", "right")
}
FRAME_AFTER |= {
    side: (f"in the {side} half of the picture", f"in the {side} part of the image", f"at the {side} of the picture")
    for side in ("top", "bottom")
}
FRAME_AFTER["middle"] = ("in the middle of the picture", "in the center of the image")
FRAME_AFTER |= {
    f"{one} {other}": (f"in the {one} {other} of the picture", f"in the {one} {other} corner of the image")
    for one in ("top", "bottom")
    for other in ("left", "right")
}
RELATION_AFTER = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below", "under"),
    "in front of": ("in front of",),
    "behind": ("behind",),
}
NEAREST_AFTER = ("closest to", "nearest to", "nearest")
MOST_WORDINGS = 40


def canonical(meaning: Meaning) -> str:
    """Return the one wording that is learned and printed for a meaning."""
    return wordings(meaning)[0]


def wordings(meaning: Meaning) -> list[str]:
    """Return different texts that say the same, the canonical one first; at most MOST_WORDINGS."""
    if isinstance(meaning, Phrase):
        found = _phrase(meaning)
    elif isinstance(meaning, Except):
        found = _except(meaning)
    else:
        found = _union(meaning)
    return list(dict.fromkeys(found))[:MOST_WORDINGS]


def nouns(categories: tuple[str, ...], plural: bool) -> list[str]:
    """Return what objects of the categories are called: "people", "motorcycles" or "motorbikes", "vehicles"."""
    for word, members in KINDS.items():
        if members == categories:
            return [plural_phrase(word) if plural else word]
    (category,) = categories
    named = plural_phrase(category) if plural else singular_phrase(category)
    return [named, *(pair[plural] for pair in SYNONYMS.get(category, ()))]


def _phrase(phrase: Phrase, one: str = "") -> list[str]:
    """Return wordings. one: what stands for the noun, where the noun was said before ("one", "ones")."""
    found: list[str] = []
    for noun in [one] if one else nouns(phrase.categories, phrase.number != 1):
        for before, after in _around(phrase):
            words = " ".join(filter(None, (before, noun, after)))
            leads = _leads(phrase, bool(one))
            if phrase.number == PLURAL and not one and noun in nouns(phrase.categories, False):  # "sheep"
                leads = ["all the", "all"]
            found += [f"{lead} {words}" if lead else words for lead in leads]
            if phrase.number > 1 and phrase.pick and not phrase.pick.rank and before:
                found.append(f"the {before} {number_word(phrase.number)} {' '.join(filter(None, (noun, after)))}")
    return found


def _leads(phrase: Phrase, anaphoric: bool) -> list[str]:
    if anaphoric:
        return ["the"] if phrase.number in (PLURAL, 1) else [f"the {number_word(phrase.number)}"]
    if phrase.number == 1:
        return ["the", ""]
    if phrase.number == PLURAL:
        return ["the", "all the", "all", ""] if phrase.plain else ["the", "", "all the"]
    word = number_word(phrase.number)
    both = ["both", "both of the"] if phrase.number == 2 and not phrase.pick else []
    return [f"the {word}", word, *both, str(phrase.number), *([f"all {word}"] if phrase.plain and phrase.number > 2 else [])]


def _around(phrase: Phrase) -> list[tuple[str, str]]:
    """Return (words before the noun, words after it), the canonical ones first."""
    befores: list[tuple[str, str]] = [("", "")]
    if phrase.pick:
        befores = _pick(phrase.pick)
    for condition in phrase.conditions:
        added = _where(condition, phrase.number == 1) if isinstance(condition, Where) else _relation(condition)
        befores = [
            (" ".join(filter(None, (b1, b2))), " ".join(filter(None, (a1, a2))))
            for b1, a1 in befores
            for b2, a2 in added
            if not (b1 and b2) and not (a1 and a2 and len(added) > 1 and a1 != befores[0][1])
        ]
    if phrase.colour and phrase.negated_colour:
        said = "that is not" if phrase.number == 1 else "that are not"
        befores = [(b, " ".join(filter(None, (a, f"{said} {phrase.colour}")))) for b, a in befores]
    elif phrase.colour:
        befores = [(" ".join(filter(None, (b, phrase.colour))), a) for b, a in befores]
    return befores


def _pick(pick: Pick) -> list[tuple[str, str]]:
    if pick.by == "nearest":
        assert pick.anchor is not None
        return [("", f"{words} {canonical(pick.anchor)}") for words in NEAREST_AFTER]
    if pick.rank:
        side = f"from the {pick.by}"
        order = ORDINALS[pick.rank]
        return [(order, side), (DIGIT_ORDINALS[pick.rank], side), ("", f"{order} {side}"), (order, f"from {pick.by}")]
    before, after = [(word, "") for word in BEFORE_NOUN[pick.by]], [("", words) for words in AFTER_NOUN[pick.by]]
    if pick.by in ("front", "back"):
        return [*after, *before]
    return [*before[:1], *after, *before[1:]]


def _where(where: Where, single: bool) -> list[tuple[str, str]]:
    if where.frame:
        return [("", f"{'not ' * where.negated}{words}") for words in FRAME_AFTER[where.side]]
    if where.negated:
        return [("", f"{lead} not {SIDE_AFTER[where.side][0]}".strip()) for lead in ("", "that is" if single else "that are")]
    after, before = [("", words) for words in SIDE_AFTER[where.side]], [(word, "") for word in SIDE_BEFORE[where.side]]
    return [*after[:1], *before, *after[1:]]


def _relation(relation: Relation) -> list[tuple[str, str]]:
    anchor = canonical(relation.anchor)
    short = anchor.removeprefix("the ")
    texts = chain((f"{words} {anchor}" for words in RELATION_AFTER[relation.kind]), (f"{RELATION_AFTER[relation.kind][-1]} {short}",))
    return [("", text) for text in texts]


def _except(meaning: Except) -> list[str]:
    base = meaning.base
    many, one = nouns(base.categories, True)[0], nouns(base.categories, False)[0]
    minus = _again(meaning.minus, base)
    whole = canonical(base).removeprefix("all ").removeprefix("the ")
    found = [f"all the {whole} except {minus[0]}"]
    for said in minus:
        found += [f"all the {whole} but {said}", f"all {whole} except {said}", f"the {whole} other than {said}"]
        if base.plain:
            found += [f"every {one} except {said}", f"every {one} but {said}"]
            if base.categories == ("person",):
                found += [f"everyone except {said}", f"everybody but {said}"]
    if base.plain:
        found += [f"all {many} but {canonical(meaning.minus)}", f"all but {canonical(meaning.minus)}"]
    return found


def _again(meaning: Meaning, base: Phrase) -> list[str]:
    """Return wordings of a part of the base, its noun said again or replaced by "one"."""
    if not isinstance(meaning, Phrase):
        return wordings(meaning)[:3]
    if meaning.categories != base.categories or meaning.plain or (meaning.pick and meaning.pick.anchor):
        return wordings(meaning)[:4]
    return [*_phrase(meaning, "one" if meaning.number == 1 else "ones")[:3], *wordings(meaning)[:4]]


def _union(meaning: Union) -> list[str]:
    full = [wordings(part) for part in meaning.parts]
    found = [_joined([texts[0] for texts in full])]
    first = meaning.parts[0]
    if isinstance(first, Phrase):
        again = [
            _phrase(part, "one" if part.number == 1 else "ones")
            for part in meaning.parts[1:]
            if isinstance(part, Phrase) and part.categories == first.categories and not part.plain and not first.plain
        ]
        if len(again) == len(meaning.parts) - 1:
            found += [_joined([full[0][n % len(full[0])], *(texts[n % len(texts)] for texts in again)]) for n in range(6)]
    found += [_joined([texts[n % len(texts)] for texts in full]) for n in range(1, 8)]
    if len(full) == 2:
        found.append(f"both {full[0][0]} and {full[1][0]}")
    return found


def _joined(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
