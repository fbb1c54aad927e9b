"""Prove a dataset folder: what its records claim against its images. Reports every fault and stops at none."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from grex_mllm.data.images import load_image, resolve_image
from grex_mllm.data.records import (
    EXPRESSIONS,
    IMAGES,
    INFO,
    Fault,
    decode_line,
    expression_findings,
    find_image_root,
    image_findings,
    read_info,
)
from grex_mllm.errors import GrexError
from grex_mllm.ops.masks import mask_to_box_xyxy, segmentation_to_mask, usable_polygons

BOX_TOLERANCE_PX = 1.5  # COCO's boxes equal the extent of their polygons; those of its crowd regions are one pixel short


@dataclass
class Folder:
    """What is kept of a folder while it is checked: enough to see duplicates, targets, and images shared between splits."""

    path: Path
    faults: list[Fault] = field(default_factory=list)
    image_lines: dict[str, int] = field(default_factory=dict)
    crowd: dict[str, dict[str, bool]] = field(default_factory=dict)  # image id -> annotation id -> is a crowd region
    keys: dict[str, list[str]] = field(default_factory=dict)  # image id -> names under which another folder may know the same picture
    splits: dict[str, dict[str, int]] = field(default_factory=dict)  # image id -> split -> first line of expressions.jsonl
    num_expressions: int = 0

    def report(self, file: str, line: int, name: str, found: str, expected: str) -> None:
        """Note a fault."""
        self.faults.append(Fault(str(self.path / file), line, name, found, expected))


def check_mixture(folders: Sequence[str | Path], image_root: str | Path | None = None) -> list[Fault]:
    """Return every fault of folders that are used together, [] if they are sound: those of each, and images that stand in several splits.

    Form of every line; ids unique; images open and have the stated size; segmentations decode to the image's size and at least one pixel;
    boxes lie inside the image and match their mask's extent within BOX_TOLERANCE_PX; targets are instances of their image and no crowd
    regions; expressions hold 1 to 1,000 characters.

    Two records are the same image if id and size are equal (COCO's ids are the same in all its descendants) or the files' bytes are.
    """
    states = []
    for path in folders:
        state = Folder(Path(path))
        root = _check_info(state, image_root)
        _check_images(state, root)
        _check_expressions(state)
        _check_totals(state)
        states.append(state)
    _check_splits(states)
    return [fault for state in states for fault in state.faults]


def _check_info(state: Folder, image_root: str | Path | None) -> Path | None:
    try:
        return find_image_root(state.path, read_info(state.path), image_root)
    except GrexError as error:
        state.report(INFO, 0, "(file)", str(error), f"a readable {INFO}")
        return Path(image_root) if image_root is not None else None


def _lines(state: Folder, file: str) -> Iterator[tuple[int, Any]]:
    path = state.path / file
    if not path.is_file():
        state.report(file, 0, "(file)", "missing", "a JSONL file")
        return
    with path.open("rb") as lines:
        for number, text in enumerate(lines, start=1):
            value, reason = decode_line(text)
            if text.strip() and reason:
                state.report(file, number, "(line)", reason, "one JSON object on the line")
            elif text.strip():
                yield number, value


def _check_images(state: Folder, root: Path | None) -> None:
    for line, value in _lines(state, IMAGES):
        findings = list(image_findings(value))
        for finding in findings:
            state.report(IMAGES, line, *finding)
        if not isinstance(value, dict) or not isinstance(value.get("image_id"), str):
            continue
        image_id = value["image_id"]
        first = state.image_lines.setdefault(image_id, line)
        if first != line:
            state.report(IMAGES, line, "image_id", f'"{image_id}"', f"an id of its own (line {first} has the same)")
            continue
        instances = [item for item in _list(value.get("instances")) if isinstance(item, dict)]
        state.crowd[image_id] = {str(item.get("annotation_id")): item.get("iscrowd") is True for item in instances}
        for name, times in Counter(str(item.get("annotation_id")) for item in instances).items():
            if times > 1:
                state.report(IMAGES, line, "instances.annotation_id", f'"{name}" more than once', "ids that are unique within the image")
        if findings:
            continue  # the claims of a malformed record cannot be checked
        state.keys[image_id] = [f"{image_id} of {value['height']}x{value['width']}"]
        if root is not None:
            _check_image_file(state, line, value, root)
        for position, item in enumerate(instances):
            _check_instance(state, line, f"instances[{position}]", item, height=value["height"], width=value["width"])


def _check_image_file(state: Folder, line: int, value: dict[str, Any], root: Path) -> None:
    try:
        path = resolve_image(root, value["file"])
        height, width = load_image(path).shape[:2]
    except GrexError as error:
        state.report(IMAGES, line, "file", f"{value['file']}: {error}", "an image file that opens")
        return
    with path.open("rb") as file:
        state.keys[value["image_id"]].append(hashlib.file_digest(file, "sha256").hexdigest())
    if (height, width) != (value["height"], value["width"]):
        swapped = "; the two look swapped" if (width, height) == (value["height"], value["width"]) else ""
        stated = f"{value['height']}x{value['width']}"
        state.report(IMAGES, line, "height, width", stated, f"{height}x{width}, the size of {value['file']} (EXIF applied){swapped}")


def _check_instance(state: Folder, line: int, where: str, item: dict[str, Any], *, height: int, width: int) -> None:
    name = f"{where} (annotation {item['annotation_id']})"
    box = np.asarray(item["box_xyxy"], np.float64)
    shown = _numbers(box)
    if box[2] <= box[0] or box[3] <= box[1]:
        state.report(IMAGES, line, f"{name}.box_xyxy", shown, "x1 < x2 and y1 < y2")
    elif min(box) < -BOX_TOLERANCE_PX or box[2] > width + BOX_TOLERANCE_PX or box[3] > height + BOX_TOLERANCE_PX:
        state.report(IMAGES, line, f"{name}.box_xyxy", shown, f"inside the image, x in 0..{width} and y in 0..{height}")
    if item["segmentation"] is None:
        return
    try:
        mask = segmentation_to_mask(item["segmentation"], height, width)
    except GrexError as error:
        state.report(IMAGES, line, f"{name}.segmentation", str(error), "a mask of the image's size")
        return
    if not mask.any():
        state.report(IMAGES, line, f"{name}.segmentation", "a mask without a pixel", "at least one pixel")
        return
    extents = [np.asarray(mask_to_box_xyxy(mask))]
    polygons = usable_polygons(item["segmentation"])
    if polygons:  # thin ends of a polygon may cover no pixel: its own corners count, too
        points = np.concatenate([np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in polygons])
        extents.append(np.concatenate([points.min(axis=0), points.max(axis=0)]))
    if min(float(np.abs(extent - box).max()) for extent in extents) > BOX_TOLERANCE_PX:
        state.report(IMAGES, line, f"{name}.box_xyxy", shown, f"the mask's extent {_numbers(extents[-1])} within {BOX_TOLERANCE_PX} px")


def _check_expressions(state: Folder) -> None:
    first_lines: dict[str, int] = {}
    for line, value in _lines(state, EXPRESSIONS):
        state.num_expressions += 1
        for finding in expression_findings(value):
            state.report(EXPRESSIONS, line, *finding)
        if not isinstance(value, dict):
            continue
        expression_id = value.get("expression_id")
        if isinstance(expression_id, str) and first_lines.setdefault(expression_id, line) != line:
            first = first_lines[expression_id]
            state.report(EXPRESSIONS, line, "expression_id", f'"{expression_id}"', f"an id of its own (line {first} has the same)")
        image_id, split = value.get("image_id"), value.get("split")
        if not isinstance(image_id, str):
            continue
        if image_id not in state.image_lines:
            state.report(EXPRESSIONS, line, "image_id", f'"{image_id}"', f"the id of a line of {IMAGES}")
            continue
        if isinstance(split, str):
            state.splits.setdefault(image_id, {}).setdefault(split, line)
        _check_targets(state, line, image_id, _list(value.get("targets")))


def _check_targets(state: Folder, line: int, image_id: str, targets: list[Any]) -> None:
    known = state.crowd[image_id]
    place = f"image {image_id} ({IMAGES} line {state.image_lines[image_id]})"
    for target, times in Counter(target for target in targets if isinstance(target, str)).items():
        if target not in known:
            state.report(EXPRESSIONS, line, "targets", f'"{target}"', f"the id of an annotation of {place}")
        elif known[target]:
            state.report(EXPRESSIONS, line, "targets", f'"{target}", a crowd region', f"an instance of {place} that is no crowd region")
        if times > 1:
            state.report(EXPRESSIONS, line, "targets", f'"{target}" {times} times', "each target once")


def _check_totals(state: Folder) -> None:
    """A file that was cut between two lines has no malformed line; only its length tells."""
    try:
        info = read_info(state.path)
    except GrexError:
        return  # reported by _check_info
    for name, number, file in (("num_images", len(state.image_lines), IMAGES), ("num_expressions", state.num_expressions, EXPRESSIONS)):
        if isinstance(info.get(name), int) and info[name] != number:
            state.report(INFO, 0, name, str(info[name]), f"{number}, the lines of {file}")


def _check_splits(states: list[Folder]) -> None:
    seen: dict[str, tuple[str, str]] = {}  # key of a picture -> (split, where it was seen first)
    for state in states:
        for image_id, splits in state.splits.items():
            for split, line in splits.items():
                place = f"{state.path / EXPRESSIONS} line {line}"
                clashes = [seen[key] for key in state.keys.get(image_id, []) if key in seen and seen[key][0] != split]
                if clashes:
                    expected = 'one split for an image ({1} has it in "{0}")'.format(*clashes[0])
                    state.report(EXPRESSIONS, line, "split", f'image {image_id} in "{split}"', expected)
                for key in state.keys.get(image_id, []):
                    seen.setdefault(key, (split, place))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _numbers(box: np.ndarray) -> str:
    return "[" + ", ".join(f"{number:g}" for number in np.round(box, 2)) + "]"
