"""A generator as a folder of its own: adapters and region tokens alone, or with the adapters merged into a copy of the LM.

`generator.json` (configuration, channels), `generator.safetensors`, `tokenizer/` and, when merged, `lm/`.
"""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

from grex_mllm.config import GeneratorConfig, check_keys, to_dict
from grex_mllm.errors import fault
from grex_mllm.models.generator import Generator
from grex_mllm.models.lm_tokenizer import LMTokenizer
from grex_mllm.writing import whole_entries

SETTINGS, WEIGHTS, TOKENIZER, LM = "generator.json", "generator.safetensors", "tokenizer", "lm"


def save_generator(generator: Generator, folder: str | Path, merged: bool = False) -> None:
    """Write the generator; merged adds the adapters to a copy of the LM, which any transformers program can then read from `lm/`.

    Raises:
        GrexError: merging into a quantised LM (rounding would change the answers).
    """
    from safetensors.torch import save_file

    cfg = generator.cfg
    if merged and cfg.quantisation != "none":
        raise fault(
            f"merging adapters into a base quantised as {cfg.quantisation}", "an unquantised base", "load it with quantisation: none"
        )
    target = Path(folder)
    with whole_entries(target) as work:
        state = generator.state_dict()
        if merged:
            lm = copy.deepcopy(generator.lm)
            lm = lm.merge_and_unload() if cfg.lora_rank else lm
            lm.save_pretrained(work / LM)
            generator.tokenizer.save(work / LM)
            state = {key: value for key, value in state.items() if not key.startswith("lm.")}
            cfg = replace(cfg, lm=LM, lora_rank=0)
        settings = {"generator": to_dict(cfg), "feature_channels": generator.feature_channels, "merged": merged}
        (work / SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")
        save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, work / WEIGHTS)
        generator.tokenizer.save(work / TOKENIZER)
    if not merged:
        shutil.rmtree(target / LM, ignore_errors=True)  # of an earlier, merged one


def load_generator(folder: str | Path) -> Generator:
    """Read what `save_generator` wrote; every tensor must be there and no other.

    Raises:
        GrexError: a file is missing, unknown settings, or weights that do not fit them.
    """
    from safetensors.torch import load_file

    source = Path(folder)
    for name in (SETTINGS, WEIGHTS, TOKENIZER):
        if not (source / name).exists():
            raise fault(f"generator folder {source} without {name}", f"{SETTINGS}, {WEIGHTS} and {TOKENIZER}/", "save the generator again")
    settings = json.loads((source / SETTINGS).read_text(encoding="utf-8"))
    check_keys(settings["generator"], GeneratorConfig, "generator", str(source / SETTINGS))
    cfg = GeneratorConfig(**settings["generator"])
    if settings["merged"]:
        cfg = replace(cfg, lm=str(source / LM))
    generator = Generator(cfg, settings["feature_channels"], LMTokenizer.load(source / TOKENIZER))
    try:
        generator.load_state_dict(load_file(source / WEIGHTS), strict=True)
    except RuntimeError as error:
        raise fault(f"{source / WEIGHTS}: {error}", f"the tensors that {SETTINGS} asks for", "take both files from one folder") from None
    return generator
