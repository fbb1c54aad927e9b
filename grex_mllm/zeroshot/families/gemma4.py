"""Gemma 4: box_2d as [y1, x1, y2, x2] in thousandths of the original."""

from __future__ import annotations

from grex_mllm.zeroshot.families.json_format import json_family
from grex_mllm.zeroshot.families.sizes import patch_budget

FAMILY = json_family(
    "gemma4", "k1000", "yxyx", (r"gemma-?4",), key="box_2d", point_key="point", sent=patch_budget(patch=16, pool=3, tokens=280)
)
