"""Which layers of a multimodal model get LoRA adapters: those of its language part, unless other parts are named.

Suffixes alone ("q_proj") would also hit the image encoders of most families (huggingface/peft#2615); adapters there keep servers such as
vLLM from using them. So every layer is named in full.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from grex_mllm.errors import fault
from grex_mllm.models.generators.mllm.config import MllmConfig
from grex_mllm.models.multimodal.loading import language_part

LANGUAGE = "language"


def adapted_layers(model: Any, cfg: MllmConfig) -> list[str]:
    """Return the full names of the linear layers that get adapters.

    Raises:
        GrexError: a part that the model does not have, or a layer name that these parts do not have.
    """
    parts = dict(model.model.named_children())
    starts = []
    for part in cfg.lora_parts:
        module = language_part(model) if part == LANGUAGE else parts.get(part)
        if module is None:
            known = ", ".join([LANGUAGE, *parts])
            raise fault(f'model.generator.lora_parts names "{part}", which {cfg.lm} does not have', f"names among {known}", "fix the list")
        starts.append(next(name for name, other in model.named_modules() if other is module))
    found = [
        name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name.startswith(tuple(f"{s}." for s in starts))
    ]
    wanted = None if cfg.lora_targets == "auto" else ([cfg.lora_targets] if isinstance(cfg.lora_targets, str) else list(cfg.lora_targets))
    names = {name.rpartition(".")[2] for name in found}
    missing = [target for target in wanted or [] if target not in names]
    if missing or not found or wanted == []:
        raise fault(
            f"model.generator.lora_targets {cfg.lora_targets}: no layer called {', '.join(missing) or '(none given)'} in these parts",
            f"auto, or names among {', '.join(sorted(names))}",
            "fix lora_targets or lora_parts",
        )
    return [name for name in found if wanted is None or name.rpartition(".")[2] in wanted]
