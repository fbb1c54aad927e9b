"""Qwen2.5-VL: pixels of the resized picture, as JSON (QwenLM/Qwen3-VL#676, #940)."""

from __future__ import annotations

from grex_mllm.zeroshot.families.json_format import json_family
from grex_mllm.zeroshot.families.sizes import smart

FAMILY = json_family(
    "qwen2.5-vl", "px_sent", "xyxy", (r"qwen2[._]5-?vl",), sent=smart(28, 56 * 56, 16384 * 28 * 28), model_types=("qwen2_5_vl",)
)
