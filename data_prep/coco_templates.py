"""Templated expressions over any COCO-format instance sets to a dataset folder. The text is synthetic and labelled so.

python data_prep/coco_templates.py --instances instances_val2017.json --images val2017 --out data/coco_templates
python data_prep/coco_templates.py --source cats=cats/instances.json.gz:cats/images --source traffic=traffic/instances.json:traffic/images \
    --exclude left_out.txt --out data/photos

The `categories` of an instance file are taken as exhaustively labelled: a category without an instance in an image is absent from it, and
nothing is said about any other category.
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

from grex_mllm.data.coco import check_image_files, describe_file
from grex_mllm.data.images import load_image, resolve_image
from grex_mllm.data.refs_program import show, status_of
from grex_mllm.data.templates import Shares, count_cooccurrence, draw_statements, read_scene
from grex_mllm.data.templates.balance import balanced, distribution, distribution_table
from grex_mllm.data.templates.colours import possible_colours
from grex_mllm.data.templates.drawing import Statement
from grex_mllm.data.templates.judge import SCENES, SCENES_HASH, scenes_json
from grex_mllm.data.templates.photographs import Photograph, Source, read_excluded, read_sources
from grex_mllm.data.writing import DatasetWriter
from grex_mllm.errors import fault
from grex_mllm.types import ExpressionRecord

PROGRAM = "data_prep/coco_templates.py"
LICENCE = "expressions: templates, synthetic text; instances: as their source (MS COCO: CC BY 4.0); photographs: Flickr"
CONSOLE = Console(stderr=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; a fault of the user's files is one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", action="append", default=[], metavar="NAME=INSTANCES:IMAGES", help="one of several sources; repeatable")
    parser.add_argument("--instances", type=Path, help="COCO-format instance file (.json or .json.gz), for a single source")
    parser.add_argument("--images", type=Path, help="folder with its image files")
    parser.add_argument("--out", required=True, type=Path, help="dataset folder to make")
    parser.add_argument("--name", default="coco_templates", help="of the dataset, and of a single source (default: %(default)s)")
    parser.add_argument("--licence", default=LICENCE, help="licence text for dataset.json")
    parser.add_argument(
        "--exclude", type=Path, help="photographs to leave out: a COCO-format file, or image ids and file names, one a line"
    )
    parser.add_argument("--expressions-per-image", default="8", help="at most so many, also as train=24,val=8 (default: %(default)s)")
    parser.add_argument("--no-target-share", type=float, default=Shares.no_target, help="share without a target (default: %(default)s)")
    parser.add_argument("--multi-target-share", type=float, default=Shares.several, help="least share with several (default: %(default)s)")
    parser.add_argument("--whole-share", type=float, default=Shares.whole, help="largest share of a whole category (default: %(default)s)")
    parser.add_argument("--splits", default="train=0.8,val=0.1,test=0.1", help="shares of the images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of expressions and of the splits")
    parser.add_argument("--overwrite", action="store_true", help="replace the dataset folder --out")
    options = parser.parse_args(arguments)
    return status_of(PROGRAM, lambda: report(convert(options), options.out))


def report(info: dict[str, Any], out: Path) -> None:
    """Print what was written."""
    CONSOLE.print(distribution_table(info["distribution"]))
    show(info, out)


def convert(options: argparse.Namespace) -> dict[str, Any]:
    """Write the folder, all of it or nothing, and return its dataset.json.

    Raises:
        GrexError: any fault of the sources or of an option.
    """
    splits = parse_splits(options.splits)
    shares = Shares(options.no_target_share, options.multi_target_share, options.whole_share)
    most = parse_numbers(options.expressions_per_image, [name for name, _ in splits])
    if not 0 <= shares.no_target < 1 or not 0 <= shares.several <= 1 - shares.no_target or not 0 <= shares.whole <= 1:
        given = f"--no-target-share {shares.no_target} --multi-target-share {shares.several} --whole-share {shares.whole}"
        raise fault(given, "shares in [0, 1], the first two with a sum of at most 1", "fix the options")
    skipped: Counter[str] = Counter()
    with DatasetWriter(options.out, options.overwrite) as writer:
        with CONSOLE.status("reading the instance files"):
            excluded = read_excluded(options.exclude) if options.exclude else frozenset()
            sources, photographs = read_sources(wanted_sources(options), excluded, skipped)
        root = sources[0].root
        check_image_files([photograph.record for photograph in photographs], root)
        drawn, colours = draw(photographs, root, most=most, shares=shares, splits=splits, seed=options.seed)
        described = {photograph.record.image_id for photograph, _, statements in drawn if statements}
        skipped["image that allows no expression"] += len(photographs) - len(described)
        kept = [photograph for photograph in photographs if photograph.record.image_id in described]
        writer.add_images(photograph.record for photograph in kept)
        writer.add_expressions(expression for entry in drawn for expression in records(*entry))
        data = scenes_json(
            {source.name: source.labelled for source in sources},
            {photograph.record.image_id: photograph.source for photograph in kept},
            {name: found for name, found in colours.items() if name in described},
        )
        (writer.workspace / SCENES).write_bytes(data)
        info = describe(options, sources, root, skipped) | {SCENES_HASH: hashlib.sha256(data).hexdigest()}
        return writer.set_info(info | {"distribution": distribution((p.source, split, found) for p, split, found in drawn)})


def wanted_sources(options: argparse.Namespace) -> list[tuple[str, Path, Path]]:
    """Return (name, instance file, image folder) of all sources.

    Raises:
        GrexError: none, both ways of naming them, another form, or a name twice.
    """
    single = options.instances is not None and options.images is not None
    if single == bool(options.source) or (options.source and (options.instances or options.images)):
        raise fault("the sources", "either --instances and --images, or --source NAME=INSTANCES:IMAGES", "give one of both")
    if single:
        return [(options.name, options.instances, options.images)]
    found = []
    for text in options.source:
        name, _, rest = text.partition("=")
        instances, _, images = rest.rpartition(":")
        if not (name and instances and images):
            raise fault(f"--source {text}", "NAME=INSTANCES:IMAGES", "fix the option")
        found.append((name, Path(instances), Path(images)))
    if len({name for name, _, _ in found}) < len(found):
        raise fault(f"--source {' '.join(name for name, _, _ in found)}", "a name of its own for each source", "fix the options")
    return found


Drawn = tuple[Photograph, str, list[Statement]]  # photograph, split, statements


def draw(
    photographs: list[Photograph], root: Path, *, most: dict[str, int], shares: Shares, splits: list[tuple[str, float]], seed: int
) -> tuple[list[Drawn], dict[str, dict[str, list[str]]]]:
    """Return what is said of each photograph, and the colours of its instances by image id."""
    cooccurrence = {
        name: count_cooccurrence(photograph.record for photograph in photographs if photograph.source == name)
        for name in {photograph.source for photograph in photographs}
    }
    drawn: list[Drawn] = []
    colours: dict[str, dict[str, list[str]]] = {}
    for photograph in track(photographs, description="writing expressions", console=CONSOLE, disable=not CONSOLE.is_terminal):
        record, key = photograph.record, photograph.original_id
        found = possible_colours(record, lambda record=record: load_image(resolve_image(root, record.file)))
        if found:
            colours[record.image_id] = found
        split = choose_split(key, splits, seed)
        rng = np.random.default_rng(stable_number(f"{seed}/{key}"))
        scene = read_scene(record, photograph.labelled, found)
        statements = draw_statements(scene, cooccurrence[photograph.source], num=most[split], shares=shares, rng=rng)
        drawn.append((photograph, split, statements))
    return balance(drawn, shares, seed), colours


def balance(drawn: list[Drawn], shares: Shares, seed: int) -> list[Drawn]:
    """Return the statements without those that a split of a source has too many of."""
    groups: dict[tuple[str, str], list[int]] = {}
    for place, (photograph, split, _) in enumerate(drawn):
        groups.setdefault((photograph.source, split), []).append(place)
    result = list(drawn)
    for places in groups.values():
        keys = [(f"{seed}/{drawn[place][0].original_id}", drawn[place][2]) for place in places]
        for place, statements in zip(places, balanced(keys, shares), strict=True):
            result[place] = (*drawn[place][:2], statements)
    return result


def records(photograph: Photograph, split: str, statements: list[Statement]) -> list[ExpressionRecord]:
    """Return the expression records of a photograph: `raw` as somebody says it, `expression` canonical."""
    image_id, found = photograph.record.image_id, []
    for number, said in enumerate(statements):
        name = f"{photograph.source}:{image_id}.{number}"
        found.append(
            ExpressionRecord(name, name, image_id, said.expression, said.text, list(said.targets), split, photograph.source, [said.kind])
        )
    return found


def describe(options: argparse.Namespace, sources: list[Source], root: Path, skipped: Counter[str]) -> dict[str, Any]:
    """Return dataset.json, without the counts."""
    names = ("seed", "splits", "expressions_per_image", "no_target_share", "multi_target_share", "whole_share")
    return {
        "name": options.name,
        "tool": PROGRAM,
        "options": {name: getattr(options, name) for name in names},
        "text": "synthetic: written from templates, true or false by the annotations; raw: varied, expression: canonical",
        "sources": [describe_file(source.instances) | {"source": source.name, "categories": sorted(source.labelled)} for source in sources],
        "excluded": describe_file(options.exclude) if options.exclude else None,
        "licence": options.licence,
        "image_root": str(root),
        "skipped": dict(+skipped),
    }


def parse_numbers(text: str, splits: list[str]) -> dict[str, int]:
    """Return the largest number of expressions of an image for each split, from "8" or "train=24,val=8,test=8".

    Raises:
        GrexError: another form, a split left out, or a number below 1.
    """
    try:
        given = text.split(",") if "=" in text else [f"{split}={text}" for split in splits]
        pairs = {name.strip(): int(number) for name, number in (item.split("=") for item in given)}
    except ValueError:
        pairs = {}
    if set(pairs) != set(splits) or min(pairs.values()) < 1:
        expected = f"a number above 0, or one for each of {', '.join(splits)}"
        raise fault(f"--expressions-per-image {text}", expected, "fix the option")
    return pairs


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


def choose_split(image_id: str, splits: list[tuple[str, float]], seed: int) -> str:
    """Return the split of an image: a function of its id and the seed, whatever other images there are."""
    place = stable_number(f"{seed}/{image_id}/split") / 2**64
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
