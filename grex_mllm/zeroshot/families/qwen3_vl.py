"""Qwen3-VL and Qwen3.5: thousandths of the original, as JSON (QwenLM/Qwen3-VL#1427, #1741)."""

from __future__ import annotations

from grex_mllm.zeroshot.families.json_format import json_family
from grex_mllm.zeroshot.families.sizes import smart

FAMILY = json_family(
    "qwen3-vl",
    "k1000",
    "xyxy",
    (r"qwen3-?vl", r"qwen3[._]5"),
    sent=smart(32, 256 * 256, 4096 * 4096),
    model_types=("qwen3_vl", "qwen3_vl_moe"),
)
