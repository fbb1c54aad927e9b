"""What the lines of a model that was asked in words tell beside its answers: how many were answered, and what they cost."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEYS = {"by", "raw", "flags"}  # of a prediction line (eval/README.md)
SPENT = ("calls", "cached", "seconds", "cost", "cached_tokens")  # in a file of costs (`predictors.protocol.costs_file`)
KINDS = ("boxes", "no_target", "text", "refused", "unparsable", "error")


class Asked:
    """Counts over the lines with `raw`, by task ("ground", "generate").

    kinds: how the questions ended, see KINDS.  flags: how often a rule of the parser was needed.  by: names of the models.
    calls: requests.  tokens: prompt_tokens, completion_tokens.  spent: of the files of costs beside the predictions, added up; they hold
    more than the lines where questions were asked again.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, Counter[str]] = {}
        self.flags: dict[str, Counter[str]] = {}
        self.by = set[str]()
        self.calls, self.tokens = Counter[str](), dict[str, Counter[str]]()
        self.spent: dict[str, dict[str, list[float]]] = {}

    def add(self, line: Mapping[str, Any]) -> None:
        """Take a prediction line; one without `raw` adds nothing."""
        if line.get("by"):
            self.by.add(str(line["by"]))
        if not isinstance(line.get("raw"), list):
            return
        task = "ground" if "expression_id" in line else "generate"
        self.kinds.setdefault(task, Counter())[_kind(line, task)] += 1
        self.flags.setdefault(task, Counter()).update(str(flag) for flag in line.get("flags") or ())
        for answer in line["raw"]:
            answer = answer if isinstance(answer, dict) else {}
            self.calls[task] += 1
            found = answer.get("usage")
            usage = found if isinstance(found, dict) else {}
            self.tokens.setdefault(task, Counter()).update({name: number for name, number in usage.items() if type(number) is int})

    def add_costs(self, path: Path) -> None:
        """Take a file of costs, if it is there; a cut last line of a killed run is left out."""
        if not path.is_file():
            return
        for line in path.read_bytes().splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and value.get("task") in self.kinds:
                for name in SPENT:
                    self.spent.setdefault(value["task"], {}).setdefault(name, []).append(_number(value.get(name)))

    def provenance(self) -> dict[str, Any]:
        """Return the block of results.json; {} where nobody was asked."""
        blocks = {}
        for task, kinds in sorted(self.kinds.items()):
            number = sum(kinds.values())
            blocks[task] = {
                "num_samples": number,
                "shares": {kind: kinds[kind] / number for kind in KINDS if kinds[kind]},
                "flags": dict(sorted(self.flags[task].items())),
                "num_calls": self.calls[task],
                **{f"num_{name}": found for name, found in sorted(self.tokens.get(task, Counter()).items())},
                **({"spent": {n: round(math.fsum(v), 6) for n, v in self.spent[task].items()}} if task in self.spent else {}),
            }
        return ({"by": sorted(self.by)} if self.by else {}) | ({"asked": blocks} if blocks else {})


def _kind(line: Mapping[str, Any], task: str) -> str:
    status = str(line.get("status", "ok"))
    if status != "ok":
        return status
    if task == "generate":
        return "text"
    return "no_target" if line.get("no_target") or not (line.get("boxes_xyxy") or line.get("mask_rle")) else "boxes"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0
