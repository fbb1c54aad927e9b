"""What of an answer is the answer: characters of other scripts made plain, reasoning and end tokens taken out (rule B)."""

from __future__ import annotations

import re
import unicodedata
from functools import cache

LIMIT = 60_000  # characters that are read: a hundred boxes with labels take a fifth of it
_REASONING = r"think(?:ing)?|thoughts?|reasoning|reflection|analysis|scratchpad|seed:think"
# opening and closing of a model's thoughts: tags, and what gpt-oss, Gemma, Kimi and others write in their place
_OPEN = rf"<\s*(?:{_REASONING})\s*>|<\|\s*(?:begin_of_thought|think)\s*\|>"
_OPEN += r"|<\|channel\|?>\s*(?:analysis|thought|commentary)\s*(?:<\|message\|>)?"
_OPEN += r"|◁think▷|<unused94>(?:thought)?|\[THINK\]"
_CLOSE = rf"<\s*/\s*(?:{_REASONING})\s*>|<\|\s*(?:end_of_thought|/think)\s*\|>|<channel\|>|<unused95>|◁/think▷|\[/THINK\]"
_CLOSE += r"|(?:<\|end\|>\s*(?:<\|start\|>\s*assistant\s*)?)?<\|channel\|>\s*final\s*(?:<\|message\|>)?"
_THOUGHT = re.compile(rf"(?P<open>{_OPEN})|(?P<close>{_CLOSE})", re.IGNORECASE)
_ANSWER = re.compile(r"<\s*(/?)\s*answer\s*>|<\|(begin|end)_of_(?:solution|answer)\|>", re.IGNORECASE)
_END = re.compile(
    r"</?s>|<(?:eos|bos|pad|unk|end_of_turn|end_of_utterance|turn\|)>|<start_of_turn>(?:model)?"
    r"|<\|(?:im_end|im_start|endoftext|end_of_text|eot_id|eom_id|end|return|eot|assistant|begin_of_text|channel|message|start)\|>"
    r"|<[|｜](?:end|begin)▁of▁sentence[|｜]>|\[/?INST\]",
    re.IGNORECASE,
)
_PICTURES = re.compile(r"(data:image/[a-z]{1,10};base64,)[A-Za-z0-9+/=]++")  # where they are wanted, `pictures` took them out
_DECIMALS = re.compile(r"[\[(]\s?[01],\d++(?:\s?;\s?[01],\d++){3}\s?[\])]")  # [0,10; 0,25; 0,50; 1,00]
_EMPHASIS = re.compile(r"\*\*+|(?<![\w\"'])__(?=\S)|(?<=\S)__(?![\w\"'])|(?<!`)`(?!`)")


class Cleaned(str):
    """The text that is left. thinking: reasoning was dropped.  unclosed: it never ends.  cut: the text went beyond LIMIT."""

    thinking: bool = False
    unclosed: bool = False
    cut: bool = False


def clean(text: str) -> Cleaned:
    """Return the answer itself, in plain digits, brackets and punctuation; labels and prose stay in their script."""
    text, thinking, unclosed = _without_reasoning(_PICTURES.sub(r"\1", text))
    plain = _EMPHASIS.sub("", _END.sub("", _answer(text)[:LIMIT].translate(_plain())))
    cleaned = Cleaned(_DECIMALS.sub(lambda match: match[0].replace(",", ".").replace(";", ","), plain))
    cleaned.thinking, cleaned.unclosed, cleaned.cut = thinking, unclosed, len(text) > LIMIT
    return cleaned


def _without_reasoning(text: str) -> tuple[str, bool, bool]:
    """Return the text outside of thoughts, whether there were any, and whether one never ended.

    A closing mark alone ends thoughts that the chat template opened: what stands before is dropped.
    """
    kept: list[str] = []
    depth, place, seen = 0, 0, False
    for mark in _THOUGHT.finditer(text):
        seen = True
        if mark["close"]:
            if depth <= 1:
                kept = kept if depth else []
                place = mark.end()
            depth = max(0, depth - 1)
        else:
            if depth == 0:
                kept.append(text[place : mark.start()])
            depth += 1
    if depth == 0:
        kept.append(text[place:])
    return "".join(kept), seen, depth > 0


def _answer(text: str) -> str:
    """Return what the last answer tag holds, closed or not; all of the text where there is none."""
    marks = list(_ANSWER.finditer(text))
    opened = [n for n, mark in enumerate(marks) if mark[1] == "" or (mark[2] or "").lower() == "begin"]
    if not opened:
        return text
    last = opened[-1]
    return text[marks[last].end() : marks[last + 1].start() if last + 1 < len(marks) else len(text)]


@cache
def _plain() -> dict[int, str | None]:
    """Translation of characters: digits of every script, full-width forms, brackets, separators, spaces, signs."""
    table: dict[int, str | None] = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
    for code in range(0x80, 0x1FC00):
        if unicodedata.category(chr(code)) == "Nd":
            table[code] = str(unicodedata.digit(chr(code)))
    for plain, others in {
        "[": "【〔［⟦〖", "]": "】〕］⟧〗", "{": "｛❴", "}": "｝❵", "<": "〈⟨", ">": "〉⟩", "-": "−‑﹣－", ",": "、،﹐",
        ";": "；؛", ":": "：﹕",
        " ": "\u00a0\u3000\u2002\u2003\u2007\u2009\u202f", "'": "’‘ʼ", "%": "٪﹪",
    }.items():  # fmt: skip
        table |= {ord(other): plain for other in others}
    table |= {ord("٫"): ".", ord("…"): "...", ord("×"): "x"}
    unseen = "\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad\u202a\u202b\u202c\u2066\u2067\u2068\u2069\x00"
    table |= dict.fromkeys(map(ord, unseen))
    return table
