"""Write synthetic scenes to disk as one of our dataset folders, with the same samples that are drawn on the fly."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from grex_mllm.data.records import read_info
from grex_mllm.data.synthetic.dataset import SyntheticDataset
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.data.writing import DatasetWriter
from grex_mllm.errors import fault

TOOL = "grex_mllm.data.synthetic.export"  # in dataset.json: the expressions are of this grammar and can be judged by it
NUM_SCENES, EXPRESSIONS_PER_SCENE = 250, 8  # of a test split


def is_synthetic(info: dict[str, Any]) -> bool:
    """Tell from dataset.json whether a folder holds scenes that were drawn here."""
    return info.get("tool") == TOOL


def settings_of(config: SyntheticConfig, split: str, length: int, expressions_per_image: int) -> dict[str, Any]:
    """Return what dataset.json tells of the scenes; equal settings are equal scenes."""
    return {"split": split, "scenes": length, "expressions_per_image": expressions_per_image, **asdict(config)}


def export_once(config: SyntheticConfig, split: str, length: int, folder: str | Path) -> None:
    """Write scenes into a folder, or find them there.

    Raises:
        GrexError: the folder holds anything else, or what `export` raises.
    """
    wanted = settings_of(config, split, length, EXPRESSIONS_PER_SCENE)
    if not Path(folder).exists():
        export(config, split, length, folder)
        return
    info = read_info(Path(folder))
    if not is_synthetic(info) or info.get("generator") != wanted:
        raise fault(
            f"{folder} holds other data than {length} synthetic scenes of split {split} with the model's settings",
            "these scenes, or no such folder",
            "remove it, or choose another --out",
        )


def export(
    config: SyntheticConfig,
    split: str,
    length: int,
    folder: str | Path,
    expressions_per_image: int = EXPRESSIONS_PER_SCENE,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `length` scenes of a split: images.jsonl, expressions.jsonl, dataset.json and images/*.png. Return what dataset.json holds.

    The folder appears complete or not at all; equal arguments write equal bytes with one version of Pillow's PNG encoder.

    Raises:
        GrexError: the folder exists and is not empty (unless `overwrite` and it is a dataset folder), or settings out of range.
    """
    from PIL import Image

    from grex_mllm.ops.masks import encode_rle

    dataset = SyntheticDataset(config, split, length, expressions_per_image)
    with DatasetWriter(folder, overwrite) as writer:
        (writer.workspace / "images").mkdir()
        for index in range(length):
            sample = dataset[index]
            for instance in sample.record.instances:
                assert instance.mask is not None
                instance.segmentation = encode_rle(instance.mask)
                instance.mask = None
            Image.fromarray(sample.image).save(writer.workspace / sample.record.file, optimize=False, compress_level=6)
            writer.add_images([sample.record])
            writer.add_expressions(sample.expressions)
        return writer.set_info(
            {
                "name": f"synthetic-{split}",
                "tool": TOOL,
                "sources": [],
                "licence": "MIT (drawn by grex-mllm)",
                "image_root": ".",
                "skipped": {},
                "generator": settings_of(config, split, length, expressions_per_image),
            }
        )
