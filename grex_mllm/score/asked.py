"""What the lines of a model that was asked in words tell beside its answers: how many were answered, and what they cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

KEYS = {"by", "raw", "flags"}  # of a prediction line (eval/README.md)
KINDS = ("boxes", "no_target", "text", "refused", "unparsable", "error")


class Asked:
    """Counts over the lines with `raw`, by task ("ground", "generate").

    kinds: how the questions ended, see KINDS.  flags: how often a rule of the parser was needed.  by: names of the models.
    calls, cached: requests, and those of them that came out of the store.  tokens: prompt, completion, cached.
    seconds: of each call, added up.  cost: in the currency of the prices that were given.
    """

    def __init__(self) -> None:
        self.kinds: dict[str, Counter[str]] = {}
        self.flags: dict[str, Counter[str]] = {}
        self.by = set[str]()
        self.calls, self.cached, self.tokens = Counter[str](), Counter[str](), dict[str, Counter[str]]()
        self.seconds: dict[str, list[float]] = {}
        self.costs: dict[str, list[float]] = {}

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
            self.cached[task] += bool(answer.get("cached"))
            usage = answer.get("usage") if isinstance(answer.get("usage"), dict) else {}
            self.tokens.setdefault(task, Counter()).update({name: number for name, number in usage.items() if type(number) is int})
            self.seconds.setdefault(task, []).append(_number(answer.get("seconds")))
            self.costs.setdefault(task, []).append(_number(answer.get("cost")))

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
                "num_cached": self.cached[task],
                **{f"num_{name}": found for name, found in sorted(self.tokens.get(task, Counter()).items())},
                "call_seconds": round(math.fsum(self.seconds.get(task, ())), 3),
                "cost": round(math.fsum(self.costs.get(task, ())), 6),
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
