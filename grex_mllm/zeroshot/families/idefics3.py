"""Idefics3: no format for grounding was trained; thousandths are asked for, as a floor."""

from __future__ import annotations

from grex_mllm.zeroshot.families.json_format import json_family
from grex_mllm.zeroshot.families.sizes import longest_then_tiles

FAMILY = json_family("idefics3", "k1000", "xyxy", (r"idefics-?3",), sent=longest_then_tiles(4 * 364, 364), model_types=("idefics3",))
