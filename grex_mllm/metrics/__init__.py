"""The metric room: objects with `update(...)`, `merge(other)`, `compute()` and `state()`, whose sums add up exactly.

    from grex_mllm.metrics import GRES, GREC, GREG, RES, REC, Count, RVOS

Across processes: exchange `state()` (plain integers), then `whole.merge(GRES(...).load_state(state))`: the result is that of one process.
GPU tensors add up on their device, without waiting for it before `compute()`. Nothing heavy is imported
before a metric is used; only `GREG` needs Java.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grex_mllm.metrics.calibration import Calibration
    from grex_mllm.metrics.counting import Count
    from grex_mllm.metrics.detection import GREC, REC
    from grex_mllm.metrics.language import GREG
    from grex_mllm.metrics.segmentation import GRES, RES
    from grex_mllm.metrics.video import RVOS

METRICS = {
    "gres": "grex_mllm.metrics.segmentation:GRES",
    "res": "grex_mllm.metrics.segmentation:RES",
    "grec": "grex_mllm.metrics.detection:GREC",
    "rec": "grex_mllm.metrics.detection:REC",
    "count": "grex_mllm.metrics.counting:Count",
    "greg": "grex_mllm.metrics.language:GREG",
    "rvos": "grex_mllm.metrics.video:RVOS",
    "calibration": "grex_mllm.metrics.calibration:Calibration",
}
_HOMES = {home.split(":")[1]: home.split(":")[0] for home in METRICS.values()}
__all__ = ["GREC", "GREG", "GRES", "METRICS", "REC", "RES", "RVOS", "Calibration", "Count"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'grex_mllm.metrics' has no attribute {name!r}")
