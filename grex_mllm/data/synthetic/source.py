"""Synthetic scenes as an entry of `grex_mllm.data.sources.SOURCES`."""

from __future__ import annotations

from pathlib import Path

from grex_mllm.config import DataConfig
from grex_mllm.data.synthetic.export import NUM_SCENES, export_once


def export_for_prediction(config: DataConfig, split: str, length: int | None, folder: Path) -> None:
    """Write scenes to predict into `folder`, or find these very scenes there. length: how many; None = as many as the demo's test split.

    Raises:
        GrexError: the folder holds anything else; an unknown split; settings out of range.
    """
    export_once(config.synthetic, split, length or NUM_SCENES, folder)
