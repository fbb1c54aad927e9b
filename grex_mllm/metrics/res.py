"""Entry "res" of METRICS: masks of classic referring segmentation, over expressions that have a target: mIoU, cIoU (also oIoU), Pr@X."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from grex_mllm.errors import GrexError
from grex_mllm.metrics import segmentation
from grex_mllm.metrics.columns import Column
from grex_mllm.metrics.segmentation import GRES, THRESHOLDS, judge, mask_counts
from grex_mllm.metrics.truth import Truth

TITLE = "Masks (RES)"
NEEDS = {"strict": ("mask_rle", "gt_mask")}
LEFT_OUT = "have no target"
COLUMNS = (
    Column("mIoU", "mIoU", lambda row, _: (row["res_iou"], 1.0)),
    Column("cIoU", "cIoU", lambda row, _: (row["res_intersection"], row["res_union"])),
    *(Column(f"Pr@{x}", f"Pr@{x}", shown=("compare",)) for x in (0.5, 0.7, 0.9)),
)


@dataclass(frozen=True)
class Rules:
    """thresholds: X of Pr@X; expressions without a target are no part of RES and are left out, with their number reported."""

    thresholds: tuple[float, ...] = THRESHOLDS


def row(prediction: dict[str, Any] | None, truth: Truth, rules: Rules, protocol: str) -> dict[str, Any] | None:
    """Return IoU, intersection and union of one answer, which cannot be "no target"; None without a target."""
    counts = mask_counts(prediction, truth) if truth.targets else None
    if counts is None:
        return None
    iou, i, u, _ = judge(*counts, False, False, prediction is None, False, 0)
    return {"res_iou": iou, "res_intersection": i, "res_union": u, "gt_area": counts[2]}


def sums(rules: Rules, protocol: str) -> RES:
    """Return empty sums."""
    return RES(rules.thresholds)


def baselines(columns: dict[str, np.ndarray], rules: Rules) -> dict[str, dict[str, np.ndarray]]:
    """Return the columns of an empty mask and of the right one."""
    found = segmentation.baselines(columns, segmentation.Rules())
    return {
        name: {f"res_{key}": values for key, values in answer.items()} | {"num_targets": columns["num_targets"]}
        for name, answer in found.items()
    }


class RES(GRES):
    """Accumulate classic referring segmentation over expressions that all have a target: mIoU, cIoU (also called oIoU), Pr@X."""

    def __init__(self, thresholds: Sequence[float] = THRESHOLDS) -> None:
        super().__init__("strict", thresholds, 0)

    def update_rows(self, columns: dict[str, np.ndarray]) -> None:
        """Add rows of the scorer."""
        renamed = {key.removeprefix("res_"): values for key, values in columns.items()}
        super().update_rows(renamed | {"no_target": renamed["num_targets"] == 0})

    def compute(self) -> dict[str, Any]:
        """Return num_samples, mIoU, cIoU and Pr@X as fractions.

        Raises:
            GrexError: an expression without a target was added.
        """
        s = self._named()
        if s["TP"] + s["FN"]:
            raise GrexError(f"{s['TP'] + s['FN']} expressions have no target; RES expects a target for each; use GRES for this data")
        whole = super().compute()
        return {"num_samples": s["num_samples"], "mIoU": whole["gIoU"], "cIoU": whole["cIoU"]} | {
            key: value for key, value in whole.items() if key.startswith("Pr@")
        }
