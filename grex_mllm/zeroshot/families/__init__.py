"""The table of families of multimodal language models: name -> module with `FAMILY`, imported when asked for.

A new family is one small file and one line here; tests/test_families.py and the uniform prompts then run over it.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from importlib import import_module

from grex_mllm.errors import fault
from grex_mllm.zeroshot.families.base import RELEASED, Family, Limits

__all__ = ["FAMILIES", "RELEASED", "Family", "Limits", "family_of_type", "find_family"]

_HERE = "grex_mllm.zeroshot.families"
FAMILIES = {
    "qwen2-vl": f"{_HERE}.qwen2_vl",
    "qwen2.5-vl": f"{_HERE}.qwen2_5_vl",
    "qwen3-vl": f"{_HERE}.qwen3_vl",
    "internvl": f"{_HERE}.internvl",
    "llava": f"{_HERE}.llava",
    "llava-onevision": f"{_HERE}.llava_onevision",
    "gemma3": f"{_HERE}.gemma3",
    "gemma4": f"{_HERE}.gemma4",
    "smolvlm": f"{_HERE}.smolvlm",
    "idefics3": f"{_HERE}.idefics3",
    "deepseek-vl2": f"{_HERE}.deepseek_vl2",
    "molmo": f"{_HERE}.molmo",
    "molmo2": f"{_HERE}.molmo2",
    "florence2": f"{_HERE}.florence2",
    "kosmos2": f"{_HERE}.kosmos2",
    "paligemma": f"{_HERE}.paligemma",
    "gpt": f"{_HERE}.gpt",
    "gemini": f"{_HERE}.gemini",
    "claude": f"{_HERE}.claude",
    "generic": f"{_HERE}.generic",
}


def find_family(model: str) -> Family:
    """Return the family of this name, or the one to which a model of this name belongs ("Qwen/Qwen2.5-VL-7B-Instruct", a folder, ...).

    Of all families whose pattern occurs in the name, the one with the longest match is taken.

    Raises:
        GrexError: no family has this name or a pattern that occurs in it. `generic` is never guessed: its frame would be a guess.
    """
    name = model.strip().lower()
    if name in FAMILIES:
        return _load(name)
    found = [(len(hit.group()), family) for family in FAMILIES for p in _load(family).patterns if (hit := re.search(p, name))]
    if found:
        return _load(max(found)[1])
    near = difflib.get_close_matches(name, FAMILIES, n=1)
    action = f'did you mean "{near[0]}"?' if near else 'name the family; "generic" asks for JSON with coordinates from 0 to 1000'
    raise fault(f'model or family "{model}"', f"one of {', '.join(FAMILIES)}, or a name that contains one", action)


def family_of_type(model_type: str) -> Family:
    """Return the family of a model by its type in transformers (`config.model_type`).

    Raises:
        GrexError: no family has this type.
    """
    found = next((family for name in FAMILIES if model_type in (family := _load(name)).model_types), None)
    if found is None:
        raise fault(f'model type "{model_type}"', "one of the families in zeroshot/families", "name it there, in its family's model_types")
    return found


@cache
def _load(name: str) -> Family:
    family: Family = import_module(FAMILIES[name]).FAMILY
    return family
