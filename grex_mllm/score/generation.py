"""Generation lines against the references: text metrics, round trips, the grammar's judgement; for greedy and re-ranked answers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from grex_mllm.errors import GrexError, fault
from grex_mllm.metrics import GREC, GRES
from grex_mllm.metrics.language import ALL, MULTI, SINGLE, score_texts
from grex_mllm.ops.rle import check_rle, empty_rle, overlap_counts
from grex_mllm.score.protocol import GrecRules, GregRules
from grex_mllm.score.reading import EXAMPLES, PredictionFiles, prediction_boxes
from grex_mllm.score.round_trip import RoundTrip
from grex_mllm.score.truth import TruthFolder

JUDGEMENTS = ("exact", "wrong", "ambiguous", "unparsable")
SetKey = tuple[str, ...]  # image id, then the sorted target ids; with group_by "ref_id" also the ref id in front


@dataclass
class ReferenceSet:
    """The expressions that name one set of objects."""

    image_id: str
    targets: list[str]
    references: list[str] = field(default_factory=list)


@dataclass
class Answers:
    """What was generated for the reference sets, in their order. None = no answer (counted as wrong)."""

    expressions: list[str] = field(default_factory=list)
    round_trips: list[dict[str, Any] | None] = field(default_factory=list)
    judgements: list[str | None] = field(default_factory=list)


def score_generation(
    truth: TruthFolder,
    index: PredictionFiles,
    rules: GregRules,
    boxes: GrecRules | None,
    allow_missing: bool,
    notes: list[str],
    round_trip: RoundTrip | None = None,
) -> dict[str, Any] | None:
    """Return the "greg" block of results, or None where the files have no generation line.

    round_trip: grounds the texts whose line carries no `round_trip` of its own.

    Raises:
        GrexError: sets that the split does not have, repeated or (unless allowed) missing sets, with counts and the first five.
    """
    if not index.num_generation:
        return None
    sets = reference_sets(truth, rules.group_by)
    lines, missing = _match(truth, index, sets, rules.group_by, allow_missing)
    statuses = Counter("missing" if line is None else line.get("status", "ok") for line in lines.values())
    greedy, listener = Answers(), Answers()
    has_listener = any(line and line.get("listener") for line in lines.values())
    for key in sets:
        line = lines[key]
        good = line if line is not None and line.get("status", "ok") == "ok" else {}
        _take(greedy, good, key)
        if has_listener:
            _take(listener, good.get("listener") or {}, key)
    items = list(sets.values())
    kinds = [greedy, listener] if has_listener else [greedy]
    if round_trip is not None:
        _ground(round_trip, items, kinds)
    texts = _texts(items, kinds, rules)
    block = _assemble(truth, items, greedy, texts[0], boxes)
    if has_listener:
        block["listener"] = _assemble(truth, items, listener, texts[1], boxes)
    block |= {"group_by": rules.group_by, "tokenizer": rules.tokenizer, "statuses": dict(sorted(statuses.items()))}
    if missing:
        notes.append(f"greg: {missing} of {len(sets)} object sets have no generated expression and count as wrong (empty text)")
    return block


def reference_sets(truth: TruthFolder, group_by: str) -> dict[SetKey, ReferenceSet]:
    """Return the object sets of the split with their references; expressions without a target are no part of generation."""
    sets: dict[SetKey, ReferenceSet] = {}
    for record in truth.expressions():
        if record.targets:
            key = _key(record.image_id, record.targets, record.ref_id, group_by)
            entry = sets.setdefault(key, ReferenceSet(record.image_id, sorted(record.targets)))
            entry.references.append(record.expression)
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


def _take(answers: Answers, answer: dict[str, Any], key: SetKey) -> None:
    text, judgement = answer.get("expression"), answer.get("judgement")
    if text is not None and not isinstance(text, str):
        raise fault(f"{':'.join(key)}: expression {text!r}", "a string", "fix the line")
    if judgement is not None and judgement not in JUDGEMENTS:
        raise fault(f"{':'.join(key)}: judgement {judgement!r}", f"one of {', '.join(JUDGEMENTS)}", "fix the line")
    answers.expressions.append(text or "")
    answers.round_trips.append(answer.get("round_trip"))
    answers.judgements.append(judgement)


def _ground(round_trip: RoundTrip, items: list[ReferenceSet], kinds: list[Answers]) -> None:
    """Fill in the round trips that the lines do not carry, image by image."""
    waiting: dict[str, list[tuple[Answers, int]]] = {}
    for answers in kinds:
        for k, item in enumerate(items):
            if answers.expressions[k].strip() and not answers.round_trips[k]:
                waiting.setdefault(item.image_id, []).append((answers, k))
    for image_id, places in waiting.items():
        found = round_trip.ground(image_id, [answers.expressions[k] for answers, k in places])
        for (answers, k), trip in zip(places, found, strict=True):
            answers.round_trips[k] = trip


def _subsets(items: list[ReferenceSet]) -> dict[str, list[int]]:
    chosen = {
        SINGLE: [k for k, item in enumerate(items) if len(item.targets) == 1],
        MULTI: [k for k, item in enumerate(items) if len(item.targets) > 1],
        ALL: list(range(len(items))),
    }
    return {name: members for name, members in chosen.items() if members}


def _texts(items: list[ReferenceSet], kinds: list[Answers], rules: GregRules) -> list[dict[str, dict[str, Any]]]:
    """Score the texts of all kinds of answers in one run of the Java parts."""
    expressions = [text for kind in kinds for text in kind.expressions]
    references = [item.references for item in items] * len(kinds)
    subsets = {
        f"{number}:{name}": [number * len(items) + k for k in members]
        for number in range(len(kinds))
        for name, members in _subsets(items).items()
    }
    scores = score_texts(expressions, references, subsets, rules.tokenizer, rules.spice)
    return [
        {name.partition(":")[2]: result for name, result in scores.items() if name.startswith(f"{number}:")} for number in range(len(kinds))
    ]


def _assemble(
    truth: TruthFolder, items: list[ReferenceSet], answers: Answers, texts: dict[str, dict[str, Any]], boxes: GrecRules | None
) -> dict[str, Any]:
    block: dict[str, Any] = {}
    for name, members in _subsets(items).items():
        written = [answers.expressions[k] for k in members]
        lengths = [len(text.split()) for text in written]
        block[name] = texts[name] | {
            "distinct": len(set(written)) / len(written),
            "mean_words": sum(lengths) / len(lengths),
            "empty": sum(not text.strip() for text in written) / len(written),
        }
        judged = [answers.judgements[k] for k in members]
        if any(j is not None for j in answers.judgements):
            block[name]["correct"] = judged.count("exact") / len(judged)
            block[name]["judgements"] = {j: judged.count(j) for j in JUDGEMENTS} | {"unjudged": judged.count(None)}
        if any(answers.round_trips):
            trips = [answers.round_trips[k] for k in members]
            rules = boxes or GrecRules(select="all")  # a protocol without rules for boxes takes the answer's own
            block[name] |= _round_trip(truth, [items[k] for k in members], trips, rules)
    return block


def _round_trip(truth: TruthFolder, items: list[ReferenceSet], trips: list[dict[str, Any] | None], rules: GrecRules) -> dict[str, Any]:
    """Score how well grounding the generated text gives back the selected set (strict protocol). No answer counts as wrong."""
    masks = GRES("strict")
    boxes = GREC("strict", rules.box_threshold, rules.iou_threshold, rules.f1_threshold, rules.select)
    num_masks = num_boxes = 0
    for item, trip in zip(items, trips, strict=True):
        trip = trip or {}
        gt = truth.mask(item.image_id, item.targets)
        if gt is not None:
            image = truth.image(item.image_id)
            answered = trip.get("mask_rle") is not None
            pred = check_rle(trip["mask_rle"], image.height, image.width) if answered else empty_rle(image.height, image.width)
            i, p, g = overlap_counts(pred, gt)
            masks.update_counts([i], [p], [g], [bool(trip.get("no_target", not answered))], [False])
            num_masks += "mask_rle" in trip
        wanted = [instance.box_xyxy for instance in truth.instances(item.image_id, item.targets)]
        found = prediction_boxes(trip) if "boxes_xyxy" in trip else ([], [])
        boxes.update(*found, wanted, False, trip.get("count", len(found[0])))
        num_boxes += "boxes_xyxy" in trip
    result: dict[str, Any] = {}
    if num_masks:
        result["round_trip_gIoU"] = masks.compute()["gIoU"]
    if num_boxes:
        result["round_trip_Pr@F1"] = boxes.compute()["Pr@F1"]
    return result | {"round_trip_share": sum(bool(t) for t in trips) / len(trips)}
