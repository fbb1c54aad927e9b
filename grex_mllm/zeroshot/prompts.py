"""Prompt files: how a task is put to a multimodal language model, with a version (`eval/prompts/README.md`).

A file of track `native` keeps the wording of a family's authors, with a sentence about nothing and several; one of track `uniform` serves
every family, whose frame, order, kind of answer and format it takes over.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from grex_mllm.errors import fault
from grex_mllm.ops.frames import FRAMES, ORDERS
from grex_mllm.shipped import PROMPT_FOLDER, find_file
from grex_mllm.zeroshot.base import View
from grex_mllm.zeroshot.families import FAMILIES, Family, find_family
from grex_mllm.zeroshot.families.base import ANSWERS

TASKS = ("grec", "gres", "greg", "count", "exists")
TRACKS = ("native", "uniform")
OF_FAMILY = "family"  # in place of a frame, an order or an answer: the family's own
MARKINGS = ("numbers", "outlines", "coordinates", "crops")
EMPTY = ("unparsable", "no_target")
PLACEHOLDERS = ("expression", "width", "height", "sent_width", "sent_height", "objects", "numbers", "colours", "count")
_PLACE = re.compile(r"\{([a-z_]+)\}")
_NUMBER = {"type": "number"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "boxes": {"bbox": {"type": "array", "items": _NUMBER}},
    "points": {"point": {"type": "array", "items": _NUMBER}},
    "polygons": {"polygon": {"type": "array", "items": {"type": "array", "items": _NUMBER}}},
}


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 = greedy.  top_p: share of the probability that is drawn from."""

    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """A prompt for one family; what the file leaves to the family is filled in.

    name: as it is asked for and as it stands in a result's name.  system: None = no system turn is sent.
    user: the text after the picture, with places such as {expression}.  frame, order, answer, empty_answer: see `Family`.
    answer: "" for the tasks greg, count and exists.  marking: for greg, how the objects are shown, of MARKINGS, joined by "+".
    sha256: of the file.
    """

    name: str
    task: str
    family: str
    track: str
    version: int
    user: str
    system: str | None = None
    frame: str = OF_FAMILY
    order: str = OF_FAMILY
    answer: str = ""
    empty_answer: str = OF_FAMILY
    max_tokens: int = 512
    sampling: Sampling = Sampling()
    marking: str = ""
    description: str = ""
    sha256: str = field(default="", compare=False)

    def render(
        self, view: View, *, expression: str = "", objects: str = "", numbers: str = "", colours: str = "", count: int = 0
    ) -> tuple[str | None, str]:
        """Return the system and the user text, places filled in; what is filled in is never read as a place itself.

        expression: asked about.  objects: coordinates of the objects to describe.  numbers, colours: of their marks.  count: theirs.

        Raises:
            GrexError: the prompt has a place for which no value is given.
        """
        values = {"expression": expression, "objects": objects, "numbers": numbers, "colours": colours, "count": str(count or "")}
        values |= {name: str(getattr(view, name)) for name in ("width", "height", "sent_width", "sent_height")}

        def fill(match: re.Match[str]) -> str:
            if match[1] not in values:
                return match[0]
            if not values[match[1]]:
                raise fault(f"prompt {self.name} without a value for {{{match[1]}}}", "one", "give it, or choose another prompt")
            return values[match[1]]

        return None if self.system is None else _PLACE.sub(fill, self.system), _PLACE.sub(fill, self.user)

    @property
    def schema(self) -> dict[str, Any] | None:
        """JSON schema of its answer, for servers that offer structured output; None for free text."""
        if self.answer not in SCHEMAS:
            return None
        item = SCHEMAS[self.answer]
        item = {"type": "object", "properties": item, "required": list(item), "additionalProperties": False}
        whole = {self.answer: {"type": "array", "items": item}}
        return {"type": "object", "properties": whole, "required": [self.answer], "additionalProperties": False}


def prompt_names(task: str, family: Family | str, track: str = "") -> list[str]:
    """Return the names of the shipped prompts of a task that fit a family: its native ones first; track: of one track only."""
    family = find_family(family) if isinstance(family, str) else family
    fits = [(path, raw) for path, raw in _shipped(task) if _serves(raw, family) and track in ("", raw["track"])]
    fits = [(path, raw) for path, raw in fits if raw["track"] == "native" or raw.get("answer", OF_FAMILY) in (OF_FAMILY, *family.formats)]
    return [name for _, name in sorted((raw["track"], path.stem) for path, raw in fits)]


def find_prompt(task: str, family: Family | str, name: str = "") -> Prompt:
    """Return a prompt of a task for a family.

    name: of a shipped prompt, or the path of a file that ends in .yaml; "" = the family's first native prompt, else "uniform".

    Raises:
        GrexError: no such prompt, one of another task or family, or a malformed file.
    """
    family = find_family(family) if isinstance(family, str) else family
    _one_of("task", task, TASKS, "the request")
    path = find_file(name) if name.endswith((".yaml", ".yml")) else PROMPT_FOLDER / task / f"{name}.yaml"
    if not name:
        names = prompt_names(task, family)
        path = PROMPT_FOLDER / task / f"{names[0] if names and not names[0].startswith('uniform') else 'uniform'}.yaml"
    elif not name.endswith((".yaml", ".yml")) and (not re.fullmatch(r"[\w.-]+", name) or not path.is_file()):
        names = prompt_names(task, family)
        near = difflib.get_close_matches(name, names, n=1)
        expected = f"one of {', '.join(names)}, or a path of a .yaml file"
        raise fault(f'prompt "{name}" for {task}', expected, f'did you mean "{near[0]}"?' if near else "see eval/prompts/README.md")
    prompt = load_prompt(path, family)
    if prompt.task != task:
        raise fault(f"prompt {path} of the task {prompt.task}", f"one for {task}", f"choose another, see {PROMPT_FOLDER / task}")
    return prompt


def load_prompt(path: str | Path, family: Family) -> Prompt:
    """Read a prompt file for a family.

    Raises:
        GrexError: file missing, no YAML mapping, an unknown key or place, a value outside its choices, or a prompt of another family.
    """
    path = find_file(path)
    if not path.is_file():
        raise fault(f"prompt file {path} does not exist", "a file of eval/prompts/", "give its path")
    text = path.read_bytes()
    raw = _read(path, text)
    if not _serves(raw, family):
        raise fault(f"prompt {path} of the family {raw['family']}", family.name, "choose a prompt of this family or of the uniform track")
    sampling = Sampling(**{key: float(value) for key, value in raw.get("sampling", {}).items()})
    words = {key: str(raw[key]).strip() for key in ("user", "system", "description") if raw.get(key) is not None}
    plain: dict[str, Any] = {key: raw[key] for key in ("task", "track", "version", "max_tokens", "marking") if key in raw}
    own = {key: raw.get(key, OF_FAMILY) for key in ("frame", "order", "empty_answer")}
    own = {key: getattr(family, key) if value == OF_FAMILY else value for key, value in own.items()}
    answer = family.answer if raw.get("answer") == OF_FAMILY else raw.get("answer", "")
    told: dict[str, Any] = {**plain, **words, **own}
    prompt = Prompt(path.stem, family=family.name, answer=answer, sampling=sampling, sha256=_sha(text), **told)
    if "{format}" not in prompt.user + (prompt.system or ""):
        return prompt
    if answer not in family.formats:
        raise fault(
            f"{path}: {answer or 'no kind of answer'} asked of {family.name}", f"one of {', '.join(family.formats)}", "change answer"
        )
    told = {key: value.replace("{format}", family.formats[answer]) for key in ("user", "system") if (value := getattr(prompt, key))}
    return replace(prompt, **told)


def _read(path: Path, text: bytes) -> dict[str, Any]:
    """Return the mapping of a file whose keys, places and choices have been checked."""
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise fault(f"{path} is not YAML ({str(error).splitlines()[0]})", "a mapping", "see eval/prompts/README.md") from None
    names = [f.name for f in fields(Prompt) if f.name not in ("name", "sha256")]
    needed = ("task", "family", "track", "version", "user", "max_tokens")
    if not isinstance(raw, dict) or any(key not in raw for key in needed):
        missing = ", ".join(key for key in needed if not isinstance(raw, dict) or key not in raw)
        raise fault(f"{path} without {missing}", f"{', '.join(needed)}", "see eval/prompts/README.md")
    for key in raw:
        _one_of("key", key, names, path)
    _one_of("task", raw["task"], TASKS, path)
    _one_of("track", raw["track"], TRACKS, path)
    for name in _families(raw):
        _one_of("family", name, ["any"] if raw["track"] == "uniform" else list(FAMILIES), path)
    _one_of("frame", raw.get("frame", OF_FAMILY), [*FRAMES, OF_FAMILY], path)
    _one_of("order", raw.get("order", OF_FAMILY), [*ORDERS, OF_FAMILY], path)
    _one_of("empty_answer", raw.get("empty_answer", OF_FAMILY), [*EMPTY, OF_FAMILY], path)
    grounds = raw["task"] in ("grec", "gres")
    _one_of("answer", raw.get("answer", ""), [*ANSWERS, OF_FAMILY] if grounds else [""], path)
    for mark in str(raw.get("marking", "")).split("+") if raw["task"] == "greg" or "marking" in raw else ():
        _one_of("marking", mark, MARKINGS if raw["task"] == "greg" else (), path)
    for key, kind in (("version", int), ("max_tokens", int), ("user", str)):
        if type(raw[key]) is not kind or not raw[key] or raw[key] == 0 or (kind is int and raw[key] < 1):
            raise fault(f"{path}: {key} is {raw[key]!r}", "a whole number above 0" if kind is int else "a text", "fix the file")
    _check_sampling(raw.get("sampling", {}), path)
    for place in _PLACE.findall(f"{raw['user']} {raw.get('system') or ''}"):
        _one_of("place", place, [*PLACEHOLDERS, "format"], path)
    return raw


def _check_sampling(given: Any, path: Path) -> None:
    if not isinstance(given, dict):
        raise fault(f"{path}: sampling is {given!r}", "temperature and top_p", "fix the file")
    ends = {"temperature": (0.0, 2.0), "top_p": (0.0, 1.0)}
    for key, value in given.items():
        _one_of("sampling", key, list(ends), path)
        if type(value) not in (int, float) or not ends[key][0] <= value <= ends[key][1]:
            raise fault(f"{path}: sampling.{key} is {value!r}", f"a number from {ends[key][0]} to {ends[key][1]}", "fix the file")


def _one_of(what: str, given: Any, choices: Any, where: object) -> None:
    if given not in choices:
        near = difflib.get_close_matches(str(given), [str(c) for c in choices], n=1)
        expected = f"one of {', '.join(map(str, choices))}" if len(choices) else "none"
        raise fault(f'{where}: {what} "{given}"', expected, f'did you mean "{near[0]}"?' if near else "see eval/prompts/README.md")


def _families(raw: dict[str, Any]) -> list[str]:
    return raw["family"] if isinstance(raw["family"], list) else [raw["family"]]


def _serves(raw: dict[str, Any], family: Family) -> bool:
    return raw["track"] == "uniform" or family.name in _families(raw)


def _shipped(task: str) -> list[tuple[Path, dict[str, Any]]]:
    return [(path, _read(path, path.read_bytes())) for path in sorted((PROMPT_FOLDER / task).glob("*.yaml"))]


def _sha(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
