"""From a raw answer to one expression for a set of objects: the first phrase, bare."""

from __future__ import annotations

import json
import re

from grex_mllm.zeroshot.base import RawAnswer
from grex_mllm.zeroshot.parsing.clean import Cleaned, clean
from grex_mllm.zeroshot.parsing.grounding import refusal_of
from grex_mllm.zeroshot.parsing.keys import normal
from grex_mllm.zeroshot.parsing.parsed import ParsedExpression
from grex_mllm.zeroshot.parsing.values import Node, Word, values
from grex_mllm.zeroshot.parsing.words import none_word, plain, refuses

MAX_WORDS = 60
_KEYS = (
    *("expression", "referringexpression", "phrase", "description", "answer", "text", "caption", "output", "result", "response"),
    *("sentence", "label"),
)
_QUOTES = "\"'`“”„«»‘’「」『』《》"
_LEAD = re.compile(
    r"^\s*(?:(?:sure|certainly|of course|okay|ok|absolutely|yes|here you go|great)\b[,.!:]*\s*)?"
    r"(?:(?:here(?:'s| is| are)|this is|that would be)\s+(?:the |a |an |one |my )?(?:[\w-]+ ){0,4}?(?:expression|phrase"
    r"|description|answer|sentence|caption|response)\b[^:\n]{0,60}:\s*"
    r"|(?:(?:the|a|my|one) )?(?:(?:short|single|referring|final|common|shared|best|possible|suitable|unique|distinctive"
    r"|english) )*(?:expression|phrase|description|answer|caption|output|response"
    r"|sentence|result)s?\b[^:\n]{0,60}?(?::|\b(?:is|would be|could be)\b:?)\s*"
    r"|(?:expression|phrase|answer|output|respuesta|réponse|antwort|risposta|resposta|答案|描述|表达式|短语|回答|ответ|答え|표현"
    r"|답변)\s*[:：]\s*)",
    re.IGNORECASE,
)
_LIST = re.compile(r"^\s*(?:[-*•–>#]+|\(?\d{1,2}[.)]|[a-z][.)])\s+", re.IGNORECASE)
_PREAMBLE = re.compile(
    r"^(?:sure|certainly|of course|okay|ok|absolutely|here|based on|looking at|the following|to describe)\b.*:?\s*$", re.IGNORECASE
)
# who refuses speaks of himself; "people who cannot see the picture" is a phrase
_SPEAKER = re.compile(
    r"\b(?:i|i'm|we|sorry|apolog\w+|unfortunately|as an?|please|no image|lo siento|je|ich|no puedo|non posso|como|come)\b",
    re.IGNORECASE,
)
_NOTHING = re.compile(r"(?:\W|sorry|i'm|unfortunately|but){0,20}\bthere (?:is|are|'s) ?(?:no|not|nothing|n't)\b", re.IGNORECASE)
_FILLER = re.compile(r"^(?:sure|certainly|of course|okay|ok|absolutely|yes|well)[,!.]\s+(?=\S)", re.IGNORECASE)
_TAGS = re.compile(r"</?[A-Za-z|][^<>]{0,40}>")
_COORDINATES = re.compile(r"[\[(<]\s*\d+(?:\.\d+)?(?:\s*[,;]\s*\d+(?:\.\d+)?){1,3}\s*[\])>]")
_COLOURS = r"(?:red|green|blue|yellow|orange|purple|magenta|cyan|pink|white|black|lime|violet|coloured|colored|bright|numbered)"
LEAKS = re.compile(
    rf"\b(?:{_COLOURS} (?:and {_COLOURS} )?(?:bounding )?(?:box(?:es)?|outlines?|contours?|borders?|frames?|circles?|marks?"
    rf"|markers?|numbers?|labels?|rectangles?|highlights?|masks?|overlay)"
    r"|bounding box(?:es)?|(?:marked|numbered|labell?ed|outlined|highlighted|circled|boxed|tagged|enclosed|annotated) (?:as|with"
    r"|by|in|from)? ?(?:#?\d+|box|(?:a |the )?(?:red|green|blue|yellow|colou?r)\w*)"
    r"|(?:objects?|marks?|numbers?|box(?:es)?|regions?|labels?|items?|markers?|ids?|instances?) #?\d+(?:(?:,| and|, and) #?\d+)*"
    r"|the (?:marked|outlined|highlighted|circled|boxed|numbered|annotated|selected|indicated) )"
    rf"|\bin (?:a |the )?{_COLOURS} (?:box|outline)|红框|红色框|标记为|编号",
    re.IGNORECASE,
)


def parse_expression(raw: RawAnswer) -> ParsedExpression:
    """Return the phrase of an answer: its first line, without lead, quotes, markdown, list number and full stop; case is left alone.

    Flags: "lead" (words before the phrase were dropped), "lines" (more than one line), "mark" (it speaks of the marks that were drawn, of a
    number or a colour of theirs), "coordinates" (taken out), "truncated", "thinking". A text of more than 60 words, an empty one and
    one that says there is nothing are unparsable.
    """
    refused = refusal_of(raw)
    if refused is not None:
        return ParsedExpression("", refused.status, refused.reason)
    text = clean(raw.text or "")
    flags = ["thinking"] if text.thinking else []
    if text.unclosed:
        return ParsedExpression("", "unparsable", "the answer's reasoning never ends", tuple(flags))
    phrase, more = _phrase(text)
    flags += more
    if raw.finish == "length":
        flags.append("truncated")
    if refuses(phrase or text) and (not phrase or not phrase.isascii() or _SPEAKER.search(phrase)):
        return ParsedExpression("", "refused", "refused in words", tuple(flags))
    if not re.search(r"\w", phrase) or none_word(phrase) or _NOTHING.match(phrase):
        return ParsedExpression("", "unparsable", "an empty answer" if not phrase else "no phrase", tuple(flags))
    if len(phrase.split()) > MAX_WORDS or len(phrase) > 10 * MAX_WORDS:
        return ParsedExpression("", "unparsable", f"more than {MAX_WORDS} words", tuple(flags))
    if LEAKS.search(phrase):
        flags.append("mark")
    return ParsedExpression(phrase, "ok", "", tuple(flags))


def _phrase(text: Cleaned) -> tuple[str, list[str]]:
    """Return the phrase, bare, and flags."""
    flags = []
    told = _from_json(text)
    if told is None:
        body = "\n".join(part for part in re.split(r"```+\w*", plain(text)))
        lines = [line.strip() for line in body.split("\n") if line.strip(f" \t*#-_=`{_QUOTES}")]
        while len(lines) > 1 and (lines[0].endswith(":") or (_PREAMBLE.match(lines[0]) and not _LEAD.match(lines[0]))):
            lines.pop(0)
            flags.append("lead")
        if len(lines) > 1:
            flags.append("lines")
        told = lines[0] if lines else ""
    bare = _TAGS.sub(" ", told)
    bare, found = _COORDINATES.subn(" ", bare)
    flags += ["coordinates"] if found else []
    for _ in range(3):
        before = bare
        bare = _FILLER.sub("", _LIST.sub("", bare.strip().strip("*_#").strip()))
        quoted = re.match(rf"^[^{_QUOTES}]{{0,80}}[:：]?\s*[\"“「『«]([^\"”」』»\n]+)[\"”」』»](?:\W*$|\s*[-–—(])", bare)
        led = _LEAD.match(bare)
        if led and bare[led.end() :].strip():
            bare = bare[led.end() :]
            flags.append("lead")
        elif quoted:
            flags += ["lead"] if bare[: quoted.start(1)].strip(_QUOTES + " ") else []
            bare = quoted[1]
        if bare == before:
            break
    bare = re.sub(r"\s+([,.;:!?])", r"\1", re.sub(r"\s+", " ", bare)).strip()
    return bare.strip(_QUOTES + " ").rstrip(".。!;:,").strip(_QUOTES + " *").rstrip("."), list(dict.fromkeys(flags))


def _from_json(text: str) -> str | None:
    """Return the phrase under a known key, or the first text of a list."""
    stripped = text.strip()
    if stripped[:1] not in "[{`":
        return None
    try:
        whole = json.loads(re.sub(r"^```+\w*\s*|\s*```+$", "", stripped))
    except (ValueError, RecursionError):
        whole = None
    if isinstance(whole, str):
        return whole
    for node in values(stripped):
        found = _text_of(node)
        if found is not None:
            return found
    return None


def _text_of(node: Node) -> str | None:
    named = {normal(key): value for key, value in reversed(node.pairs)}
    for key in _KEYS:
        value = named.get(key)
        if isinstance(value, str):
            return value
        if isinstance(value, Node):
            return _text_of(value)
    for item in (*node.items, *(value for _, value in node.pairs if len(node.pairs) == 1)):
        if isinstance(item, Node) and (found := _text_of(item)) is not None:
            return found
        if isinstance(item, str) and not isinstance(item, Word):
            return item
    return None
