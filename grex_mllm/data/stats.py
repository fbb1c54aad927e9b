"""Describe a dataset folder: numbers, and a sheet of pictures to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from grex_mllm.data.images import load_image, resolve_image
from grex_mllm.data.records import Dataset, load_dataset
from grex_mllm.data.transforms import instance_mask
from grex_mllm.data.writing import count_records, histogram
from grex_mllm.draw import PAPER, add_caption, contact_sheet, draw_objects, enlarge_factor, save_png
from grex_mllm.types import ExpressionRecord, Geometry

CELL_PX = (480, 400)  # width, height of every picture on a sheet, without its caption


def dataset_stats(folder: str | Path, image_root: str | Path | None = None) -> dict[str, Any]:
    """Return counts of images, instances, categories and crowd regions, and per split: images, expressions, by number of targets, by
    length in words (distribution and quantiles), by source and by tag.

    Raises:
        GrexError: a malformed folder.
    """
    dataset = load_dataset(folder, image_root)
    categories: Counter[str] = Counter()
    crowd = 0
    for record in dataset.images.values():
        categories.update(instance.category for instance in record.instances if not instance.iscrowd)
        crowd += sum(instance.iscrowd for instance in record.instances)
    return {
        "name": dataset.name,
        "num_images": len(dataset.images),
        "num_instances": sum(categories.values()),
        "num_crowd_regions": crowd,
        "num_expressions": len(dataset.expressions),
        "categories": dict(categories.most_common()),
        "splits": {split: _split_stats(dataset.expressions_of(split)) for split in dataset.splits},
        "skipped": dataset.info.get("skipped", {}),
    }


def sample_sheet(folder: str | Path, out_png: str | Path, num: int = 12, seed: int = 0, image_root: str | Path | None = None) -> Path:
    """Draw expressions with their targets' masks and boxes, the text below each picture; the choice depends on the seed alone.

    Kinds (no target, one, several) take turns, so that a small sheet shows all that the folder has.

    Raises:
        GrexError: a malformed folder, an image that cannot be read.
    """
    dataset = load_dataset(folder, image_root)
    pictures = [_picture(dataset, record) for record in _choose(dataset.expressions, num, seed)]
    return save_png(contact_sheet(pictures), out_png)


def _split_stats(expressions: Sequence[ExpressionRecord]) -> dict[str, Any]:
    (counts,) = count_records(expressions).values()
    lengths = np.asarray([len(record.expression.split()) for record in expressions])
    return {
        **{name: counts[name] for name in ("images", "refs", "expressions", "by_num_targets")},
        "words": {
            "mean": round(float(lengths.mean()), 2),
            "median": float(np.median(lengths)),
            "p95": float(np.percentile(lengths, 95)),
            "max": int(lengths.max()),
            "by_length": histogram(lengths.tolist()),
        },
        "by_source": dict(Counter(record.source for record in expressions).most_common()),
        "by_tag": dict(Counter(tag for record in expressions for tag in record.tags).most_common()),
    }


def _choose(expressions: Sequence[ExpressionRecord], num: int, seed: int) -> list[ExpressionRecord]:
    order = np.random.default_rng(seed).permutation(len(expressions))
    kinds: dict[int, list[ExpressionRecord]] = {}
    for place in order:
        kinds.setdefault(min(len(expressions[place].targets), 2), []).append(expressions[place])
    turns = zip_longest(*(reversed(kinds[kind]) for kind in sorted(kinds, reverse=True)))
    return [record for turn in turns for record in turn if record is not None][:num]


def _picture(dataset: Dataset, record: ExpressionRecord) -> Image.Image:
    image_record = dataset.images[record.image_id]
    image = load_image(resolve_image(dataset.image_root, image_record.file))
    height, width = image.shape[:2]
    geometry = Geometry(height, width, height, width)
    wanted = set(record.targets)
    targets = [instance for instance in image_record.instances if instance.annotation_id in wanted]
    masks = [instance_mask(instance, geometry) for instance in targets]
    picture = draw_objects(image, masks, [instance.box_xyxy for instance in targets], factor=enlarge_factor(height, width, max(CELL_PX)))
    cell = ImageOps.pad(picture, CELL_PX, Image.Resampling.LANCZOS, color=PAPER)
    number = f"{len(targets)} target{'' if len(targets) == 1 else 's'}" if targets else "no target"
    return add_caption(cell, f'"{record.expression}"   [{number}, image {record.image_id}]')
