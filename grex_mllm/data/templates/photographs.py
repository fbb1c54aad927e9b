"""Photographs of several COCO-format sources as image records under one root."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from grex_mllm.data.coco import image_record, load_instances
from grex_mllm.data.images import resolve_image
from grex_mllm.errors import fault
from grex_mllm.types import ImageRecord

COCO_NUMBER = re.compile(r"\d{12}")  # COCO_train2014_000000581857.jpg, 000000581857.jpg
LARGEST_LIST_BYTES = 100_000_000


@dataclass(frozen=True)
class Source:
    """One source. labelled: categories of which every instance is in the file.  root: common to all sources."""

    name: str
    instances: Path
    labelled: frozenset[str]
    root: Path


@dataclass(frozen=True)
class Photograph:
    """One photograph. original_id: in its instance file; the record's is told apart where two sources use the same."""

    record: ImageRecord
    source: str
    original_id: str
    labelled: frozenset[str]


def read_sources(
    sources: Sequence[tuple[str, Path, Path]], excluded: frozenset[str], skipped: Counter[str]
) -> tuple[list[Source], list[Photograph]]:
    """Return the sources and their photographs, without the excluded ones, which are counted in `skipped`.

    sources: (name, instance file, image folder).  excluded: see `read_excluded`.  A photograph is excluded by its id, its file's name, or
    the COCO number in that name. Files are relative to the folder that all image folders share.

    Raises:
        GrexError: an instance file that is none, or without a category; an image outside its folder.
    """
    folders = [folder.resolve() for _, _, folder in sources]
    root = Path(os.path.commonpath(folders))
    found: list[Source] = []
    photographs: list[Photograph] = []
    for (name, path, _), folder in zip(sources, folders, strict=True):
        instances = load_instances(path)
        labelled = frozenset(instances.categories.values())
        if not labelled:
            raise fault(f"{path} without a category", "the categories that are labelled", "check the file")
        found.append(Source(name, path, labelled, root))
        for image_id, image in instances.images.items():
            if not excluded.isdisjoint(_names(str(image_id), str(image["file_name"]))):
                skipped["excluded photograph"] += 1
                continue
            record = image_record(instances, image_id, skipped)
            resolve_image(folder, record.file)
            record = replace(record, file=(folder.relative_to(root) / record.file).as_posix())
            photographs.append(Photograph(record, name, str(image_id), labelled))
    times = Counter(photograph.original_id for photograph in photographs)
    return found, [
        replace(p, record=replace(p.record, image_id=f"{p.source}-{p.original_id}")) if times[p.original_id] > 1 else p for p in photographs
    ]


def read_excluded(path: Path) -> frozenset[str]:
    """Return ids, file names and COCO numbers of photographs: of a COCO-format file's images, or of a text, one id or file name a line.

    Raises:
        GrexError: a file that is missing, empty, or no text.
    """
    if path.suffix in (".json", ".gz"):
        names = [(str(image_id), str(image["file_name"])) for image_id, image in load_instances(path).images.items()]
    else:
        if not path.is_file() or path.stat().st_size > LARGEST_LIST_BYTES:
            raise fault(f"{path} does not exist or is too large", "image ids or file names, one a line", "check --exclude")
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise fault(f"{path} is no text ({error})", "image ids or file names, one a line", "check --exclude") from None
        names = [(line.strip(), line.strip()) for line in lines if line.strip()]
    if not names:
        raise fault(f"{path} names no photograph", "at least one", "leave --exclude out, or fix the file")
    return frozenset(key for image_id, file in names for key in _names(image_id, file))


def _names(image_id: str, file: str) -> Iterator[str]:
    """Yield the keys of a photograph: its id, the file's name, and the COCO number in it."""
    yield image_id
    name = file.rsplit("/", 1)[-1]
    yield name
    for number in COCO_NUMBER.findall(name):
        yield str(int(number))
