"""What every entry of METRICS promises to the scorer, the tables, the comparison and the report."""

from __future__ import annotations

import json
import random
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
from score_case import HEIGHT, WIDTH, answer, generation, object_box, object_mask

from grex_mllm.errors import GrexError
from grex_mllm.metrics import METRICS, entry, needs_of
from grex_mllm.metrics.columns import Column, find, parts
from grex_mllm.metrics.language import OTHER_WAYS
from grex_mllm.metrics.sums import empty_sums, stacked
from grex_mllm.metrics.truth import Truth
from grex_mllm.ops.masks import encode_rle
from grex_mllm.types import ImageRecord, Instance

NAMES = [*METRICS, "examples.metric_example"]
BOX_ONLY = ImageRecord("0", "0.png", HEIGHT, WIDTH, [Instance(f"0.{n}", "square", object_box(n)) for n in range(3)])
IMAGE = ImageRecord(
    "0", "0.png", HEIGHT, WIDTH, [Instance(f"0.{n}", "square", object_box(n), encode_rle(object_mask(n))) for n in range(3)]
)
LITTLE_JAVA = {"greg": {"tokenizer": "whitespace"}}


def rules_of(name: str) -> Any:
    return entry(name).Rules(**LITTLE_JAVA.get(name, {}))


def samples_of(name: str, image: ImageRecord = IMAGE) -> list[tuple[dict[str, Any] | None, Truth]]:
    """Right, wrong, empty and missing answers to expressions with 0, 1, 2 and 3 targets (for texts: 1, 2 and 3)."""
    made: list[tuple[dict[str, Any] | None, Truth]] = []
    for k in range(1 if hasattr(entry(name), "UNIT") else 0, 4):
        truth = Truth(f"e{k}", [f"0.{n}" for n in range(k)], lambda: image, [f"the {k} squares", "all of them"], f"ref{k}")
        if hasattr(entry(name), "UNIT"):
            trip = {key: answer(0, k, [0])[key] for key in ("mask_rle", "boxes_xyxy", "box_scores", "no_target")}
            lines = [generation(0, k, text) | {"round_trip": trip, "judgement": "exact"} for text in (f"the {k} squares", "a dog", "")]
        else:
            lines = [answer(0, k, chosen) for chosen in (list(range(k)), [2], [], [0, 1])]
        made += [(line, truth) for line in [*lines, None]]
    return made


def scored(name: str, protocol: str, samples: list[tuple[dict[str, Any] | None, Truth]]) -> Any:
    metric, rules = entry(name), rules_of(name)
    rows = [(metric.row(line, truth, rules, protocol), truth) for line, truth in samples]
    present = [(row, truth) for row, truth in rows if row is not None]
    sums = empty_sums(metric, rules, protocol)
    if present:
        num = np.array([truth.num_targets for _, truth in present], np.int64)
        sums.update_rows(stacked(metric, [row for row, _ in present]) | {"num_targets": num})
    return sums


def test_every_entry_has_the_plain_names() -> None:
    for name in NAMES:
        metric = entry(name)
        assert metric.TITLE and metric.__doc__, name
        assert is_dataclass(metric.Rules) and metric.Rules() == metric.Rules(), name
        assert all(f.default is not None for f in fields(metric.Rules)), name
        assert hasattr(metric, "sums") or hasattr(metric, "finish"), name
        assert hasattr(metric, "finish") or not hasattr(metric, "UNIT"), name
        needs = needs_of(metric, metric.Rules())
        assert "strict" in needs and set(needs) <= {"strict", "official"} and all(needs.values()), name
        assert metric.COLUMNS and all(isinstance(column, Column) for column in metric.COLUMNS), name
        assert all(column.format in ("percent", "points", "number") for column in metric.COLUMNS), name


@pytest.mark.parametrize("name", NAMES)
def test_order_and_sharding_do_not_matter(name: str) -> None:
    samples = samples_of(name)
    for protocol in needs_of(entry(name), rules_of(name)):
        whole = json.dumps(scored(name, protocol, samples).compute())
        if not hasattr(entry(name), "finish"):  # the scorer hands `finish` the rows in the dataset's order
            mixed = random.Random(0).sample(samples, len(samples))
            assert json.dumps(scored(name, protocol, mixed).compute()) == whole
        merged = empty_sums(entry(name), rules_of(name), protocol)
        for shard in (samples[:5], [], samples[5:]):
            state = json.loads(json.dumps(scored(name, protocol, shard).state()))
            merged.merge(empty_sums(entry(name), rules_of(name), protocol).load_state(state))
        assert json.dumps(merged.compute()) == whole


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_plain_and_alike(name: str) -> None:
    metric, rules, samples = entry(name), rules_of(name), samples_of(name)
    for protocol in needs_of(metric, rules):
        rows = [metric.row(line, truth, rules, protocol) for line, truth in samples]
        present = [row for row in rows if row is not None]
        assert present and json.loads(json.dumps(present, allow_nan=False)) == present
        assert len({tuple(row) for row in present}) == 1, "the same keys in every row"
        if hasattr(metric, "rows"):
            assert metric.rows(samples, rules, protocol) == rows


@pytest.mark.parametrize("name", NAMES)
def test_columns_stand_in_the_results_and_shares_give_them(name: str) -> None:
    metric, rules, samples = entry(name), rules_of(name), samples_of(name)
    for protocol in needs_of(metric, rules):
        block = scored(name, protocol, samples).compute()
        inner = [part for _, part in parts(block)] or [block]
        optional = {"SPICE"} | {column.key for column in metric.COLUMNS if column.key.startswith(OTHER_WAYS)}
        for column in metric.COLUMNS:
            assert column.key in optional or find(block, column.key) is not None or any(column.key in part for part in inner), column.key
            if column.share is None:
                continue
            rows = [(metric.row(line, truth, rules, protocol), truth) for line, truth in samples]
            shares = [column.share(row, truth.num_targets) for row, truth in rows if row is not None]
            assert sum(above for above, _ in shares) / sum(below for _, below in shares) == pytest.approx(find(block, column.key))


@pytest.mark.parametrize("name", [name for name in NAMES if not hasattr(entry(name), "UNIT")])
def test_right_answers_beat_missing_ones_and_empty_splits_give_nothing(name: str) -> None:
    rules = rules_of(name)
    right = [(answer(0, k), truth) for k, (_, truth) in enumerate(samples_of(name)[::5])]
    nothing = [(None, truth) for _, truth in right]
    column = entry(name).COLUMNS[0]
    for protocol in needs_of(entry(name), rules):
        best, none = (find(scored(name, protocol, chosen).compute(), column.key) for chosen in (right, nothing))
        assert json.loads(json.dumps(scored(name, protocol, []).compute(), allow_nan=False)).get(column.key) is None
        assert best is not None
        if none is not None:
            assert (best > none) == column.higher_is_better


@pytest.mark.parametrize("name", NAMES)
def test_only_metrics_that_say_so_need_masks(name: str) -> None:
    metric, rules = entry(name), rules_of(name)
    for protocol, needs in needs_of(metric, rules).items():
        rows = [metric.row(line, truth, rules, protocol) for line, truth in samples_of(name, BOX_ONLY) if truth.targets]
        assert all(row is None for row in rows) == ("gt_mask" in needs)


def test_baselines_are_what_rows_of_such_answers_give() -> None:
    for name in NAMES:
        metric, rules = entry(name), rules_of(name)
        if not hasattr(metric, "baselines"):
            continue
        truths = [truth for _, truth in samples_of(name)[::5]]
        empty = [(answer(0, 0) | {"expression_id": truth.name}, truth) for truth in truths]
        right = [(answer(0, k), truth) for k, truth in enumerate(truths)]
        rows = [(metric.row(line, truth, rules, "strict"), truth) for line, truth in right]
        present = [(row, truth) for row, truth in rows if row is not None]
        columns = stacked(metric, [row for row, _ in present])
        num = np.array([truth.num_targets for _, truth in present], np.int64)
        found = metric.baselines(columns | {"num_targets": num}, rules)
        for dummy, answers in (("always_empty", empty), ("oracle", right)):
            sums = empty_sums(metric, rules, "strict")
            sums.update_rows(found[dummy])
            assert sums.compute() == scored(name, "strict", answers).compute(), (name, dummy)


def test_unknown_names_are_refused_with_a_suggestion() -> None:
    with pytest.raises(GrexError, match='did you mean "count"'):
        entry("coutn")
    with pytest.raises(GrexError, match="PYTHONPATH"):
        entry("no.such.module")
