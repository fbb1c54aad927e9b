"""Who judges what a generated expression means: `tool` of dataset.json names the program that wrote the data, and so its judge."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grex_mllm.types import ImageRecord

Judge = Callable[[str, ImageRecord, Sequence[str]], str]

JUDGES: dict[str, str] = {  # tool -> "module:function"; function(folder, dataset.json) returns the judge
    "grex_mllm.data.synthetic.export": "grex_mllm.data.synthetic.meaning:judge_of",
    "data_prep/coco_templates.py": "grex_mllm.data.templates.judge:judge_of",
}


FILES: dict[str, tuple[str, ...]] = {"data_prep/coco_templates.py": ("template_scenes.json",)}  # that a judge reads beside the records


def judge_files(info: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the files that the judge of a dataset folder reads beside the records. info: dataset.json."""
    return FILES.get(str(info.get("tool")), ())


def find_judge(folder: str | Path, info: Mapping[str, Any]) -> Judge | None:
    """Return the judge of a dataset folder, or None where what its expressions mean cannot be computed.

    info: dataset.json.  The judge takes (expression, image, target ids) and says exact, wrong, ambiguous or unparsable.

    Raises:
        GrexError: a file that the judge needs is missing or altered.
    """
    place = JUDGES.get(str(info.get("tool")))
    if place is None:
        return None
    module, _, name = place.partition(":")
    judge: Judge = getattr(importlib.import_module(module), name)(Path(folder), info)
    return judge
