"""Location tokens and tags that hold boxes or points (rule D): PaliGemma, Florence-2, Kosmos-2, Molmo, and <box> in its many spellings."""

from __future__ import annotations

import html
import re

from grex_mllm.ops.frames import CELLS
from grex_mllm.zeroshot.parsing.items import Found, Item, items_of, named_in, numbers_in
from grex_mllm.zeroshot.parsing.values import NUMBER, Node, Number, values

_LOC = re.compile(r"<loc(_?)(\d{1,6})>")
_PATCH = re.compile(r"<patch_index_(\d{1,9})>")
_POINT_TAG = re.compile(r"<(?:points?|point_2d)\b([^<>]{0,20000})(?:>([^<]{0,2000})|\Z)", re.IGNORECASE)
_ATTRIBUTE = re.compile(rf"""\b([xy])_?(\d{{0,6}})\s{{0,3}}=\s{{0,3}}["']?\s{{0,3}}({NUMBER})\s?(%)?""", re.IGNORECASE)
_COORDS = re.compile(r"""\bcoords\s{0,3}=\s{0,3}["']([^"']*)["']""", re.IGNORECASE)
_NAMES = (
    r"box(?:es)?(?:_?2d)?|bbox(?:es)?(?:_?2d)?|b_?box|bounding_?box(?:es)?|det|box_start|quad_start|coords?|coordinates|location"
    r"|rect|region|bndbox"
)
_ANGLES = re.compile(r"(?:<\s?\d{1,5}\s?>\s?){4,400}")  # <100><250><500><1000>
_BOX_TAG = re.compile(rf"<\|?\s?(?:{_NAMES})\s?\|?>", re.IGNORECASE)
_CLOSING = re.compile(rf"<(?:\|?/|\|)\s?(?:{_NAMES}|box_end|/det)", re.IGNORECASE)
_XML = re.compile(r"<(?:\w{1,30}\s[^<>]{0,300})?(?:x|y)_?(?:min|max|1|2)\b|<\w{1,30}\s[^<>]{0,300}\b(?:left|top|width)\s?=", re.IGNORECASE)
_ANY_TAG = re.compile(r"</?\|?/?[A-Za-z_]")
POINT_LIMIT = 100.0  # Molmo's percent: a value above is invalid


def tokens_of(text: str, answer: str, frame: str) -> Found:
    """Return what location tokens and tags of a text hold; frame: as declared, of points."""
    found = Found()
    if "<" not in text:
        return found
    for reader in (_locations, _patches, _tags):
        found.add(reader(text, answer))
    found.add(_points(text, frame))
    return found


def _locations(text: str, answer: str) -> Found:
    """<loc0256> (PaliGemma, 1/1024, y first), <loc_256> (Florence-2, 1/1000, x first); four in a row are a box."""
    found = Found()
    runs: list[list[re.Match[str]]] = []
    for match in _LOC.finditer(text):
        last = runs[-1][-1] if runs else None
        if last is not None and last[1] == match[1] and not text[last.end() : match.start()].strip():
            runs[-1].append(match)
        else:
            runs.append([match])
    for run in runs:
        numbers = [Number(float(match[2])) for match in run]
        florence = run[0][1] == "_"
        frame, order = ("loc1000", "xyxy") if florence else ("loc1024", "yxyx")
        # an outline's points are never upright boxes all through
        fours = [numbers[i : i + 4] for i in range(0, len(numbers) - 3, 4)]
        outline = len(numbers) % 4 or (florence and any(four[2] <= four[0] or four[3] <= four[1] for four in fours))
        if len(numbers) % 2 == 0 and len(numbers) >= 6 and (answer == "polygons" or outline):
            found.polygons.append(Item(numbers, order, frame))
        elif len(numbers) % 4 == 0:
            found.boxes += [Item(four, order, frame) for four in fours]
        else:
            found.faulty += 1
    return found


def _patches(text: str, answer: str) -> Found:
    """<patch_index_0259><patch_index_1007>: cells of Kosmos-2, top left and bottom right."""
    found = Found()
    waiting: re.Match[str] | None = None
    for match in _PATCH.finditer(text):
        if waiting is None:
            waiting = match
            continue
        if text[waiting.end() : match.start()].strip():
            found.faulty += 1
            waiting = match
            continue
        cells = [int(waiting[1]), int(match[1])]
        if max(cells) >= CELLS * CELLS:
            found.faulty += 1
        else:
            found.boxes.append(Item([Number(float(n)) for c in cells for n in (c % CELLS, c // CELLS)], "xyxy", "patch32"))
        waiting = None
    found.faulty += waiting is not None
    return found


def _points(text: str, frame: str) -> Found:
    """<point x= y=>, <points x1= y1= x2= y2= ...> of Molmo and Qwen; <points coords="IMAGE ID X Y ..."> of Molmo2."""
    found = Found()
    for tag in _POINT_TAG.finditer(text):
        attributes = html.unescape(tag[1])
        numbers: dict[str, dict[str, Number]] = {}
        for match in _ATTRIBUTE.finditer(attributes):
            value = Number(float(match[3]), "." in match[3], match[4] is not None)
            numbers.setdefault(match[2], {}).setdefault(match[1].lower(), value)
        points = [pair for pair in numbers.values() if len(pair) == 2]
        found.faulty += len(numbers) - len(points)
        for coords in _COORDS.findall(attributes):
            triples, faulty = _triples(coords)
            points += triples
            found.faulty += faulty
        good = [p for p in points if frame != "pct" or max(p["x"].value, p["y"].value) <= POINT_LIMIT]
        found.points += [Item([p["x"], p["y"]]) for p in good]
        found.faulty += len(points) - len(good)
        inner = numbers_in(tag[2] or "") if not points and not attributes.strip(" /") else []
        if len(inner) == 2:
            found.points.append(Item(inner))
    return found


def _triples(coords: str) -> tuple[list[dict[str, Number]], int]:
    points: list[dict[str, Number]] = []
    faulty = 0
    for part in re.split(r"[;\t]", coords):
        numbers = numbers_in(part.replace(",", " "))
        rest = numbers[1:]
        if len(rest) % 3 or not rest:
            faulty += bool(numbers)
        points += [{"x": rest[i + 1], "y": rest[i + 2]} for i in range(0, len(rest) - 2, 3)]
    return points, faulty


def _tags(text: str, answer: str) -> Found:
    """What stands between <box> and the next tag, in whatever brackets."""
    found = Found()
    for run in _ANGLES.finditer(text):
        numbers = numbers_in(run[0])
        found.boxes += [Item(numbers[i : i + 4]) for i in range(0, len(numbers) - 3, 4)]
        found.faulty += len(numbers) % 4 > 0
    for opening in _BOX_TAG.finditer(text):
        end = _ANY_TAG.search(text, opening.end())
        inner = text[opening.end() : end.start() if end else len(text)]
        nodes = values(inner)
        numbers = numbers_in(inner)
        if nodes:
            found.add(joined(nodes, inner, answer))
        elif len(numbers) in (4, 8) and end:
            found.boxes += [Item(numbers[i : i + 4]) for i in range(0, len(numbers), 4)]
        elif numbers:
            found.faulty += bool(end)
            found.cut += not end
        elif end and _CLOSING.match(text, end.start()) and not inner.strip():
            found.nothing += 1
    if not found.objects and (named := named_in(text, answer)).objects and _XML.search(text):
        return named  # one tag or attribute for each number
    return found


def joined(nodes: list[Node], text: str, answer: str) -> Found:
    """Return what values in a row hold; pairs (x, y) of numbers that stand close together are read as one list of corners."""
    found = Found()
    run: list[Node] = []
    for node in [*nodes, None]:
        pair = node is not None and node.numbers and len(node.items) == 2 and node.closed
        if run and (node is None or not pair or not _joins(text[run[-1].end : node.start])):
            odd = len(run) > 1 and len(run) % 2 == 1 and answer == "boxes"
            corners: list[object] = [*run[: len(run) - odd]]
            found.faulty += odd
            found.add(items_of(Node("[", 0, corners, closed=True), answer))
            run = []
        if node is not None and pair:
            run.append(node)
        elif node is not None:
            found.add(items_of(node, answer))
    return found


_OTHER_CORNER = re.compile(r"\b(?:bottom|lower)[ _-]?right\b|右下", re.IGNORECASE)
_NO_CORNER = re.compile(r"\b(?:cent(?:er|re)|size|width|height|wide|tall|dimension\w*|radius|diameter)\b|[.!?。\n]\s*[A-Z]", re.IGNORECASE)


def _joins(between: str) -> bool:
    """Whether what stands between two pairs leaves them the corners of one box."""
    if len(between) > 60 or re.search(r"\d", between):
        return False
    return _OTHER_CORNER.search(between) is not None or not _NO_CORNER.search(between)
