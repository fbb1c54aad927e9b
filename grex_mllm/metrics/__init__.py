"""The metric room. For Python: objects with `update(...)`, `merge(other)`, `compute()` and `state()`, whose sums add up exactly.

    from grex_mllm.metrics import GRES, GREC, GREG, RES, REC, Count, RVOS

Across processes: exchange `state()` (plain integers), then `whole.merge(GRES(...).load_state(state))`: the result is that of one process.
GPU tensors add up on their device, without waiting for it before `compute()`. Nothing heavy is imported
before a metric is used; only `GREG` needs Java.

For scoring: **an entry is a module with plain names**, found by its name in METRICS or by its dotted path in a protocol file
(`tasks: {my.module: {...}}`). The scorer, the printed table, `grex compare` and the report iterate over entries; none knows a name.

| name | what |
|---|---|
| `TITLE` | heading in the report |
| `Rules` | frozen dataclass of its keys in the protocol file, each with a default; `Literal[...]` lists the choices of a value |
| `needs(rules)` | {"strict": fields, "official": ...}: the ways of scoring that it has, and the fields that each reads. The first field decides whether predictions answer it, every other must stand in each answered line; "head" is no_target or no_target_prob; "gt_mask" leaves box-only data out |
| `row(prediction, truth, rules, protocol)` | the numbers of one prediction as a flat dict of plain values, or None where this expression is no part of the metric. prediction: its line, None where it is missing, refused or unreadable (to be counted wrong). truth: `metrics.truth.Truth`. The rows go into `results.samples.jsonl`, in one dict for all entries: give keys a name of their own |
| `sums(rules, protocol)` | an object with `update_rows(columns)` (of several rows: each key an array [n]; also `num_targets`), `merge`, `state`, `load_state` and `compute`, which gives its block of results.json. `metrics.sums` has two that suit most: `Means` and `IntegerSums` |
| or `finish(rows, rules)` | the block from all rows at once, in the dataset's order, where sums cannot express it; rows stay in memory |
| `COLUMNS` | `metrics.columns.Column`: name, key in the block, format, which end is better, how one row enters it (for intervals), where it is shown. The first is the headline |

Optional: `rows(samples, rules, protocol)`, many (prediction, truth) at once where arrays are faster; `baselines(columns, rules)`, the columns
that the dummies `always_empty` and `oracle` would give; `UNIT = "object_set"`: it scores generated texts, one line and one row for each set
of objects, and then needs `finish` (references are pooled by `Rules.group_by`).
"""  # fmt: skip

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from grex_mllm.errors import fault

if TYPE_CHECKING:
    from grex_mllm.metrics.calibration import Calibration
    from grex_mllm.metrics.counting import Count
    from grex_mllm.metrics.detection import GREC
    from grex_mllm.metrics.language import GREG
    from grex_mllm.metrics.rec import REC
    from grex_mllm.metrics.res import RES
    from grex_mllm.metrics.segmentation import GRES
    from grex_mllm.metrics.video import RVOS

METRICS = {  # name -> module, and the class that Python users import; in the order in which results are shown
    "gres": "grex_mllm.metrics.segmentation:GRES",
    "res": "grex_mllm.metrics.res:RES",
    "grec": "grex_mllm.metrics.detection:GREC",
    "rec": "grex_mllm.metrics.rec:REC",
    "count": "grex_mllm.metrics.counting:Count",
    "greg": "grex_mllm.metrics.language:GREG",
    "rvos": "grex_mllm.metrics.video:RVOS",
    "calibration": "grex_mllm.metrics.calibration:Calibration",
}
_HOMES = {home.split(":")[1]: home.split(":")[0] for home in METRICS.values() if ":" in home}
__all__ = ["GREC", "GREG", "GRES", "METRICS", "REC", "RES", "RVOS", "Calibration", "Count", "entry", "in_order"]


def entry(name: str, where: str = "") -> Any:
    """Return the module of a metric: a name of METRICS or the dotted path of a module. where: goes in front of the message.

    Raises:
        GrexError: neither (with a "did you mean").
    """
    if name in METRICS:
        return import_module(METRICS[name].partition(":")[0])
    if "." in name and _exists(name):
        return import_module(name)
    near = difflib.get_close_matches(name, METRICS, n=1)
    hint = "put its folder on PYTHONPATH" if "." in name else f'did you mean "{near[0]}"?' if near else "fix the name"
    raise fault(f'{where}metric "{name}"', f"one of {', '.join(METRICS)}, or the dotted path of a module that can be imported", hint)


def in_order(names: Iterable[str]) -> list[str]:
    """Return names of entries in the order of METRICS, dotted paths last."""
    order = list(METRICS)
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def _exists(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'grex_mllm.metrics' has no attribute {name!r}")
