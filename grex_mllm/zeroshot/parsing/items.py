"""From values to boxes, points and polygons: keys, named axes, nested lists, statements that there is nothing (rules E, G, N, Q, R)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from grex_mllm.zeroshot.parsing.keys import ABSENT, AXES, AXIS_NAMES, COUNTS, IGNORED, PRESENT, ROLES, corner_of, normal
from grex_mllm.zeroshot.parsing.pictures import number_of
from grex_mllm.zeroshot.parsing.values import NUMBER, Node, Number, number, values
from grex_mllm.zeroshot.parsing.words import says_no, says_none, says_yes

_NUMBERS = re.compile(rf"(?<![\w.])({NUMBER})(?:\s?(%))?(?:\s?px|\s?pixels?)?(?![\w.])")
_LOOSE_TEXT = re.compile(rf"(?:[\s,;:()\[\]{{}}<>=%-]|px|pixels?|{NUMBER}|[xywh][12]?\b|[xy]_?(?:min|max)\b)*+")
_NAMED = re.compile(
    rf"(?<![\w.])([A-Za-z]\w{{0,30}}+(?:-[a-z]\w{{0,10}}+)?+)[\"']?\s{{0,3}}(?:[:=>]|is)\s{{0,3}}[\"']?({NUMBER})\s?(%)?(?![\w.]\d)"
)
MAX_ITEMS = 5_000


@dataclass
class Item:
    """A box, point or polygon as the answer gives it.

    order: xyxy, yxyx, xywh or cxcywh of a box; "" = as declared. Numbers with named axes are x before y.
    frame: of tokens that bring their own; "" = as declared.  picture: number of the mask that stands beside a box (`pictures.take_out`).
    """

    numbers: list[Number]
    order: str = ""
    frame: str = ""
    picture: int | None = None


@dataclass
class Found:
    """What one part of an answer holds. nothing: statements that there is no object.  faulty: items that could not be read.

    cut: items that the answer's end cut off.
    """

    boxes: list[Item] = field(default_factory=list)
    points: list[Item] = field(default_factory=list)
    polygons: list[Item] = field(default_factory=list)
    nothing: int = 0
    faulty: int = 0
    cut: int = 0

    @property
    def objects(self) -> bool:
        """Whether it holds an object of any kind."""
        return bool(self.boxes or self.points or self.polygons)

    @property
    def speaks(self) -> bool:
        """Whether it says anything about objects, be it faulty."""
        return self.objects or bool(self.nothing or self.faulty or self.cut)

    def add(self, other: Found) -> None:
        """Take over what another part holds."""
        for name in ("boxes", "points", "polygons"):
            getattr(self, name).extend(getattr(other, name))
        for name in ("nothing", "faulty", "cut"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def items_of(node: Node, answer: str) -> Found:
    """Return what a value holds, where `answer` (of ANSWERS) was asked for."""
    found = Found()
    _Walk(found, answer).node(node, "")
    return found


def named_in(text: str, answer: str) -> Found:
    """Return boxes whose axes are named in running text: "x1: 100, y1 = 250, ...", `<xmin>100</xmin>`, left="100"."""
    found, begun = Found(), Node("{", 0, closed=True)
    walk, last = _Walk(found, answer), 0
    for match in _NAMED.finditer(text):
        name = normal(match[1])
        if name not in AXIS_NAMES:
            continue
        if match.start() - last > 60 or any(key == name for key, _ in begun.pairs):
            walk.named(begun)
            begun = Node("{", 0, closed=True)
        begun.pairs.append((name, number(match[2], match[3] is not None)))
        last = match.end()
    walk.named(begun)
    return found


def numbers_in(text: str) -> list[Number]:
    """Return the numbers of a text, those that are parts of words left out."""
    return [number(match[1], match[2] is not None) for match in _NUMBERS.finditer(text)]


class _Walk:
    """Goes through a value. role: box, point, polygon, xyxy, yxyx, xywh, cxcywh; "" = nobody said; "any" = under an unknown key."""

    def __init__(self, found: Found, answer: str, depth: int = 0) -> None:
        self.found, self.answer, self.depth = found, answer, depth

    def value(self, value: object, role: str) -> None:
        if isinstance(value, Node):
            self.node(value, role)
        elif isinstance(value, str):
            self.text(value, role)
        elif value is None or value is False:
            self.found.nothing += 1
        elif role not in ("", "any"):
            self.found.faulty += 1

    def node(self, node: Node, role: str) -> None:
        if len(self.found.boxes) + len(self.found.points) + len(self.found.polygons) > MAX_ITEMS:
            return
        if node.empty:
            self.found.nothing += node.closed and node.opener != "(" and role != "any"
            self.found.cut += not node.closed
            return
        if node.pairs and self.pairs(node, role):
            return
        if node.items:
            self.listed(node, role)

    def text(self, text: str, role: str) -> None:
        """Read numbers or a value that stand in a text."""
        nodes = values(text) if self.depth < 3 and len(text) < 100_000 else []
        inner = _Walk(self.found, self.answer, self.depth + 1)
        if role in ("", "any"):
            for node in nodes if text.lstrip()[:1] in "[{" else ():
                inner.node(node, role)
            if not nodes and _LOOSE_TEXT.fullmatch(text) and len(numbers := numbers_in(text)) == 4:
                self.flat(numbers, role, True)
        elif not text.strip() or says_none(text):
            self.found.nothing += 1
        elif nodes and all(isinstance(node, Node) and not node.empty for node in nodes):
            pairs = [item for node in nodes for item in node.items]
            if all(node.numbers and len(node.items) == 2 for node in nodes):
                self.flat([item for item in pairs if isinstance(item, Number)], role, True)
            else:
                for node in nodes:
                    inner.node(node, role)
        elif (named := named_in(text, self.answer)).objects:
            self.found.add(named)
        elif (numbers := numbers_in(text)) and _LOOSE_TEXT.fullmatch(text):
            self.flat(numbers, role, True)
        else:
            self.found.faulty += 1

    def pairs(self, node: Node, role: str) -> bool:
        """Read keys and values; return whether everything in the node has been dealt with."""
        named = {normal(key): value for key, value in reversed(node.pairs)}
        if _denied(named):
            self.found.nothing += 1
            return True
        before = self.found.faulty, self.found.cut, self.found.nothing, len(self.found.boxes) + len(self.found.points)
        first = len(self.found.boxes)
        used = self.axes(named, node) or self.corners(named, node)
        for key, value in node.pairs:
            name = normal(key)
            if name in used or (name in IGNORED and name not in ROLES):
                continue
            if name in ROLES:
                self.value(value, ROLES[name] or role)
            elif isinstance(value, Node | str) or value is None:
                self.value(value, "any")
        if len(self.found.boxes) == first + 1 and (picture := number_of(named.get("mask"))) is not None:
            self.found.boxes[-1].picture = picture
        none = [value for name in COUNTS if isinstance(value := named.get(name), Number) and value.value == 0]
        same = before == (self.found.faulty, self.found.cut, self.found.nothing, len(self.found.boxes) + len(self.found.points))
        if same and none and not node.items:
            self.found.nothing += 1
        return False

    def named(self, node: Node) -> None:
        """Read named axes where there are four; fewer say nothing."""
        if len(node.pairs) >= 4:
            inner = _Walk(Found(), self.answer)
            inner.axes(dict(node.pairs), node)
            if inner.found.boxes:
                self.found.add(inner.found)

    def axes(self, named: dict[str, object], node: Node) -> set[str]:
        """Read x1, y1, x2, y2 or x, y, width, height and their other names; return the keys that were used."""
        numbers = {name: n for name, value in named.items() if (n := _number(value)) is not None}
        x, y = _pair(named.get("x")), _pair(named.get("y"))
        if x and y:
            self.found.boxes.append(Item([x[0], y[0], x[1], y[1]], "xyxy"))
            return {"x", "y"}
        for order, ways in AXES.items():
            for way in ways:
                if all(name in named for name in way):
                    if all(name in numbers for name in way):
                        into = self.found.points if order == "point" else self.found.boxes
                        into.append(Item([numbers[name] for name in way], "xyxy" if order == "point" else order))
                    elif all(named[name] is None for name in way):
                        self.found.nothing += 1
                    elif any(isinstance(named[name], Node) for name in way):
                        continue  # "left" and "right" may name objects
                    else:
                        self.found.faulty += 1
                    return set(way)
        begun = [way for ways in (AXES["xyxy"], AXES["xywh"]) for way in ways if sum(name in numbers for name in way) >= 2]
        begun = [way for way in begun if not {name for name in way if name in numbers} <= {"width", "height", "w", "h"}]
        if begun and not node.closed:
            self.found.cut += 1
        elif begun:
            self.found.faulty += 1
        return set(begun[0]) if begun else set()

    def corners(self, named: dict[str, object], node: Node) -> set[str]:
        """Read two corners with names of their own; return the keys that were used."""
        low = next((name for name in named if corner_of(name) == "low"), None)
        high = next((name for name in named if corner_of(name) == "high"), None)
        if low is None or high is None:
            return set()
        ends = [_point(named[low]), _point(named[high])]
        if ends[0] is None or ends[1] is None:
            return set()
        (first, first_named), (second, second_named) = ends  # type: ignore[misc]
        self.found.boxes.append(Item([*first, *second], "xyxy" if first_named and second_named else ""))
        return {low, high}

    def listed(self, node: Node, role: str) -> None:
        """Read what stands in brackets without a key."""
        items = node.items
        children = [item for item in items if isinstance(item, Node)]
        corners = [_point(child) for child in children] if role in ("polygon", "box") and len(children) == len(items) else []
        if len(corners) > 1 and all(corner is not None and corner[1] for corner in corners):
            self.flat([n for corner in corners if corner for n in corner[0]], role, node.closed, pairs=True)
        elif not children:
            self.scalars(node, role)
        elif len(children) == len(items) and all(child.numbers and len(child.items) == 2 and child.closed for child in children):
            self.flat([n for child in children for n in child.items if isinstance(n, Number)], role, node.closed, pairs=True)
        elif len(children) < len(items) and sum(isinstance(item, Number) for item in items) >= 4 and not any(c.numbers for c in children):
            self.scalars(Node(node.opener, 0, [i for i in items if not isinstance(i, Node)], closed=node.closed), role)
        else:
            for item in items:
                if isinstance(item, Node) or (isinstance(item, str) and role not in ("", "any")) or item is None:
                    self.value(item, role)

    def scalars(self, node: Node, role: str) -> None:
        """Read a list without lists in it."""
        items = list(node.items)
        texts = [item for item in items if isinstance(item, str)]
        if len(texts) == len(items) and all(_number(text) is None for text in texts):
            for text in texts:
                if role in ("", "any") and says_none(text):
                    self.found.nothing += 1
                else:
                    self.text(text, role or "any")
            return
        while items and isinstance(items[-1], str) and _number(items[-1]) is None:
            items.pop()  # a label behind its box
        while items and isinstance(items[0], str) and _number(items[0]) is None:
            items.pop(0)
        numbers = [_number(item) for item in items]
        if all(item is None for item in node.items):
            self.found.nothing += 1
        elif any(n is None for n in numbers):
            self.found.faulty += role != "any" or any(n is not None for n in numbers)
        else:
            self.flat([n for n in numbers if n is not None], role, node.closed)

    def flat(self, numbers: list[Number], role: str, closed: bool, pairs: bool = False) -> None:
        """Read numbers in a row. pairs: they were written as (x, y), (x, y), ..."""
        found, count = self.found, len(numbers)
        points = [numbers[i : i + 2] for i in range(0, count - 1, 2)]
        open_kind = role in ("", "any")
        loose = open_kind or role == "box"
        if role == "polygon" or (loose and self.answer == "polygons" and count >= 6 and (pairs or count % 4)):
            if not closed:
                found.cut += 1
            elif count % 2 or count < 6:
                found.faulty += 1
            else:
                found.polygons.append(Item(numbers))
        elif role == "point" or (loose and self.answer == "points" and (count == 2 or (pairs and count % 2 == 0))):
            kept = points if closed or count > 2 else []
            found.points += [Item(point) for point in kept]
            found.cut += not closed
            found.faulty += closed and (count % 2 == 1 or not count)
        elif _is_rectangle(points) and closed:
            xs, ys = sorted(p[0] for p in points), sorted(p[1] for p in points)
            found.boxes.append(Item([xs[0], ys[0], xs[-1], ys[-1]], "" if loose else role))
        elif (count and count % 4 == 0) or (not closed and count > 4):
            whole = [numbers[i : i + 4] for i in range(0, count - 3, 4)]
            found.boxes += [Item(four, "" if loose else role) for four in whole]
            found.cut += not closed
        elif not closed:
            found.cut += 1
        elif open_kind and count == 2 and role == "":
            found.points.append(Item(numbers))
        elif role != "any":
            found.faulty += 1


def _is_rectangle(points: list[list[Number]]) -> bool:
    """Whether four points are the corners of an upright rectangle."""
    if len(points) != 4:
        return False
    places = {(p[0].value, p[1].value) for p in points}
    return len(places) == 4 and len({x for x, _ in places}) == 2 and len({y for _, y in places}) == 2


def _number(value: object) -> Number | None:
    """Return a number, also one that stands in a text."""
    if isinstance(value, Number):
        return value
    if isinstance(value, str) and len(value) < 400 and (match := _NUMBERS.fullmatch(value.strip())):
        return number(match[1], match[2] is not None)
    return None


def _pair(value: object) -> list[Number]:
    """Return the two numbers of a list of two; nothing for all else."""
    items = [item for item in value.items if isinstance(item, Number)] if isinstance(value, Node) and not value.pairs else []
    return items if isinstance(value, Node) and len(items) == len(value.items) == 2 else []


def _point(value: object) -> tuple[list[Number], bool] | None:
    """Return the two numbers of a corner, and whether x and y were named."""
    if isinstance(value, str):
        numbers = numbers_in(value)
        return (numbers, False) if len(numbers) == 2 else None
    if not isinstance(value, Node):
        return None
    named = {normal(key): _number(inner) for key, inner in value.pairs}
    x, y = named.get("x"), named.get("y")
    if x is not None and y is not None:
        return [x, y], True
    items = [item for item in value.items if isinstance(item, Number)]
    return (items, False) if len(items) == 2 == len(value.items) else None


def _denied(named: dict[str, object]) -> bool:
    """Whether a key says that the object is not there: found: false, no_target: true."""
    for name, value in named.items():
        if name in PRESENT and (value is False or (isinstance(value, str) and says_no(value)) or value == Number(0.0)):
            return True
        if name in ABSENT and (value is True or (isinstance(value, str) and says_yes(value)) or value == Number(1.0)):
            return True
    return False
