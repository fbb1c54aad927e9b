"""Write synthetic scenes to disk as one of our dataset folders, with the same samples that are drawn on the fly."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from grex_mllm import __version__
from grex_mllm.config import SyntheticConfig
from grex_mllm.data.coco import count_records
from grex_mllm.data.synthetic.dataset import SyntheticDataset
from grex_mllm.data.writing import DatasetWriter
from grex_mllm.types import ExpressionRecord


def export(
    config: SyntheticConfig, split: str, length: int, folder: str | Path, expressions_per_image: int = 8, overwrite: bool = False
) -> dict[str, Any]:
    """Write `length` scenes of a split: images.jsonl, expressions.jsonl, dataset.json and images/*.png. Return what dataset.json holds.

    The folder appears complete or not at all; equal arguments write equal bytes with one version of Pillow's PNG encoder.

    Raises:
        GrexError: the folder exists and is not empty (unless `overwrite` and it is a dataset folder), or settings out of range.
    """
    from PIL import Image
    from pycocotools import mask as coco_mask

    dataset = SyntheticDataset(config, split, length, expressions_per_image)
    expressions: list[ExpressionRecord] = []
    num_instances = 0
    with DatasetWriter(folder, overwrite) as writer:
        (writer.workspace / "images").mkdir()
        for index in range(length):
            sample = dataset[index]
            for instance in sample.record.instances:
                assert instance.mask is not None
                code = coco_mask.encode(instance.mask.astype("uint8", order="F"))
                instance.segmentation = {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode("ascii")}
                instance.mask = None
            Image.fromarray(sample.image).save(writer.workspace / sample.record.file, optimize=False, compress_level=6)
            writer.add_images([sample.record])
            writer.add_expressions(sample.expressions)
            expressions.extend(sample.expressions)
            num_instances += len(sample.record.instances)
        info = {
            "name": f"synthetic-{split}",
            "tool": "grex_mllm.data.synthetic.export",
            "tool_version": __version__,
            "sources": [],
            "licence": "MIT (drawn by grex-mllm)",
            "image_root": ".",
            "num_images": length,
            "num_instances": num_instances,
            "num_crowd_regions": 0,
            "num_expressions": len(expressions),
            "counts": count_records(expressions),
            "skipped": {},
            "generator": {"split": split, "scenes": length, "expressions_per_image": expressions_per_image, **asdict(config)},
        }
        writer.set_info(info)
    return info
