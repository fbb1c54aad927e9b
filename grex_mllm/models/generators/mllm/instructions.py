"""The instruction of the generator: a versioned file of `eval/prompts/generator/`, a file of one's own, or a text.

Its words are kept with a model (`INSTRUCTION` in the folder of its tokenizer), because it answers in the wording that it learned.
"""

from __future__ import annotations

import difflib
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from grex_mllm.errors import fault
from grex_mllm.models.generators.mllm.config import MllmConfig
from grex_mllm.shipped import PROMPT_FOLDER, find_file

INSTRUCTION = "instruction.yaml"
PLACE = "{objects}"
NEEDED = {"task": str, "objects": str, "version": int, "user": str, "crops": str}
SHOWN = ("tokens", "numbers", "outlines", "coordinates")


class Instruction(NamedTuple):
    """before, after: the words around the objects.  crops: what stands in front where pictures of single objects follow."""

    before: str
    after: str
    crops: str


def instruction_text(config: MllmConfig) -> str:
    """Return the text of the file that `prompt` names, or one made of the text that it is; "": the file of the way to show objects.

    Raises:
        GrexError: no such file, a malformed one, or one for objects that are shown in another way.
    """
    shown = config.objects if config.objects != "marks" else config.mark_style
    if PLACE in config.prompt:
        whole = yaml.safe_load(_file(shown).read_text(encoding="utf-8"))
        return yaml.safe_dump({**whole, "user": config.prompt}, sort_keys=False, allow_unicode=True)
    file = find_file(config.prompt) if config.prompt.endswith((".yaml", ".yml")) else _file(config.prompt or shown)
    if not file.is_file():
        known = sorted(path.stem for path in (PROMPT_FOLDER / "generator").glob("*.yaml"))
        near = difflib.get_close_matches(config.prompt, known, n=1)
        raise fault(
            f"model.generator.prompt {config.prompt!r}",
            f"one of {', '.join(known)}, a .yaml file, or a text with {PLACE} once",
            f'did you mean "{near[0]}"?' if near else "see eval/prompts/README.md",
        )
    text = file.read_text(encoding="utf-8")
    read = _mapping(text, str(file))
    if read["objects"] != shown:
        given = f"model.generator.prompt {config.prompt!r}, which is for objects shown as {read['objects']}"
        raise fault(given, f"one for {shown}", "choose another prompt, or set objects and mark_style")
    return text


@lru_cache(maxsize=16)
def read_instruction(text: str) -> Instruction:
    """Return the instruction of a file's text.

    Raises:
        GrexError: a malformed file.
    """
    read = _mapping(text, INSTRUCTION)
    before, after = str(read["user"]).split(PLACE)
    return Instruction(before, after, str(read["crops"]))


def _file(name: str) -> Path:
    return PROMPT_FOLDER / "generator" / f"{name}.yaml"


def _mapping(text: str, where: str) -> dict[str, Any]:
    try:
        read = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise fault(f"{where} is not YAML ({str(error).splitlines()[0]})", "a mapping", "see eval/prompts/README.md") from None
    if not isinstance(read, dict) or set(read) != set(NEEDED) or any(type(read[key]) is not kind for key, kind in NEEDED.items()):
        given = f"{where} with {', '.join(map(str, read)) if isinstance(read, dict) else 'no keys'}"
        raise fault(given, f"the keys {', '.join(NEEDED)}, version a whole number, all others texts", "see eval/prompts/README.md")
    if read["task"] != "generator" or read["objects"] not in SHOWN or read["user"].count(PLACE) != 1:
        given = f"{where}: task {read['task']!r}, objects {read['objects']!r}, user {read['user']!r}"
        raise fault(given, f"generator, one of {', '.join(SHOWN)}, and a text with {PLACE} once", "fix the file")
    return read
