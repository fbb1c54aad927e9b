"""Dataset folders: atomic writing of the three files that `records.py` reads."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from grex_mllm import __version__
from grex_mllm.data.records import (
    EXPRESSION_FIELDS,
    EXPRESSIONS,
    IMAGE_FIELDS,
    IMAGES,
    INFO,
    INSTANCE_FIELDS,
    Finding,
    expression_findings,
    image_findings,
)
from grex_mllm.errors import fault
from grex_mllm.types import ExpressionRecord, ImageRecord
from grex_mllm.writing import take_place


def image_to_json(record: ImageRecord) -> dict[str, Any]:
    """Return the line of images.jsonl of a record, as a dict.

    Raises:
        GrexError: an instance holds a pixel mask but no segmentation (encode it first: masks are never written).
    """
    instances = []
    for instance in record.instances:
        if instance.mask is not None and instance.segmentation is None:
            raise fault(
                f"instance {instance.annotation_id} with a pixel mask only", "a segmentation", "encode it with ops.masks.encode_rle"
            )
        line: dict[str, Any] = {name: getattr(instance, name) for name in INSTANCE_FIELDS}
        if instance.attributes is not None:
            line["attributes"] = instance.attributes
        instances.append(line)
    return {name: getattr(record, name) for name in IMAGE_FIELDS} | {"instances": instances}


class DatasetWriter:
    """Write a dataset folder so that it appears complete or not at all.

    Use as a context manager: lines go to a hidden folder beside the target, which takes its place at the end and vanishes on an exception.
    `workspace` is that folder, for images that belong to the dataset.

    Raises:
        GrexError: the target exists and is not empty, unless `overwrite` is set and it is a dataset folder.
    """

    def __init__(self, folder: str | Path, overwrite: bool = False) -> None:
        self.folder = Path(os.path.abspath(folder))
        self.workspace = self.folder.parent / f".{self.folder.name}.partial"
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            if not overwrite:
                raise fault(f"{folder} exists", "a new or empty folder", "give another --out, or --overwrite")
            if not (self.folder / INFO).is_file():
                raise fault(
                    f"{folder} exists and holds no {INFO}", "a dataset folder to overwrite", "give another --out or remove it by hand"
                )

    def __enter__(self) -> DatasetWriter:
        if self.workspace.exists():  # left over by a killed run
            shutil.rmtree(self.workspace)
        self.workspace.mkdir(parents=True)
        self._images = (self.workspace / IMAGES).open("w", encoding="utf-8")
        self._expressions = (self.workspace / EXPRESSIONS).open("w", encoding="utf-8")
        self._info: dict[str, Any] | None = None
        self._num_images = self._num_instances = self._num_crowd_regions = 0
        self._written: list[ExpressionRecord] = []
        return self

    def add_images(self, records: Iterable[ImageRecord]) -> None:
        """Append lines to images.jsonl.

        Raises:
            GrexError: a record that strict reading would refuse.
        """
        for record in records:
            value = image_to_json(record)
            _write(self._images, f"image {record.image_id}", value, image_findings(value))
            self._num_images += 1
            self._num_instances += len(record.instances)
            self._num_crowd_regions += sum(instance.iscrowd for instance in record.instances)

    def add_expressions(self, records: Iterable[ExpressionRecord]) -> None:
        """Append lines to expressions.jsonl.

        Raises:
            GrexError: a record that strict reading would refuse.
        """
        for record in records:
            value = {name: getattr(record, name) for name in EXPRESSION_FIELDS}
            _write(self._expressions, f"expression {record.expression_id}", value, expression_findings(value))
            self._written.append(record)

    def set_info(self, info: dict[str, Any]) -> dict[str, Any]:
        """Set dataset.json, at least name and image_root, when all is added; return it with our version and the counts of all."""
        self._info = info | {
            "tool_version": __version__,
            "num_images": self._num_images,
            "num_instances": self._num_instances,
            "num_crowd_regions": self._num_crowd_regions,
            "num_expressions": len(self._written),
            "counts": count_records(self._written),
        }
        return self._info

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._images.close()
        self._expressions.close()
        if kind is not None:
            shutil.rmtree(self.workspace, ignore_errors=True)
            return
        assert self._info is not None, "set_info was not called"
        (self.workspace / INFO).write_text(json.dumps(self._info, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        take_place(self.workspace, self.folder)


def count_records(expressions: Iterable[ExpressionRecord]) -> dict[str, Any]:
    """Return the numbers of expressions, images and refs by split, and of expressions by number of targets."""
    splits: dict[str, list[ExpressionRecord]] = {}
    for record in expressions:
        splits.setdefault(record.split, []).append(record)
    return {split: _count(records) for split, records in splits.items()}


def _write(file: TextIO, name: str, value: dict[str, Any], findings: Iterator[Finding]) -> None:
    for field, found, expected in findings:
        raise fault(f"{name}, field {field}: {found}", expected, "fix the source")
    file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def _count(records: list[ExpressionRecord]) -> dict[str, Any]:
    return {
        "expressions": len(records),
        "images": len({record.image_id for record in records}),
        "refs": len({(record.image_id, record.ref_id) for record in records}),
        "by_num_targets": histogram(len(record.targets) for record in records),
    }


def histogram(numbers: Iterable[int]) -> dict[str, int]:
    """Return how often each number stands there, in the order of the numbers, under names that JSON takes."""
    return {str(number): times for number, times in sorted(Counter(numbers).items())}
