"""Protocol files: which metrics with which rules make up "GRES results", with a version (`eval/protocols/README.md`)."""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from grex_mllm.errors import fault
from grex_mllm.metrics import entry
from grex_mllm.shipped import find_file


@dataclass(frozen=True)
class Protocol:
    """A protocol file. tasks: entry of METRICS or dotted path -> its rules. thresholds_chosen: how the thresholds came about, in words."""

    name: str
    version: int
    tasks: dict[str, Any]
    thresholds_chosen: str = "fixed by the protocol"
    description: str = ""
    sha256: str = field(default="", compare=False)

    def settings(self) -> dict[str, Any]:
        """Return what is written into results: name, version, rules."""
        rules = {task: {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(r).items()} for task, r in self.tasks.items()}
        return {"name": self.name, "version": self.version, "sha256": self.sha256, "tasks": rules}


def load_protocol(path: str | Path) -> Protocol:
    """Read a protocol file.

    Raises:
        GrexError: file missing, no YAML mapping, an unknown key (with a suggestion) or a value outside its choices.
    """
    path = find_file(path)
    if not path.is_file():
        raise fault(f"protocol file {path} does not exist", "a file of eval/protocols/", "give its path")
    text = path.read_bytes()
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise fault(f"{path} is not YAML ({str(error).splitlines()[0]})", "a mapping", "see eval/protocols/README.md") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("tasks"), dict) or "name" not in raw or not isinstance(raw.get("version"), int):
        raise fault(f"{path} without name, version or tasks", "all three", "see eval/protocols/README.md")
    _known(raw, ["name", "version", "tasks", "thresholds_chosen", "description"], path, "")
    tasks = {task: _rules(task, given or {}, path) for task, given in raw["tasks"].items()}
    words = {key: str(raw[key]).strip() for key in ("thresholds_chosen", "description") if key in raw}
    return Protocol(str(raw["name"]), raw["version"], tasks, sha256=hashlib.sha256(text).hexdigest(), **words)


def _rules(task: str, given: Any, path: Path) -> Any:
    """Return the rules of one metric, an instance of its `Rules`."""
    kind = entry(task, f"{path}: ").Rules
    hints = get_type_hints(kind)
    if not isinstance(given, dict):
        raise fault(f"{path}: tasks.{task} is {given!r}", "a mapping of its rules", f"write {task}: {{}}")
    _known(given, list(hints), path, f"tasks.{task}.")
    for key, value in given.items():
        choices = get_args(hints[key]) if get_origin(hints[key]) is Literal else (False, True) if hints[key] is bool else None
        if choices is not None and not any(value is choice or (value == choice and type(value) is type(choice)) for choice in choices):
            raise fault(f"{path}: tasks.{task}.{key} is {value!r}", f"one of {', '.join(map(str, choices))}", "fix the file")
        if hints[key] in (int, float) and (type(value) is bool or not isinstance(value, int | float)):
            raise fault(f"{path}: tasks.{task}.{key} is {value!r}", "a number", "fix the file")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def _known(given: dict[str, Any], names: list[str], path: Path, where: str) -> None:
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            expected = f"one of {', '.join(names)}" if names else "no key"
            raise fault(f'{path}: unknown key "{where}{key}"', expected, f'did you mean "{near[0]}"?' if near else "remove it")
