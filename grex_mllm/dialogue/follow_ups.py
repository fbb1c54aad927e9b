"""Read a follow-up ("and the dog too", "not the red one", "the one next to them"): its operation on the selected set, and what is left.

Rules over plain English, no model: a text that no rule knows is an expression of its own and starts a new set. The rules see the text
alone; whether anything is selected is the session's business.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

NEW, UNION, DIFFERENCE, RESTRICTION, NEIGHBOUR, COMPLEMENT = "new", "union", "difference", "restriction", "neighbour", "complement"
OPERATIONS = (NEW, UNION, DIFFERENCE, RESTRICTION, NEIGHBOUR, COMPLEMENT)

# What stands for the selected objects, and what stands for some of them or for objects like them.
_THEM = (
    r"(?:it|them|him|her|(?:this|that|these|those)(?: (?:ones?|two|three|objects?|things?))?|(?:the|my|your) (?:selected|marked)(?: \w+)?"
)
_THEM += r"|the (?:current |last )?(?:selection|set))"
_OF_THEM = rf"(?:of|among|amongst|from|out of|within|in) (?:all )?(?:of )?{_THEM}"
_DETERMINER = r"(?:the|all|every|each|both|any|this|that|these|those|a|an|one|two|three|four|five|six|\d+|no|its|their)"
_SIDES = {
    "left": r"(?:to the left of|left of|on the left (?:side )?of)",
    "right": r"(?:to the right of|right of|on the right (?:side )?of)",
    "top": r"(?:above|over|on top of)",
    "bottom": r"(?:below|under|underneath|beneath)",
}
_OWN_SIDES = {side: rf"(?:on|to|at) (?:its|their|his|her) {side}(?: side)?" for side in ("left", "right")}
_BESIDE = r"(?:next to|beside|besides|near|nearest(?: to)?|closest(?: to)?|close to|nearby|adjacent to|alongside|touching|by the side of)"
_LINK = r"(?:(?:that|which|who) (?:is|are|stands?|sits?|lies?) |(?:standing|sitting|lying|right|just|directly|immediately|located) )*"
_STARTS_UNION = r"(?:(?:and )?(?:also|plus|add|adding|include|including|together with|along with|as well as)|and)(?: also| add| with)?"
_ENDS_UNION = r"(?:too|as well|also|in addition|to (?:it|them|that|these|those|the (?:selection|set)))"
_REMOVE = r"(?:not|without|except(?: for)?|excepting|excluding|exclude|minus|less|remove|removing|drop|delete|omit|skip|subtract|unselect"
_REMOVE += r"|deselect|ignore|discard|forget(?: about)?|leave out|leaving out|take away|take out|all but|all except(?: for)?|other than"
_REMOVE += r"|apart from|anything but)"
_ONLY = r"(?:only|just|merely|solely|keep(?: only| just)?|retain(?: only)?"
_ONLY += r"|(?:restrict|narrow|limit|reduce)(?: (?:it|them|this|that))?(?: down)? to)"
_ASKS_WHICH = rf"(?:which|what)(?: ones?)?(?: {_OF_THEM})? (is|are|has|have)"
# "the red one", "both big ones", "the ones on the left", "those with stripes": what refers without a noun of its own
_HANGS_ON = (
    r"(?:that|which|who|with|without|on|in|at|to|from|of|near|next|left|right|above|below|under|behind|wearing|holding|between|having"
)
_HANGS_ON += r"|standing|sitting|lying|farthest|furthest|closest|nearest|facing|not)"
_NO_ADJECTIVE = r"(?:except|but|and|or|nor|not|without|of|that|than|which|who|one|ones)\b"
_WITHOUT_NOUN = rf"(?:(?:{_DETERMINER} )?(?:(?!{_NO_ADJECTIVE})[\w-]+ )*ones?(?: {_HANGS_ON}\b.*)?"
_WITHOUT_NOUN += r"|those (?:that|which|who|with|without|on|in|at)\b.*)"
_BARE_ONE = re.compile(r"one(?: .*)?")  # "one", "one of the dogs": a number
_FILLER = re.compile(
    r"(?:(?:no|ok|okay|yes|now|then|please|well|so|hm|hmm|actually|sorry|i mean|i meant|show(?: me)?|select|mark|find|give me|let us see"
    r"|let's see|i want|what about|how about)\b,? )+(?=\S)"
)


@dataclass(frozen=True)
class FollowUp:
    """operation: one of OPERATIONS.  rest: the expression that is left, "" for none.  side: on which a neighbour lies, "" for any.

    inner: what is added, where that is a follow-up itself ("and the one next to them").
    """

    operation: str
    rest: str = ""
    side: str = ""
    inner: FollowUp | None = None


def parse_follow_up(text: str) -> FollowUp:
    """Return what a text asks for. One that is no follow-up comes back as NEW with its text unchanged."""
    words = _plain(text)
    for rule in (_complement, _neighbour, _union, _difference, _restriction):
        found = rule(words)
        if found is not None:
            return found
    return FollowUp(NEW, text)


def _plain(text: str) -> str:
    """Lower the case, drop punctuation, politeness and what opens a sentence."""
    words = " ".join(re.sub(r"[.,;:!?\"“”…]+", " ", text.lower().replace("’", "'")).split())
    words = re.sub(r"\b(what|who|which)'s\b", r"\1 is", words)
    words = re.sub(r"\b(?:please|though|anymore|any more)$", "", words).strip()
    return _FILLER.sub("", words, count=1) if _FILLER.match(words) else words


def _complement(words: str) -> FollowUp | None:
    whole = rf"(?:(?:all |all of )?the (?:others|rest|remainder)(?: {_OF_THEM}| of the (?:objects|picture|image|things))?"
    whole += r"|(?:all )?others|(?:everything|everyone|everybody|anything|all|whatever|every one) else|all the rest"
    whole += r"|(?:the |all |all the )?(?:remaining|other) (?:ones|objects|things)"
    whole += rf"|(?:the )?(?:opposite|complement|inverse)(?: of {_THEM})?|(?:invert|reverse|flip)(?: (?:it|the selection))?"
    whole += rf"|(?:everything|everyone|all|all objects|everybody) (?:but|except(?: for)?|other than|apart from) {_THEM}"
    whole += rf"|not {_THEM}|all but {_THEM})"
    if re.fullmatch(whole, words):
        return FollowUp(COMPLEMENT)
    kind = re.fullmatch(r"(?:(?:all|all of|every|each|any|both) )?(?:the )?(?:other|remaining|rest of the) (?!than )(.+)", words)
    if kind and not re.search(rf"\b{_BESIDE} {_THEM}$", words):
        return FollowUp(COMPLEMENT, kind[1])
    return None


def _neighbour(words: str) -> FollowUp | None:
    head = r"(?:(?P<head>.+?) )"
    for side in ("left", "right", "top", "bottom"):
        own = rf"|{_OWN_SIDES[side]}" if side in _OWN_SIDES else ""
        found = re.fullmatch(rf"{head}{_LINK}(?:{_SIDES[side]} {_THEM}{own})", words)
        if found and _heads(found["head"]):
            return FollowUp(NEIGHBOUR, _subject(found["head"]), side)
    found = re.fullmatch(rf"{head}{_LINK}(?:{_BESIDE} {_THEM}|nearby|close by|next door)", words)
    if found and _heads(found["head"]):
        return FollowUp(NEIGHBOUR, _subject(found["head"]))
    near = r"(?P<det>the )?(?:(?P<number>two|three|four|five|six) )?(?:nearest|closest)"
    found = re.fullmatch(rf"{near}(?: (?P<head>.+?))?(?: (?:to|from) {_THEM})?", words)
    if found and (found["det"] or found["number"] or found["head"]):
        number = f" {found['number']}" if found["number"] else ""
        return FollowUp(NEIGHBOUR, f"the{number} {found['head'] or ('ones' if number else 'one')}")
    whose = r"(?:its|their|his|her|the|all|all the|all its|all their)"
    found = re.fullmatch(rf"{whose} (?:(nearest|closest|next|direct|left|right) )?neighbou?r(s?)", words)
    if found:
        return FollowUp(NEIGHBOUR, "the ones" if found[2] else "the one", found[1] if found[1] in _OWN_SIDES else "")
    return None


def _heads(head: str) -> bool:
    """Tell whether what stands before "next to them" names what is looked for, and does not begin another follow-up."""
    return not re.match(rf"(?:{_STARTS_UNION}|{_REMOVE}|{_ONLY})\b", head)


def _subject(head: str) -> str:
    """Return "the one" for "what", "who is" and the like, which name no kind."""
    one = r"(?:what|who|which(?: one)?|whatever|whoever|that|the object|the thing|something)(?: is| are| stands| sits| lies)?"
    if re.fullmatch(one, head):
        return "the one"
    several = r"(?:everything|everyone|all|those|the things|the objects|all objects)(?: that (?:is|are))?"
    return "the ones" if re.fullmatch(several, head) else head


def _union(words: str) -> FollowUp | None:
    opened = re.fullmatch(rf"{_STARTS_UNION} (.+)", words)
    rest = opened[1] if opened else words
    if opened and re.match(rf"(?:{_REMOVE}|{_ONLY})\b", rest):  # "and not the red one": the "and" opens a sentence
        return _difference(rest) or _restriction(rest)
    inner = _complement(rest) or _neighbour(rest)
    closed = re.fullmatch(rf"(.+?)(?: {_ENDS_UNION})+", rest) if inner is None else None
    if closed:
        rest = closed[1]
        inner = _complement(rest) or _neighbour(rest)
    return FollowUp(UNION, rest if inner is None else "", inner=inner) if opened or closed else None


def _difference(words: str) -> FollowUp | None:
    opening = rf"(?:but |and )?(?:(?:{_THEM}|all of {_THEM}|the same(?: ones)?|keep {_THEM}|keep all) (?:but |and )?)?"
    found = re.fullmatch(rf"{opening}{_REMOVE} (?P<rest>.+?)", words)
    aside = re.fullmatch(r"(?:leave|take|throw|kick) (?P<rest>.+?) (?:out|away|off)", words)
    if found is None and aside is None:
        return None
    rest = _without_them((found or aside)["rest"])  # type: ignore[index]
    if re.match(r"(?:only|just)\b", rest):
        return None
    named = re.match(rf"{_DETERMINER}\b", rest) or re.search(r"\bones?\b", rest) or aside
    if not named and re.match(rf"{opening}(?:not|without)\b", words):
        hanging = f"without {rest}" if re.match(rf"{opening}without\b", words) else f"that are not {rest}"
        return FollowUp(RESTRICTION, f"the ones {hanging}")
    return FollowUp(DIFFERENCE, rest)


def _without_them(rest: str) -> str:
    return re.sub(rf" {_OF_THEM}$", "", rest)


def _restriction(words: str) -> FollowUp | None:
    asks = re.fullmatch(rf"{_ASKS_WHICH} (?P<rest>.+)", words)
    if asks:
        verb = {"is": "that are", "are": "that are", "has": "with", "have": "with"}[asks[1]]
        return FollowUp(RESTRICTION, f"the ones {verb} {asks['rest']}")
    for pattern in (
        rf"(?:{_OF_THEM} )?(?:i want )?{_ONLY} (?P<rest>.+?)(?: {_OF_THEM}| only| alone)?",
        rf"{_OF_THEM} (?P<rest>.+?)",
        rf"(?P<rest>.+?) (?:{_OF_THEM}|only|alone)",
        rf"(?P<rest>{_WITHOUT_NOUN})",
    ):
        found = re.fullmatch(pattern, words)
        if found and not _BARE_ONE.fullmatch(found["rest"]):
            return FollowUp(RESTRICTION, found["rest"])
    return None
