"""A model of no known family: JSON with thousandths of the original is asked for. Only ever taken when it is named."""

from __future__ import annotations

from grex_mllm.zeroshot.families.json_format import json_family

FAMILY = json_family("generic", "k1000", "xyxy", (), key="bbox", point_key="point")
