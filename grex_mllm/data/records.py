"""Dataset folders: what a record is, and strict reading (`writing.py` writes them).

A folder holds `images.jsonl`, `expressions.jsonl` and `dataset.json` (data_prep/README.md shows all fields). Reading checks the form of
every line; `check.py` checks what the lines claim against the images. Image records stay on disk and are parsed when asked for, so a
folder of 20,000 images costs no memory to speak of; expressions are held.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from grex_mllm.errors import GrexError, fault
from grex_mllm.types import ExpressionRecord, ImageRecord, Instance

IMAGES, EXPRESSIONS, INFO = "images.jsonl", "expressions.jsonl", "dataset.json"
MAX_EXPRESSION_CHARACTERS = 1000


@dataclass(frozen=True)
class Fault:
    """One fault of a dataset folder. line counts from 1; 0 = the whole file."""

    file: str
    line: int
    field: str
    found: str
    expected: str

    def __str__(self) -> str:
        place = f"{self.file} line {self.line}" if self.line else self.file
        return f"{place}, field {self.field}: {self.found}; expected {self.expected}"


Finding = tuple[str, str, str]  # field, found, expected


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {int, float} and all(map(math.isfinite, value))


def _is_segmentation(value: Any) -> bool:
    if value is None:
        return True
    if isinstance(value, list):
        return all(map(_is_numbers, value))
    return isinstance(value, dict) and set(value) == {"size", "counts"} and isinstance(value["counts"], str | list)


def _is_list(value: Any, kind: type = object) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


Rule = tuple[Callable[[Any], bool], str]
ID: Rule = (lambda value: isinstance(value, str) and value != "", "a non-empty string")
SIDE: Rule = (lambda value: type(value) is int and value > 0, "a whole number of pixels above 0")
SENTENCE: Rule = (
    lambda value: isinstance(value, str) and bool(value.strip()) and len(value) <= MAX_EXPRESSION_CHARACTERS,
    f"1 to {MAX_EXPRESSION_CHARACTERS:,} characters of text",
)
IMAGE_FIELDS: dict[str, Rule] = {"image_id": ID, "file": ID, "height": SIDE, "width": SIDE, "instances": (_is_list, "a list of instances")}
INSTANCE_FIELDS: dict[str, Rule] = {
    "annotation_id": ID,
    "category": ID,
    "box_xyxy": (lambda value: _is_numbers(value) and len(value) == 4, "four finite numbers [x1, y1, x2, y2]"),
    "segmentation": (_is_segmentation, "a list of polygons (flat lists of finite numbers), a COCO RLE {size, counts}, or null"),
    "iscrowd": (lambda value: isinstance(value, bool), "true or false"),
}
INSTANCE_OPTIONAL: dict[str, Rule] = {  # scene metadata of generated data
    "attributes": (
        lambda value: isinstance(value, dict) and all(type(number) is int for number in value.values()),
        "an object of whole numbers",
    )
}
EXPRESSION_FIELDS: dict[str, Rule] = {
    "expression_id": ID,
    "ref_id": ID,
    "image_id": ID,
    "expression": SENTENCE,
    "raw": SENTENCE,
    "targets": (lambda value: _is_list(value, str), "a list of annotation ids (strings); [] = no target"),
    "split": ID,
    "source": ID,
    "tags": (lambda value: _is_list(value, str), "a list of strings"),
}


def image_findings(value: Any) -> Iterator[Finding]:
    """Yield every fault in the form of one decoded line of images.jsonl."""
    yield from _form(value, IMAGE_FIELDS, {}, "")
    if isinstance(value, dict) and isinstance(value.get("instances"), list):
        for position, instance in enumerate(value["instances"]):
            yield from _form(instance, INSTANCE_FIELDS, INSTANCE_OPTIONAL, f"instances[{position}]")


def expression_findings(value: Any) -> Iterator[Finding]:
    """Yield every fault in the form of one decoded line of expressions.jsonl."""
    yield from _form(value, EXPRESSION_FIELDS, {}, "")


def _form(value: Any, required: dict[str, Rule], optional: dict[str, Rule], where: str) -> Iterator[Finding]:
    if not isinstance(value, dict):
        yield where or "(line)", _shown(value), "a JSON object"
        return
    prefix = f"{where}." if where else ""
    for name in value.keys() - required.keys() - optional.keys():
        yield prefix + name, f"unknown field with value {_shown(value[name])}", f"only {', '.join((*required, *optional))}"
    for name, (valid, expected) in (required | optional).items():
        if name in value and not valid(value[name]):
            yield prefix + name, _shown(value[name]), expected
        elif name not in value and name in required:
            yield prefix + name, "missing", expected


class ImageTable(Mapping[str, ImageRecord]):
    """The images of a folder by id, in file order; each record is parsed from disk when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place: dict[str, tuple[int, int, bool]] = {}  # id -> byte offset, line, wider than high
        for line, offset, value in read_lines(path):
            _raise_first(path, line, image_findings(value))
            if value["image_id"] in self._place:
                first = self._place[value["image_id"]][1]
                _raise(path, line, "image_id", _shown(value["image_id"]), f"an id of its own (line {first} has the same)")
            self._place[value["image_id"]] = (offset, line, value["width"] > value["height"])

    def __getitem__(self, image_id: str) -> ImageRecord:
        offset, line, _ = self._place[image_id]
        with self.path.open("rb") as file:
            file.seek(offset)
            text = file.readline()
        try:
            value = json.loads(text)
            if value["image_id"] == image_id:
                return ImageRecord(**value | {"instances": [Instance(**instance) for instance in value["instances"]]})
        except (ValueError, TypeError, KeyError):
            pass
        raise fault(f"{self.path} line {line} is no longer image {image_id}", "an unchanged file", "load the dataset again")

    def line_of(self, image_id: str) -> int:
        """Return the line of an image, for messages."""
        return self._place[image_id][1]

    def is_wide(self, image_id: str) -> bool:
        """Tell whether an image is wider than high, without reading it."""
        return self._place[image_id][2]

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)


@dataclass
class Dataset:
    """A loaded folder. images: by id.  expressions: in file order.  info: dataset.json.  image_root: where `file` of an image starts."""

    folder: Path
    name: str
    image_root: Path
    images: ImageTable
    expressions: list[ExpressionRecord]
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def splits(self) -> list[str]:
        """Names of the splits, in the order of their first expression."""
        return list(dict.fromkeys(record.split for record in self.expressions))

    def expressions_of(self, split: str) -> list[ExpressionRecord]:
        """Return the expressions of a split in file order.

        Raises:
            GrexError: no expression has this split.
        """
        chosen = [record for record in self.expressions if record.split == split]
        if not chosen:
            raise fault(
                f'split "{split}" of {self.folder}', f"one of {', '.join(self.splits) or '(the folder is empty)'}", "name one of these"
            )
        return chosen


def load_dataset(folder: str | Path, image_root: str | Path | None = None) -> Dataset:
    """Read a dataset folder; image_root replaces the one in dataset.json (relative ones start at the folder).

    Raises:
        GrexError: a file is missing or a line has another form than stated; names file, line, field, value and what is expected.
    """
    folder = Path(folder)
    info = read_info(folder)
    images = ImageTable(folder / IMAGES)
    expressions: list[ExpressionRecord] = []
    first_lines: dict[str, int] = {}
    path = folder / EXPRESSIONS
    for line, _, value in read_lines(path):
        _raise_first(path, line, expression_findings(value))
        first = first_lines.setdefault(value["expression_id"], line)
        if first != line:
            _raise(path, line, "expression_id", _shown(value["expression_id"]), f"an id of its own (line {first} has the same)")
        if value["image_id"] not in images:
            _raise(path, line, "image_id", _shown(value["image_id"]), f"the id of a line of {IMAGES}")
        for name in ("image_id", "split", "source"):  # the same few strings, many times
            value[name] = sys.intern(value[name])
        expressions.append(ExpressionRecord(**value))
    return Dataset(folder, str(info["name"]), find_image_root(folder, info, image_root), images, expressions, info)


def find_image_root(folder: Path, info: dict[str, Any], override: str | Path | None = None) -> Path:
    """Return where the images are: the override, or dataset.json's image_root (relative to the folder, or absolute)."""
    return Path(override) if override is not None else folder / str(info["image_root"])


def read_info(folder: Path) -> dict[str, Any]:
    """Return dataset.json.

    Raises:
        GrexError: the folder or the file is missing, not JSON, or without name or image_root.
    """
    path = folder / INFO
    if not path.is_file():
        given = f"{folder} holds no {INFO}" if folder.is_dir() else f"dataset folder {folder} does not exist"
        raise fault(given, f"a folder with {IMAGES}, {EXPRESSIONS} and {INFO}", "make one with a program of data_prep/")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise fault(f"{path} is not JSON ({error})", "a JSON object", "make the folder again") from None
    for name in ("name", "image_root"):
        if not isinstance(info, dict) or not isinstance(info.get(name), str):
            raise fault(f"{path} without a string for {name}", "name and image_root", "fix the file or make the folder again")
    return dict(info)


def read_lines(path: Path) -> Iterator[tuple[int, int, Any]]:
    """Yield (line number from 1, byte offset, decoded JSON) of every line that is not blank.

    Raises:
        GrexError: the file is missing, or a line is not JSON.
    """
    if not path.is_file():
        raise fault(f"{path} does not exist", "a JSONL file of a dataset folder", "make the folder again with a program of data_prep/")
    offset = 0
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if text.strip():
                value, reason = decode_line(text)
                if reason:
                    _raise(path, number, "(line)", reason, "one JSON object on the line")
                yield number, offset, value
            offset += len(text)


def decode_line(text: bytes) -> tuple[Any, str]:
    """Return (value, "") of a JSON line, or (None, reason). NaN and infinity, which JSON lacks, are faults."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse), ""
    except (ValueError, RecursionError) as error:
        return None, f"not JSON ({error})"


def _raise_first(path: Path, line: int, findings: Iterator[Finding]) -> None:
    for finding in findings:
        _raise(path, line, *finding)


def _raise(path: Path, line: int, name: str, found: str, expected: str) -> NoReturn:
    raise GrexError(f"{Fault(str(path), line, name, found, expected)}; fix the line (`grex data check` lists every fault)")
