"""Generated texts, one for each set of objects, against the references: matching, round trips; the metrics judge."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from grex_mllm.errors import GrexError, fault
from grex_mllm.metrics import entry
from grex_mllm.metrics.language import OTHER_WAYS
from grex_mllm.metrics.sums import empty_sums, stacked
from grex_mllm.metrics.truth import Truth
from grex_mllm.score.protocol import Protocol
from grex_mllm.score.reading import EXAMPLES, PredictionFiles
from grex_mllm.score.round_trip import RoundTrip
from grex_mllm.score.tally import ALL, groups_of
from grex_mllm.score.truth import TruthFolder

SetKey = tuple[str, ...]  # image id, then the sorted target ids; with group_by "ref_id" also the ref id in front


@dataclass
class ReferenceSet:
    """The expressions that name one set of objects. sources, tags: of all of them."""

    image_id: str
    targets: list[str]
    references: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)


def set_tasks(protocol: Protocol) -> list[str]:
    """Return the metrics of a protocol that score texts for sets of objects."""
    return [task for task in protocol.tasks if getattr(entry(task), "UNIT", "") == "object_set"]


def score_generation(
    truth: TruthFolder,
    index: PredictionFiles,
    protocol: Protocol,
    task: str,
    *,
    allow_missing: bool,
    notes: list[str],
    round_trip: RoundTrip | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the blocks of one metric of object sets: of ALL, and of each group (`groups_of`; a set has the tags of all its expressions).

    round_trip: grounds the texts whose line carries no `round_trip` of its own.

    Raises:
        GrexError: sets that the split does not have, repeated or (unless allowed) missing sets, with counts and the first five.
    """
    metric, rules = entry(task), protocol.tasks[task]
    group_by = getattr(rules, "group_by", "target_set")
    sets = reference_sets(truth, group_by)
    lines, missing = _match(truth, index, sets, group_by, allow_missing)
    statuses = Counter("missing" if line is None else line.get("status", "ok") for line in lines.values())
    answers = {key: lines[key] if (lines[key] or {}).get("status", "ok") == "ok" else None for key in sets}
    if round_trip is not None:
        _ground(round_trip, sets, answers)
    rows = []
    for key, item in sets.items():
        find_image = partial(truth.image, item.image_id)
        about = Truth(":".join(key), item.targets, find_image, item.references, tasks=protocol.tasks, find_mask=truth.mask)
        rows.append(metric.row(answers[key], about, rules, "strict"))
    if missing:
        notes.append(f"{task}: {missing} of {len(sets)} object sets have no generated expression and count as wrong (empty text)")
    members: dict[str, list[dict[str, Any]]] = {}
    for item, row in zip(sets.values(), rows, strict=True):
        for group in groups_of(len(item.targets), item.sources, item.tags):
            members.setdefault(group, []).append(row)
    blocks = {ALL: _block(metric, rules, rows) | {"statuses": dict(sorted(statuses.items()))}}
    part = getattr(metric, "part", lambda some, _, rules: _block(metric, rules, some))
    return blocks | {group: part(some, rows, rules) for group, some in members.items()}


def _block(metric: Any, rules: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    sums = empty_sums(metric, rules, "strict")
    sums.update_rows(stacked(metric, rows))
    return dict(sums.compute())


def reference_sets(truth: TruthFolder, group_by: str) -> dict[SetKey, ReferenceSet]:
    """Return the object sets of the split with their references; expressions without a target are no part of generation."""
    sets: dict[SetKey, ReferenceSet] = {}
    for record in truth.expressions():
        if record.targets:
            key = _key(record.image_id, record.targets, record.ref_id, group_by)
            found = sets.setdefault(key, ReferenceSet(record.image_id, sorted(record.targets)))
            found.references.append(record.expression)
            found.sources.append(record.source)
            found.tags += record.tags
    return sets


def _key(image_id: str, targets: list[str], ref_id: str, group_by: str) -> SetKey:
    key = (image_id, *sorted(set(targets)))
    return (ref_id, *key) if group_by == "ref_id" else key


def _match(
    truth: TruthFolder, index: PredictionFiles, sets: dict[SetKey, ReferenceSet], group_by: str, allow_missing: bool
) -> tuple[dict[SetKey, dict[str, Any] | None], int]:
    by_targets: dict[SetKey, list[SetKey]] = {}
    for key in sets:
        by_targets.setdefault(key[1:] if group_by == "ref_id" else key, []).append(key)
    lines: dict[SetKey, dict[str, Any] | None] = {}
    unknown, repeated = [], []
    for line in index.generations():
        image_id, targets = line["image_id"], line["targets"]
        if not isinstance(image_id, str) or not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise fault(
                f"generation line for image {image_id!r}, targets {str(targets)[:60]}", "string ids as in the dataset", "fix the line"
            )
        named = group_by == "ref_id" and line.get("ref_id") is not None
        keys = (
            [_key(image_id, targets, line["ref_id"], group_by)] if named else by_targets.get(_key(image_id, targets, "", "target_set"), [])
        )
        shown = f"{image_id}:{'+'.join(targets)}"
        if not keys or keys[0] not in sets:
            unknown.append(shown)
        for key in keys:
            if key in lines:
                repeated.append(shown)
            lines[key] = line
    absent = [key for key in sets if key not in lines]
    faults = [
        f"{len(found)} generated expressions for object sets {words} (first: {', '.join(found[:EXAMPLES])})"
        for found, words in ((unknown, "that the split does not name"), (repeated, "that have one already"))
        if found
    ]
    if absent and not allow_missing:
        faults.append(f"{len(absent)} object sets without one (first: {', '.join(':'.join(k) for k in absent[:EXAMPLES])})")
    if faults:
        raise GrexError(
            f'{"; ".join(faults)}; expected one for each of the {len(sets)} object sets of split "{truth.split}"; '
            "check --split and the file, or count missing ones as wrong with --allow-missing"
        )
    lines.update(dict.fromkeys(absent))
    return lines, len(absent)


def _ground(round_trip: RoundTrip, sets: dict[SetKey, ReferenceSet], answers: dict[SetKey, dict[str, Any] | None]) -> None:
    """Fill in the round trips that the lines do not carry, image by image."""
    waiting: dict[str, list[dict[str, Any]]] = {}
    for key, answer in answers.items():
        for way in (answer, *((answer or {}).get(name) for name in OTHER_WAYS)):
            if way and str(way.get("expression") or "").strip() and not way.get("round_trip"):
                waiting.setdefault(sets[key].image_id, []).append(way)
    for image_id, ways in waiting.items():
        for way, trip in zip(ways, round_trip.ground(image_id, [way["expression"] for way in ways]), strict=True):
            way["round_trip"] = trip
