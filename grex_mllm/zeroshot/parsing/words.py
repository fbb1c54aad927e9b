"""What an answer says in words: that nothing matches, that it will not or cannot answer, yes or no (rules N, O, P).

The tables of the languages stand in `languages.py`. All functions take text in any case; lengths are bounded by the caller.
"""

from __future__ import annotations

import re

from grex_mllm.zeroshot.parsing.languages import DENIALS, NO, NOTHING, REFUSALS, STRONG_DENIALS, YES

_REFUSAL = re.compile("|".join(f"(?:{p})" for p in REFUSALS), re.IGNORECASE)
_STRONG = re.compile("|".join(f"(?:{p})" for p in STRONG_DENIALS), re.IGNORECASE | re.MULTILINE)
_DENIAL = re.compile("|".join(f"(?:{p})" for p in (*STRONG_DENIALS, *DENIALS)), re.IGNORECASE | re.MULTILINE)
_NONE = re.compile(
    rf"(?:[^\n:]{{0,60}}[:=]\s*)?[\W_]*(?:{'|'.join(re.escape(word) for word in sorted(NOTHING, key=len, reverse=True))})(?:[\W_])*",
    re.IGNORECASE,
)
_NO_THING = re.compile(r"\W*no (?!problem|doubt|worries|idea|clue|comment|other|need|way)(?:[\w'-]+ ){0,5}[\w'-]+\W*", re.IGNORECASE)
_CLAUSE = re.compile(r"[.!?;,\n。！？；，、]")
_YES, _NO = frozenset(YES), frozenset(NO)
MASK = "§"  # stands where a group of numbers was
FAR = 20_000  # words are looked for in so many characters at the beginning and at the end


def none_word(text: str) -> bool:
    """Whether a text is but a word for nothing: none, not found, N/A, 没有, ..., maybe behind a colon."""
    return len(text) < 200 and _NONE.fullmatch(plain(text).strip()) is not None


def says_none(text: str) -> bool:
    """Whether a text is but a word for nothing (see `none_word`), a short "no dog", or a short denial."""
    if len(text) >= 200:
        return False
    text = plain(text).strip()
    return none_word(text) or _NO_THING.fullmatch(text) is not None or (len(text) > 3 and denies(text))


def denies(text: str, loose: bool = False) -> bool:
    """Whether a text says that what was asked for is not in the picture.

    loose: it holds groups of numbers, masked by MASK. A denial in the clause of such a group describes the object ("the woman who has no
    hat"), unless it is of the kind "there is no ...".
    """
    text = _REFUSAL.sub(" ", plain(text))
    if not loose:
        return _DENIAL.search(text) is not None
    if _STRONG.search(text.replace(MASK, "")):
        return True
    clauses = _CLAUSE.sub("\n", text).split("\n")
    return _DENIAL.search("\n".join(clause for clause in clauses if MASK not in clause)) is not None


def refuses(text: str) -> bool:
    """Whether a text denies the ability or the permission to answer. An apology alone decides nothing."""
    return _REFUSAL.search(plain(text)) is not None


def says_yes(text: str) -> bool:
    """Whether a text is but a word for yes."""
    return text.strip(" .!,\"'").lower() in _YES


def says_no(text: str) -> bool:
    """Whether a text is but a word for no."""
    return text.strip(" .!,\"'").lower() in _NO or says_none(text)


def yes_or_no(text: str) -> bool | None:
    """Return what the first word says, else what the sentences say; None where neither does."""
    text = plain(text).strip()
    lower = text.lower().lstrip("*_#>-\"'([ \n")
    for words, meaning in ((NO, False), (YES, True)):
        if any(lower.startswith(word) and not _goes_on(word, lower[len(word) :]) for word in words):
            return meaning
    last = re.split(r"[:：\n]|\banswer is\b", lower.rstrip(" .!*_\"'\n"))[-1].strip(" .!,*_\"'")
    for said in (last, re.split(r"\W+", last)[-1]):
        if said in _NO or said in _YES:
            return said in _YES
    if refuses(text):
        return None
    if denies(text):
        return False
    return True if _AFFIRMS.search(text) else None


_AFFIRMS = re.compile(
    r"\bthere (?:is|are|appears? to be|seems? to be)\b|\b(?:is|are) (?:\w+ )?(?:present|visible|shown|depicted|in the (?:image"
    r"|picture|photo|scene))\b"
    r"|\bi (?:can |do )?see\b|\b(?:image|picture|photo|scene) (?:shows?|contains?|depicts?|includes?|has)\b|\bil y a\b|\bes gibt\b"
    r"|\bhay\b|\bhá\b"
    r"|\bc'è\b|\bci sono\b|有|存在|います|あります|있습니다|есть|jest\b|\bvar\b|يوجد|है",
    re.IGNORECASE,
)


def _goes_on(word: str, rest: str) -> bool:
    """Whether a word of the alphabet goes on behind what was matched: "now" is no "no"; nor is "no one" or "no-one" more than a denial."""
    return word[-1].isascii() and word[-1].isalpha() and rest[:1].isalnum()


def plain(text: str) -> str:
    """Return the beginning and the end of a text, spaces and apostrophes made alike."""
    if len(text) > 2 * FAR:
        text = f"{text[:FAR]}\n{text[-FAR:]}"
    return re.sub(r"[^\S\n]+", " ", text.replace("’", "'").replace("_", " "))
