"""Gemma 3: not trained for detection (ariG23498/gemma3-object-detection#6); thousandths are asked for. One square of 896 pixels."""

from __future__ import annotations

from grex_mllm.zeroshot.families.json_format import json_family
from grex_mllm.zeroshot.families.sizes import square

FAMILY = json_family("gemma3", "k1000", "xyxy", (r"gemma-?3n?",), sent=square(896), model_types=("gemma3",))
