"""Protocol files: which metrics with which rules make up "GRES results", with a version (`eval/protocols/README.md`)."""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from grex_mllm.errors import fault
from grex_mllm.shipped import find_file


@dataclass(frozen=True)
class GresRules:
    """thresholds: X of Pr@X. min_mask_pixels: smaller masks count as "no target" (0 = off)."""

    thresholds: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    min_mask_pixels: int = 0


@dataclass(frozen=True)
class ResRules:
    """thresholds: X of Pr@X; expressions without a target are no part of RES and are left out, with their number reported."""

    thresholds: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class GrecRules:
    """select: boxes that `strict` counts: "threshold" | "count" (N_O best) | "all"; official_select: the same for `official`."""

    select: str = "threshold"
    official_select: str = "threshold"
    box_threshold: float = 0.7
    iou_threshold: float = 0.5
    f1_threshold: float = 1.0


@dataclass(frozen=True)
class RecRules:
    """iou_threshold: of the best-scored box with the one target; expressions with no or several targets are left out."""

    iou_threshold: float = 0.5


@dataclass(frozen=True)
class CountRules:
    """Accuracy over {0..5, >5}: nothing to choose."""


@dataclass(frozen=True)
class GregRules:
    """group_by: references pooled by "target_set" or "ref_id". tokenizer: "ptb" (needs Java) or "whitespace" (not comparable).

    spice: also SPICE, which needs Java and two CoreNLP 3.6.0 jars.
    """

    group_by: str = "target_set"
    tokenizer: str = "ptb"
    spice: bool = False


@dataclass(frozen=True)
class RvosRules:
    """tolerance: of the contours, as a share of the image diagonal."""

    tolerance: float = 0.008


RULES: dict[str, type] = {
    "gres": GresRules,
    "res": ResRules,
    "grec": GrecRules,
    "rec": RecRules,
    "count": CountRules,
    "greg": GregRules,
    "rvos": RvosRules,
}
CHOICES: dict[str, tuple[Any, ...]] = {
    "select": ("threshold", "count", "all"),
    "official_select": ("threshold", "count", "all"),
    "group_by": ("target_set", "ref_id"),
    "tokenizer": ("ptb", "whitespace"),
    "spice": (False, True),
}


@dataclass(frozen=True)
class Protocol:
    """A protocol file. tasks: task name -> its rules. thresholds_chosen: how the thresholds came about, in words."""

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
    _known(raw["tasks"], list(RULES), path, "tasks.")
    tasks = {}
    for task, given in raw["tasks"].items():
        given = given or {}
        _known(given, [f.name for f in fields(RULES[task])], path, f"tasks.{task}.")
        for key, value in given.items():
            if key in CHOICES and value not in CHOICES[key]:
                raise fault(f"{path}: tasks.{task}.{key} is {value!r}", f"one of {', '.join(map(str, CHOICES[key]))}", "fix the file")
        tasks[task] = RULES[task](**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    words = {key: str(raw[key]).strip() for key in ("thresholds_chosen", "description") if key in raw}
    return Protocol(str(raw["name"]), raw["version"], tasks, sha256=hashlib.sha256(text).hexdigest(), **words)


def _known(given: dict[str, Any], names: list[str], path: Path, where: str) -> None:
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            raise fault(
                f'{path}: unknown key "{where}{key}"', f"one of {', '.join(names)}", f'did you mean "{near[0]}"?' if near else "remove it"
            )
