"""COCO's instance files and the refs of RefCOCO and gRefCOCO, as published, to our records: what the programs of data_prep/ share."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from grex_mllm.data.pickles import load_plain_pickle
from grex_mllm.data.records import MAX_EXPRESSION_CHARACTERS
from grex_mllm.errors import GrexError, fault
from grex_mllm.ops.boxes import xywh_to_xyxy
from grex_mllm.ops.masks import MIN_POLYGON_NUMBERS, segmentation_to_mask, usable_polygons
from grex_mllm.types import ExpressionRecord, ImageRecord, Instance

NO_TARGET = -1  # gRefCOCO's annotation id of an expression that refers to nothing
THIN_PX = 4.0  # only instances thinner than this can vanish when they are rasterised
BOTH_FILES = "give refs and instances of one release"
MAX_UNPACKED_BYTES = 2 << 30  # four times COCO's largest instance file
PICKLE_SUFFIXES = (".p", ".pkl", ".pickle")


@dataclass
class CocoInstances:
    """A COCO instance file: images and annotations by id, annotations by image, category names, supercategory of each name where given."""

    path: Path
    images: dict[int, dict[str, Any]]
    annotations: dict[int, dict[str, Any]]
    by_image: dict[int, list[dict[str, Any]]]
    categories: dict[int, str]
    supercategories: dict[str, str]


@dataclass
class Conversion:
    """Records on their way to a folder, with a count of everything that was left out and why."""

    images: list[ImageRecord] = field(default_factory=list)
    expressions: list[ExpressionRecord] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)


def load_instances(path: str | Path) -> CocoInstances:
    """Read a COCO instance file.

    Raises:
        GrexError: missing, not JSON, or without the fields that COCO has.
    """
    path = Path(path)
    data = _load_json(path)
    try:
        images = {image["id"]: image for image in data["images"]}
        annotations = {annotation["id"]: annotation for annotation in data["annotations"]}
        categories = {category["id"]: str(category["name"]) for category in data["categories"]}
        supercategories = {str(category["name"]): str(category.get("supercategory", "")) for category in data["categories"]}
        for image in images.values():
            _ = image["file_name"], image["height"], image["width"]
        by_image: dict[int, list[dict[str, Any]]] = {}
        for annotation in data["annotations"]:
            _ = annotation["bbox"], annotation["segmentation"], categories[annotation["category_id"]]
            by_image.setdefault(annotation["image_id"], []).append(annotation)
    except (KeyError, TypeError) as error:
        raise fault(f"{path} is no COCO instance file (missing: {error})", "images, annotations and categories", "check the path") from None
    if len(images) != len(data["images"]) or len(annotations) != len(data["annotations"]):
        raise fault(f"{path} holds an image or annotation id twice", "unique ids", "fetch the published file again")
    return CocoInstances(path, images, annotations, by_image, categories, supercategories)


def image_record(instances: CocoInstances, image_id: int, skipped: Counter[str]) -> ImageRecord:
    """Return the record of an image with all its instances; what has no usable mask is left out and counted.

    Segmentations stay as published, except that polygons of fewer than three points are dropped, as the released loader does.

    Raises:
        GrexError: a run-length code of another size than the image, or a malformed segmentation.
    """
    image = instances.images[image_id]
    height, width = int(image["height"]), int(image["width"])
    kept = []
    for annotation in instances.by_image.get(image_id, []):
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, list):
            usable = usable_polygons(segmentation)
            skipped[f"polygon with fewer than {MIN_POLYGON_NUMBERS // 2} points"] += len(segmentation) - len(usable)
            segmentation = usable
        box = [float(number) for number in annotation["bbox"]]
        if isinstance(segmentation, dict) or min(box[2:]) < THIN_PX or not segmentation:
            try:
                empty = not segmentation_to_mask(segmentation, height, width).any()
            except GrexError as error:
                raise GrexError(f"{instances.path} annotation {annotation['id']} of image {image_id}: {error}") from None
            if empty:
                skipped["instance whose mask has no pixel"] += 1
                continue
        kept.append(
            Instance(
                annotation_id=str(annotation["id"]),
                category=instances.categories[annotation["category_id"]],
                box_xyxy=xywh_to_xyxy(np.asarray(box)).tolist(),
                segmentation=segmentation,
                iscrowd=bool(annotation.get("iscrowd", 0)),
            )
        )
    return ImageRecord(str(image_id), str(image["file_name"]), height, width, kept)


def load_refs(path: str | Path) -> list[dict[str, Any]]:
    """Read refs as published: JSON, or a pickle (through the restricted reader).

    Raises:
        GrexError: missing, unreadable, or no list of refs; names the position and the field.
    """
    path = Path(path)
    refs = load_plain_pickle(path) if path.suffix in PICKLE_SUFFIXES else _load_json(path)
    if not isinstance(refs, list):
        raise fault(f"{path} holds a {type(refs).__name__}", "a list of refs", "check that it is the refs file, not the instance file")
    for position, ref in enumerate(refs):
        for name, kind in (("ref_id", int | str), ("image_id", int), ("ann_id", int | list), ("split", str), ("sentences", list)):
            if not isinstance(ref, dict) or not isinstance(ref.get(name), kind):
                found = repr(ref.get(name, "missing")) if isinstance(ref, dict) else repr(ref)
                raise fault(f"{path} ref number {position}, field {name}: {found[:80]}", "a ref as published", "fetch the file again")
    return refs


def convert_refs(
    refs: Iterable[dict[str, Any]], instances: CocoInstances, source: str, refs_name: str, skip_bad: bool = False
) -> Conversion:
    """Return the records of refs in file order: one expression per sentence, one image line per image, with all instances of the image.

    Two refs with one ref_id stay two. A ref with a crowd region, or an annotation without a usable mask, among its targets is left out and
    counted, as the released loader leaves such annotations out.  skip_bad: count empty and over-long expressions instead of raising.

    Raises:
        GrexError: an image or annotation that does not exist or belongs to another image, an empty or over-long expression.
    """
    result = Conversion()
    selectable: dict[int, dict[int, bool]] = {}
    used_ids: set[str] = set()
    for ref in refs:
        place = f"{refs_name} ref {ref['ref_id']}"
        image_id = ref["image_id"]
        if image_id not in selectable:
            if image_id not in instances.images:
                given = f"{place}: image_id {image_id} is not in {instances.path}"
                raise fault(given, "an image of the instance file", BOTH_FILES)
            record = image_record(instances, image_id, result.skipped)
            result.images.append(record)
            selectable[image_id] = {int(instance.annotation_id): not instance.iscrowd for instance in record.instances}
        targets = _targets(ref, instances, place, result.skipped)
        if not all(selectable[image_id].get(target, False) for target in targets):
            crowd = any(instances.annotations[target].get("iscrowd", 0) for target in targets)
            reason = "a crowd region" if crowd else "an annotation without a usable mask"
            result.skipped[f"expression of a ref whose target is {reason}"] += len(ref["sentences"])
            continue
        for number, sentence in enumerate(ref["sentences"]):
            expression, raw, fault_found = _sentence(sentence)
            if fault_found:
                if not skip_bad:
                    raise GrexError(f"{place} sentence {number}: {fault_found}; fix the sentence, or leave such out with --skip-bad")
                result.skipped["empty or over-long expression"] += 1
                continue
            result.expressions.append(
                ExpressionRecord(
                    expression_id=_expression_id(source, ref, sentence, number, used_ids),
                    ref_id=str(ref["ref_id"]),
                    image_id=str(image_id),
                    expression=expression,
                    raw=raw,
                    targets=[str(target) for target in targets],
                    split=ref["split"],
                    source=source,
                )
            )
    named = {record.image_id for record in result.expressions}
    result.images = [record for record in result.images if record.image_id in named]
    result.skipped = +result.skipped
    return result


def check_image_files(images: Iterable[ImageRecord], folder: Path) -> None:
    """Raise where an image file is missing.

    Raises:
        GrexError: names the first missing file and how many there are.
    """
    if not folder.is_dir():
        raise fault(f"image folder {folder} does not exist", "the folder that holds the image files", "check --images")
    files = [record.file for record in images]
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise fault(f"{len(missing)} of {len(files)} image files are missing, first {folder / missing[0]}", "all of them", "check --images")


def describe_file(path: str | Path) -> dict[str, Any]:
    """Return name, size and SHA-256 of a source file."""
    path = Path(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}


def _load_json(path: Path) -> Any:
    if not path.is_file():
        raise fault(f"{path} does not exist", "a JSON file as published", "check the path")
    try:
        return json.loads(_unpacked(path) if path.suffix == ".gz" else path.read_bytes())
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise fault(f"{path} is not JSON ({error})", "a JSON file as published", "fetch the file again") from None


def _unpacked(path: Path) -> bytes:
    with gzip.open(path) as file:
        data = file.read(MAX_UNPACKED_BYTES + 1)
    if len(data) > MAX_UNPACKED_BYTES:
        raise fault(
            f"{path} unpacks to more than {MAX_UNPACKED_BYTES:,} bytes", "an instance file of at most that size", "unpack it yourself"
        )
    return data


def _targets(ref: dict[str, Any], instances: CocoInstances, place: str, skipped: Counter[str]) -> list[int]:
    given = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
    if given in ([], [NO_TARGET]):
        return []
    targets = list(dict.fromkeys(given))
    skipped["annotation id repeated within a ref"] += len(given) - len(targets)
    for target in targets:
        annotation = instances.annotations.get(target)
        if annotation is None:
            problem = f"{place}, field ann_id: annotation {target!r} is not in {instances.path}"
            raise fault(problem, "an annotation of the instance file", BOTH_FILES)
        if annotation["image_id"] != ref["image_id"]:
            problem = f"{place}, field ann_id: annotation {target} lies on image {annotation['image_id']}"
            raise fault(problem, f"one on image {ref['image_id']}", BOTH_FILES)
    return targets


def _sentence(sentence: Any) -> tuple[str, str, str]:
    """Return (expression, raw, ""), or ("", "", fault)."""
    texts = [sentence[name] for name in ("raw", "sent") if name in sentence] if isinstance(sentence, dict) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        return "", "", f"{str(sentence)[:80]!r}; expected a sentence with raw or sent"
    raw, expression = texts[0], texts[-1]
    for name, text in (("raw", raw), ("sent", expression)):
        if not text.strip():
            return "", "", f"field {name} is empty; expected an expression"
        if len(text) > MAX_EXPRESSION_CHARACTERS:
            return "", "", f"field {name} has {len(text):,} characters ({text[:40]!r}...); expected at most {MAX_EXPRESSION_CHARACTERS:,}"
    return expression, raw, ""


def _expression_id(source: str, ref: dict[str, Any], sentence: dict[str, Any], number: int, used: set[str]) -> str:
    """Return source:sentence id; without one, or where it is taken (ids repeat in published files), source:ref.number, and so on."""
    by_ref = f"{source}:{ref['ref_id']}.{number}"
    first = [f"{source}:{sentence['sent_id']}", by_ref] if "sent_id" in sentence else [by_ref]
    candidates = chain(first, (f"{by_ref}.{copy}" for copy in count(2)))
    chosen = next(candidate for candidate in candidates if candidate not in used)
    used.add(chosen)
    return chosen
