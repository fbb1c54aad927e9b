"""A small part of a split that stands for the whole: drawn by expression, the mix of sources and numbers of targets kept."""

from __future__ import annotations

import random
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from grex_mllm.data.judges import judge_files
from grex_mllm.data.records import Dataset, load_dataset
from grex_mllm.data.writing import DatasetWriter
from grex_mllm.errors import fault
from grex_mllm.types import ExpressionRecord

STRATIFIED, RANDOM = WAYS = ("stratified", "random")
MANY = 3  # numbers of targets: 0, 1, 2, 3 or more


def draw(expressions: Sequence[ExpressionRecord], number: int, way: str, seed: int = 0) -> list[ExpressionRecord]:
    """Return `number` of the expressions, in their order.

    way: "random", or "stratified": each stratum (source, number of targets) gives its share, by largest remainders, so that plain means of
    the sample estimate those of the split with less spread. The draw depends on ids and seed alone.

    Raises:
        GrexError: another way, or a number that is not in 1..len(expressions).
    """
    if way not in WAYS:
        raise fault(f'sample "{way}"', " or ".join(WAYS), "fix --sample")
    if not 1 <= number <= len(expressions):
        raise fault(f"a sample of {number}", f"1 to {len(expressions)}, the expressions of the split", "fix --limit")
    strata: dict[tuple[str, int], list[ExpressionRecord]] = defaultdict(list)
    for record in expressions:
        strata[(record.source, min(len(record.targets), MANY)) if way == STRATIFIED else ("", 0)].append(record)
    exact = {name: number * len(found) / len(expressions) for name, found in strata.items()}
    given = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(strata, key=lambda name: (given[name] - exact[name], name))
    for name in by_remainder[: number - sum(given.values())]:
        given[name] += 1
    chosen = set[str]()
    for name in sorted(strata):
        ids = sorted(record.expression_id for record in strata[name])
        chosen.update(random.Random(f"{seed}:{name}").sample(ids, given[name]))
    return [record for record in expressions if record.expression_id in chosen]


def write_sample(data: str | Path, split: str, number: int, way: str, out: Path, *, image_root: str | Path | None, seed: int = 0) -> None:
    """Write a sample of a split as a dataset folder of its own, or find it there; images stay where they are.

    Files that the data's judge reads beside the records are copied.

    Raises:
        GrexError: what `draw` raises; a folder that holds anything else.
    """
    dataset = load_dataset(data, image_root)
    drawn = draw(dataset.expressions_of(split), number, way, seed)
    note = {"way": way, "number": number, "seed": seed, "of": len(dataset.expressions_of(split)), "split": split}
    info = _info(dataset, note)
    if out.exists():
        if load_dataset(out).info.get("sample") != info["sample"]:
            raise fault(f"{out} holds other data than this sample", "this sample, or no folder", "remove it, or choose another --out")
        return
    with DatasetWriter(out) as writer:
        ids = dict.fromkeys(record.image_id for record in drawn)
        writer.add_images([dataset.images[image_id] for image_id in ids])
        writer.add_expressions(drawn)
        for name in judge_files(dataset.info):
            shutil.copyfile(dataset.folder / name, writer.workspace / name)
        writer.set_info(info)


def _info(dataset: Dataset, sample: dict[str, object]) -> dict[str, object]:
    keep = {name: value for name, value in dataset.info.items() if name not in ("tool_version", "counts") and not name.startswith("num_")}
    sample = {"folder": dataset.folder.name, **sample}
    return {**keep, "image_root": str(dataset.image_root.resolve()), "sample": sample}
