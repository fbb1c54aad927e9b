"""GPT-4o and its relatives: no convention of their own; pixels of the original are asked for, with its size told."""

from __future__ import annotations

from grex_mllm.zeroshot.families.json_format import json_family, nothing_plain
from grex_mllm.zeroshot.families.sizes import short_side

FAMILY = json_family(
    "gpt",
    "px",
    "xyxy",
    (r"(?<![a-z0-9])gpt-?[0-9][\w.]*", r"chatgpt", r"(?<![a-z0-9])o[1345](?![0-9.])(-mini|-pro)?"),
    key="bbox",
    point_key="point",
    write_nothing=nothing_plain,
    sent=short_side(2048, 768),
)
