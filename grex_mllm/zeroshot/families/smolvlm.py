"""SmolVLM: no format for grounding was trained (huggingface/smollm#128); thousandths are asked for, as a floor."""

from __future__ import annotations

from grex_mllm.zeroshot.families.json_format import json_family
from grex_mllm.zeroshot.families.sizes import longest_then_tiles

FAMILY = json_family("smolvlm", "k1000", "xyxy", (r"smolvlm",), sent=longest_then_tiles(4 * 512, 512), model_types=("smolvlm",))
