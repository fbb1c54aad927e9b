"""The metric room. For Python: objects with `update(...)`, `merge(other)`, `compute()` and `state()`, whose sums add up exactly.

    from grex_mllm.metrics import GRES, GREC, GREG, RES, REC, Count, RVOS

Across processes: exchange `state()` (plain integers), then `whole.merge(GRES(...).load_state(state))`: the result is that of one process.
GPU tensors add up on their device, without waiting for it before `compute()`. Nothing heavy is imported before a metric is used; only
`GREG` needs Java.

For scoring, an entry is a module with plain names, found by its name in METRICS or by its dotted path in a protocol file
(`tasks: {my.module: {...}}`). The scorer, the printed table, `grex compare` and the report go over the entries; none knows a name.

- `TITLE`: its heading in the report.
- `Rules`: a frozen dataclass of its keys in the protocol file, each with a default. `Literal[...]` lists the choices of a value.
- `NEEDS`, or `needs(rules)` where the rules decide: {"strict": fields, "official": fields}, its ways of scoring ("strict" alone will do)
  and what each reads of a line. The first field decides whether predictions answer it; every other must stand in each answered line.
  "head" is no_target or no_target_prob; "gt_mask" leaves it out where the data have boxes only.
- `row(prediction, truth, rules, protocol)` -> the numbers of one prediction, a flat dict of plain values with the same keys every time;
  None where the expression is no part of the metric. prediction: its line, None where it is missing, refused or unreadable (count it as
  wrong). truth: `metrics.truth.Truth`. Rows of all entries share a dict in `results.samples.jsonl`: give keys names of their own.
- `sums(rules, protocol)` -> an object with `update_rows(columns)`, `merge`, `state`, `load_state` and `compute`, which returns its block of
  results.json. columns: each key of the rows as an array [n], and `num_targets`. `sums.Means` suits many, `sums.IntegerSums` most others.
  Or `finish(rows, rules)` -> the block, from all rows at once, where sums cannot express it (CIDEr); the rows then stay in memory.
- `COLUMNS`: `columns.Column`s, which name, print and resample the numbers of the block; the first stands for the metric.

Where it has them: `rows(samples, rules, protocol)`, the rows of many (prediction, truth), where arrays are faster; `LEFT_OUT`, words for
the expressions without a row; `baselines(columns, rules)`, the columns that the dummies `always_empty` and `oracle` would give;
`UNIT = "object_set"`: it scores generated texts, and gets one line for each set of objects; `Rules.group_by` pools their references;
`part(rows, every, rules)` -> the block of a group of the rows `every`, where not all numbers of the whole make sense for one.
"""

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
__all__ = ["GREC", "GREG", "GRES", "METRICS", "REC", "RES", "RVOS", "Calibration", "Count", "entry", "in_order", "needs_of"]


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


def needs_of(metric: Any, rules: Any) -> dict[str, tuple[str, ...]]:
    """Return the ways of scoring of an entry, and the fields that each reads."""
    found: dict[str, tuple[str, ...]] = metric.needs(rules) if hasattr(metric, "needs") else metric.NEEDS
    return found


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
