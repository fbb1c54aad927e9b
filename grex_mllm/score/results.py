"""results.json: layout, provenance, writing (the layout is described in eval/protocols/README.md)."""

from __future__ import annotations

import json
import math
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import grex_mllm
from grex_mllm.score.protocol import Protocol
from grex_mllm.score.reading import PredictionFiles
from grex_mllm.score.tally import ALL, BASELINES, Tally
from grex_mllm.score.truth import TruthFolder
from grex_mllm.writing import whole_file

PACKAGES = ("numpy", "pycocotools", "pycocoevalcap", "torch", "transformers")
PROTOCOLS = ("strict", "official")
COUNTED = ("statuses", "judgements", "not_computed")  # of these a mean says nothing
NUM_BUCKETS = ("0", "1", "2", "3+")


def assemble(
    tally: Tally, of_sets: dict[str, dict[str, Any]], provenance: dict[str, Any], beside: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Return the whole results dictionary.

    of_sets: blocks of the metrics of object sets, by group.  beside: results of other systems on the split, set among the baselines.
    """
    groups = sorted({key[0] for key in tally.sums} | {group for blocks in of_sets.values() for group in blocks})
    tags, sources = ([g.partition("|")[2] for g in groups if g.startswith(f"{kind}|")] for kind in ("tag", "source"))

    def scores(group: str, protocol: str = "strict") -> dict[str, Any]:
        found = group_scores(tally, group, protocol)
        return found | {task: blocks[group] for task, blocks in of_sets.items() if protocol == "strict" and group in blocks}

    results = {
        "provenance": provenance,
        "results": {protocol: scores(ALL, protocol) for protocol in PROTOCOLS},
        "by_num_targets": {b: scores(f"num|{b}") for b in NUM_BUCKETS if f"num|{b}" in groups},
        "by_tag": {tag: scores(f"tag|{tag}") for tag in tags},
        "by_source": {name: {protocol: scores(f"source|{name}", protocol) for protocol in PROTOCOLS} for name in sources},
        "baselines": {name: group_scores(tally, f"baseline|{name}", "strict") for name in BASELINES if f"baseline|{name}" in groups},
    }
    if len(sources) > 1:
        results["mean_of_sources"] = {p: mean_of([both[p] for both in results["by_source"].values()]) for p in PROTOCOLS}
    for name, other in (beside or {}).items():
        results["baselines"][name] = other["results"]["strict"]
        if len(sources) > 1 and other.get("mean_of_sources"):
            results["mean_of_sources"][name] = other["mean_of_sources"]["strict"]
    calibration = tally.calibration.compute()
    if calibration["num_samples"]:
        results["calibration"] = calibration
    return results


def mean_of(blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of every number over blocks that count the same each, whatever their sizes; num_samples are added up.

    A number that some blocks do not have (N_acc of a source in which nothing is without a target) is the mean of the others.
    """
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for block in blocks for key in block):
        values = [block[key] for block in blocks if block.get(key) is not None]
        if key in COUNTED:
            continue
        if values and all(isinstance(value, dict) for value in values):
            found[key] = mean_of(values)
        elif values and all(type(value) in (int, float) for value in values):
            found[key] = sum(values) if key == "num_samples" else math.fsum(values) / len(values)
        elif not values:
            found[key] = None
    return found


def group_scores(tally: Tally, group: str, protocol: str) -> dict[str, Any]:
    """Return {task: metrics} of one group under one protocol."""
    with warnings.catch_warnings():
        if group != ALL:
            warnings.simplefilter("ignore")  # a group without any pixel is nothing to warn of: its cIoU is 0 as stated
        return {task: sums.compute() for (name, p, task), sums in tally.sums.items() if name == group and p == protocol}


def describe_run(
    protocol: Protocol, truth: TruthFolder, index: PredictionFiles, num_missing: int, *, config: dict[str, Any] | None, notes: list[str]
) -> dict[str, Any]:
    """Return the provenance block: what was scored, by which rules, with which code. No clock, no host: equal runs, equal files."""
    counted, settings = len(index) + num_missing, protocol.settings()
    return {
        "protocol": settings,
        "thresholds": {"values": {t: rules for t, rules in settings["tasks"].items() if rules}, "chosen": protocol.thresholds_chosen},
        "grex_mllm": grex_mllm.__version__,
        "commit": current_commit(),
        "packages": {name: _version(name) for name in PACKAGES},
        "config": config,
        "dataset": truth.provenance() | {"num_expressions": len(truth)},
        "predictions": {
            "files": [path.name for path in index.paths],
            "sha256": index.sha256,
            "num_grounding": len(index),
            "num_generation": index.num_generation,
            "num_missing": num_missing,
            **({"reads_truth": index.reads_truth} if index.reads_truth else {}),
            "statuses": dict(sorted(index.statuses.items())),
            "unanswered_share": (counted - index.statuses["ok"]) / counted if counted else 0.0,
            **index.asked.provenance(),
        },
        "notes": notes,
    }


def current_commit() -> str | None:
    """Return the commit of the package's own checkout, with "+changes" where files differ; None for an installed package."""
    root = Path(grex_mllm.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "-C", str(root), "diff", "--quiet", "HEAD"], capture_output=True, check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if changed else commit


def write_results(results: dict[str, Any], out: Path) -> None:
    """Write results.json in one step: a reader never sees half of it."""
    with whole_file(out) as work:
        work.write_text(json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
