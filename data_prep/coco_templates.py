"""Templated expressions over any COCO-format instance set to a dataset folder. The text is synthetic and labelled so.

python data_prep/coco_templates.py --instances instances_val2017.json --images val2017 --out data/coco_templates
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from grex_mllm.data.coco import check_image_files, describe_file, image_record, load_instances
from grex_mllm.data.refs_program import show, status_of
from grex_mllm.data.templates import count_cooccurrence, draw_statements, read_scene
from grex_mllm.data.writing import DatasetWriter
from grex_mllm.errors import fault
from grex_mllm.types import ExpressionRecord, ImageRecord

PROGRAM = "data_prep/coco_templates.py"
LICENCE = "expressions: templates, synthetic text; instances: as their source (MS COCO: CC BY 4.0); photographs: Flickr"
CONSOLE = Console(stderr=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; a fault of the user's files is one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", required=True, type=Path, help="COCO-format instance file")
    parser.add_argument("--images", required=True, type=Path, help="folder with the image files")
    parser.add_argument("--out", required=True, type=Path, help="dataset folder to make")
    parser.add_argument("--name", default="coco_templates", help="source name in every record (default: %(default)s)")
    parser.add_argument("--licence", default=LICENCE, help="licence text for dataset.json")
    parser.add_argument("--expressions-per-image", type=int, default=8, help="at most so many (default: %(default)s)")
    parser.add_argument("--no-target-share", type=float, default=0.2, help="share of expressions without a target (default: %(default)s)")
    parser.add_argument("--splits", default="train=0.8,val=0.1,test=0.1", help="shares of the images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of expressions and of the splits")
    parser.add_argument("--overwrite", action="store_true", help="replace the dataset folder --out")
    options = parser.parse_args(arguments)
    return status_of(PROGRAM, lambda: show(convert(options), options.out))


def convert(options: argparse.Namespace) -> dict[str, Any]:
    """Write the folder, all of it or nothing, and return its dataset.json.

    Raises:
        GrexError: any fault of the sources or of an option.
    """
    splits = parse_splits(options.splits)
    if not 0 <= options.no_target_share < 1 or options.expressions_per_image < 1:
        given = f"--no-target-share {options.no_target_share} --expressions-per-image {options.expressions_per_image}"
        raise fault(given, "a share in [0, 1) and at least one expression", "fix the options")
    skipped: Counter[str] = Counter()
    with DatasetWriter(options.out, options.overwrite) as writer:
        with CONSOLE.status(f"reading {options.instances.name}"):
            instances = load_instances(options.instances)
            images = [image_record(instances, image_id, skipped) for image_id in instances.images]
        cooccurrence = count_cooccurrence(images)
        expressions: list[ExpressionRecord] = []
        for record in track(images, description="writing expressions", console=CONSOLE, disable=not CONSOLE.is_terminal):
            rng = np.random.default_rng(stable_number(f"{options.seed}/{record.image_id}"))
            statements = draw_statements(
                read_scene(record),
                cooccurrence,
                instances.supercategories,
                num=options.expressions_per_image,
                no_target_share=options.no_target_share,
                rng=rng,
            )
            split = choose_split(record, splits, options.seed)
            for number, statement in enumerate(statements):
                name = f"{options.name}:{record.image_id}.{number}"
                text, tags = statement.expression, [statement.kind]
                targets = list(statement.targets)
                expressions.append(ExpressionRecord(name, name, record.image_id, text, text, targets, split, options.name, tags))
        described = {record.image_id for record in expressions}
        skipped["image that allows no expression"] += len(images) - len(described)
        images = [record for record in images if record.image_id in described]
        check_image_files(images, options.images)
        writer.add_images(images)
        writer.add_expressions(expressions)
        return writer.set_info(describe(options, expressions, skipped))


def describe(options: argparse.Namespace, expressions: list[ExpressionRecord], skipped: Counter[str]) -> dict[str, Any]:
    """Return dataset.json, without the counts."""
    return {
        "name": options.name,
        "tool": PROGRAM,
        "options": {
            "seed": options.seed,
            "splits": options.splits,
            "expressions_per_image": options.expressions_per_image,
            "no_target_share": options.no_target_share,
        },
        "text": "synthetic: written from templates, true or false by the annotations",
        "sources": [describe_file(options.instances)],
        "licence": options.licence,
        "image_root": str(options.images.resolve()),
        "kinds": dict(Counter(tag for record in expressions for tag in record.tags).most_common()),
        "skipped": dict(+skipped),
    }


def parse_splits(text: str) -> list[tuple[str, float]]:
    """Return (split, share) pairs whose shares sum to 1.

    Raises:
        GrexError: another form, or another sum.
    """
    try:
        pairs = [(name.strip(), float(share)) for name, share in (item.split("=") for item in text.split(","))]
    except ValueError:
        pairs = []
    if not pairs or any(share < 0 or not name for name, share in pairs) or abs(sum(share for _, share in pairs) - 1) > 1e-6:
        raise fault(f"--splits {text}", "like train=0.8,val=0.1,test=0.1, with a sum of 1", "fix the option")
    return pairs


def choose_split(record: ImageRecord, splits: list[tuple[str, float]], seed: int) -> str:
    """Return the split of an image: a function of its id and the seed, whatever other images there are."""
    place = stable_number(f"{seed}/{record.image_id}/split") / 2**64
    for name, share in splits:
        place -= share
        if place < 0:
            return name
    return splits[-1][0]


def stable_number(text: str) -> int:
    """Return 64 bits of the text's SHA-256 (Python's own hash differs between runs)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


if __name__ == "__main__":
    sys.exit(main())
