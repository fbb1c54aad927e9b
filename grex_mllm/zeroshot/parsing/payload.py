"""Where in an answer its objects stand (rule D): code fences, JSON, tokens and tags, then loose groups of four numbers in prose."""

from __future__ import annotations

import re
from dataclasses import dataclass

from grex_mllm.zeroshot.parsing.items import Found, Item, named_in, numbers_in
from grex_mllm.zeroshot.parsing.keys import AXES, normal
from grex_mllm.zeroshot.parsing.tokens import joined, tokens_of
from grex_mllm.zeroshot.parsing.values import NUMBER, Node, values
from grex_mllm.zeroshot.parsing.words import MASK, says_none

_LANGUAGE = re.compile(
    r"\s*(?:json5?|jsonl|python|py|javascript|js|text|txt|xml|html|yaml|plaintext|csv|markdown|bash)?[ \t]*\n?", re.IGNORECASE
)
# words that set a value apart from the answer: an example, or what a later one corrects
_ASIDE = re.compile(
    r"\b(?:for example|example|e\.g\.|for instance|format (?:is|would be|like)|formatted like|looks? like this|placeholder|template)\b"
    r"|\b(?:correct(?:ion|ed|ing)|let me (?:correct|re-?check|revise|refine|fix)|actually|on second thought|mistake|instead|revised?)\b"
    r"|\b(?:refined|updated|initial(?:ly)?|first (?:guess|thought|attempt|estimate)|draft|at first|i (?:considered|thought)|my final)\b"
    r"|\bfinal (?:answer|result|output|box|boxes)\b"
    r"|\b(?:wait|oops|hmm|no|sorry|or rather|rather|i mean|scratch that|better)\b\s*[,.!:-]"
    r"|更正|修正|纠正|糾正|应该是|應該是|最终答案|例如|示例|例子|比如|たとえば|例えば|訂正|예를 들어|예시|수정"
    r"|par exemple|exemple|correction|beispiel|korrektur|korrigiert|eigentlich|ejemplo|correcci|exemplo|correç|esempio|correzione"
    r"|например|пример|исправл",
    re.IGNORECASE,
)
_CORRECTS = re.compile(
    r"\b(?:correction|corrected|let me (?:correct|re-?check|revise|refine|fix)|actually|on second thought|mistake|my final|final answer)\b"
    r"|\bwait\b\s*[,.!:-]|更正|修正|纠正|应该是|訂正|수정|korrektur|correcci|correzione|исправл",
    re.IGNORECASE,
)
_EXAMPLE = re.compile(
    r"\b(?:for example|example|e\.g\.|for instance)\b|例如|示例|par exemple|beispiel|ejemplo|esempio|например|たとえば|예를 들어",
    re.IGNORECASE,
)
_BETWEEN = r"\s?%?(?:[,;]\s?|[ \t]+)"
_BARE = re.compile(
    rf"^[ \t]*(?:[-*•]|\d{{1,2}}[.)])?[ \t]*(?:[^\n:=]{{0,60}}[:=])?[ \t<(]*"
    rf"({NUMBER}{_BETWEEN}{NUMBER}{_BETWEEN}{NUMBER}{_BETWEEN}{NUMBER}\s?%?)[ \t>)]*[.。]?[ \t]*$",
    re.MULTILINE,
)
_ANGLES = re.compile(rf"<({NUMBER}(?:\s?[,;]\s?{NUMBER}){{3}})>")
_ROW = re.compile(r"^[ \t]*\|(.+)\|[ \t]*$", re.MULTILINE)


@dataclass
class Payload:
    """What an answer holds, and how firmly. loose: numbers in prose, which a denial beats.  prose: the text with their groups masked."""

    found: Found
    loose: bool
    prose: str


def read_payload(text: str, answer: str, frame: str) -> Payload:
    """Return the objects of a cleaned text; `answer` of ANSWERS was asked for, in `frame`."""
    parts = re.split(r"```+|~~~+", text)
    if len(parts) > 1 and (fenced := _fenced(parts, answer, frame)).speaks:
        return Payload(fenced, False, text)
    if len(parts) > 1:
        text = "\n".join(parts)
    nodes = values(text)
    firm, loose = [n for n in nodes if _is_json(n)], [n for n in nodes if not _is_json(n)]
    tokens = tokens_of(text, answer, frame)
    objects = _last_values(firm, text, answer)
    if _names(firm) and objects.speaks:
        return Payload(objects, False, text)
    if tokens.speaks:
        return Payload(tokens, False, text)
    if objects.speaks:
        return Payload(objects, False, text)
    return _loose(loose, text, answer)


def _fenced(parts: list[str], answer: str, frame: str) -> Found:
    """Return what the code fences hold, every second part: the last one that can be read, or all that hold objects."""
    read: list[Found] = []
    for n in range(1, len(parts), 2):
        inner = parts[n][_LANGUAGE.match(parts[n]).end() :]  # type: ignore[union-attr]
        nodes = values(inner)
        found = _last_values(nodes, inner, answer) if _names(nodes) else joined(nodes, inner, answer)
        if not found.objects and (tokens := tokens_of(inner, answer, frame)).speaks:
            found = tokens
        if not found.speaks:
            found = Found(nothing=1) if inner.strip() and says_none(inner) else _bare(inner, answer)
        if found.speaks:
            read.append(found)
    good = [found for found in read if found.objects or found.nothing]
    if not good:
        return read[-1] if read else Found()
    if not all(found.objects for found in good) or _ASIDE.search("\n".join(parts[0::2])):
        good = good[-1:]
    whole = Found(cut=sum(found.cut for found in read if not found.objects))
    for found in good:
        whole.add(found)
    return whole


def _last_values(nodes: list[Node], text: str, answer: str) -> Found:
    """Return what the last value holds, and with it those before it that hold objects as well, back to an example or a correction."""
    whole = Found()
    after: Node | None = None
    before_cut = 0
    for node in reversed(nodes):
        found = joined([node], text, answer)
        if not found.speaks:
            continue
        if after is None or not whole.speaks:
            whole, after = found, node
            continue
        if not whole.objects and (whole.cut or whole.faulty) and not whole.nothing:
            before_cut += whole.cut
            whole, after = found, node  # the last one cannot be read
            continue
        between = text[node.end : after.start]
        if not (found.objects and whole.objects) or _ASIDE.search(between) or _EXAMPLE.search(text[max(0, node.start - 200) : node.start]):
            break
        found.add(whole)
        whole, after = found, node
    whole.cut += before_cut
    return whole


def _is_json(node: Node) -> bool:
    """Whether a value is more than a group of numbers or words in brackets."""
    if node.opener == "(":
        return False
    if node.pairs or (node.empty and node.closed):
        return True
    if node.opener == "[" and node.items and all(type(item) is str and any(map(str.isdigit, item)) for item in node.items):
        return True
    nodes = [item for item in node.items if isinstance(item, Node)]
    lists = any(not inner.empty or (inner.opener == "[" and inner.closed) for inner in nodes)
    return lists or any(item is None for item in node.items) or (bool(nodes) and len(nodes) == len(node.items))


def _names(nodes: list[Node]) -> bool:
    """Whether keys occur in the values."""
    return any(node.pairs or any(isinstance(item, Node) and _names([item]) for item in node.items) for node in nodes)


def _loose(nodes: list[Node], text: str, answer: str) -> Payload:
    """Return groups of exactly four numbers, pairs of points, named axes, tables and bare lines that prose holds."""
    prose = _masked(text, [node for node in nodes if node.numbers])
    start = 0
    numeric = [node for node in nodes if node.numbers or node.pairs]
    for mark in _CORRECTS.finditer(text):
        if any(n.end <= mark.start() for n in numeric) and any(n.start >= mark.end() for n in numeric):
            start = mark.end()
    kept = [node for node in nodes if node.start >= start and (node.numbers or node.pairs or _labelled(node))]
    if len(kept) > 1 and (example := _EXAMPLE.search(text)):
        first = next((node for node in kept if node.start > example.start()), None)
        kept = [node for node in kept if node is not first]
    found = joined(kept, text, answer)
    if any(len(n.items) == 4 for n in kept):  # a number in brackets beside boxes is a reference, a size or a count
        found.faulty = sum(n.numbers and len(n.items) not in (1, 2, 4) for n in kept) if found.boxes else found.faulty
    if not found.objects:
        for more in (_bare(text, answer), _table(text, answer), named_in(text, answer)):
            if more.objects:
                return Payload(more, True, _BARE.sub(MASK, prose))
    return Payload(found, True, prose)


def _labelled(node: Node) -> bool:
    """Whether a list is one box with a label in it."""
    return node.opener == "[" and sum(isinstance(item, tuple) for item in node.items) >= 4


def _bare(text: str, answer: str) -> Found:
    """Return lines that are four numbers and no more, maybe behind a label and a colon, and <x, y, x, y>."""
    found = Found()
    for match in [*_BARE.finditer(text), *_ANGLES.finditer(text)]:
        numbers = numbers_in(match[1])
        if len(numbers) == 4:
            found.boxes.append(Item(numbers))
    return found


def _table(text: str, answer: str) -> Found:
    """Return the rows of a Markdown table whose head names the axes."""
    found = Found()
    order, columns = "", []
    for row in _ROW.finditer(text):
        cells = [cell.strip() for cell in row[1].split("|")]
        names = [normal(cell) for cell in cells]
        for kind in ("xyxy", "xywh", "cxcywh"):
            way = next((way for way in AXES[kind] if all(name in names for name in way)), None)
            if way:
                order, columns = kind, [names.index(name) for name in way]
                break
        else:
            numbers = [numbers_in(cells[c]) for c in columns if c < len(cells)]
            if len(numbers) == 4 and all(len(n) == 1 for n in numbers):
                found.boxes.append(Item([n[0] for n in numbers], order))
    return found


def _masked(text: str, nodes: list[Node]) -> str:
    """Return the text with MASK in place of each of the values."""
    parts, place = [], 0
    for node in nodes:
        parts += [text[place : node.start], MASK]
        place = node.end
    return "".join([*parts, text[place:]])
