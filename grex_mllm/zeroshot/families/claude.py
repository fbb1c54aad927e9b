"""Claude: pixels of the picture as it was resized; of COCO's sizes that is the original."""

from __future__ import annotations

from grex_mllm.zeroshot.families.json_format import json_family
from grex_mllm.zeroshot.families.sizes import token_budget

FAMILY = json_family("claude", "px_sent", "xyxy", (r"claude",), key="bbox", point_key="point", sent=token_budget(1568, 28, 1568))
