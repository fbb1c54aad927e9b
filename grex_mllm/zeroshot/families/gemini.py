"""Gemini 2 and later: box_2d as [ymin, xmin, ymax, xmax] in thousandths of the original."""

from __future__ import annotations

from grex_mllm.zeroshot.families.json_format import json_family

FAMILY = json_family("gemini", "k1000", "yxyx", (r"gemini",), key="box_2d", point_key="point")
