"""Entry "grec" of METRICS: boxes of generalized referring comprehension (GREC, arXiv 2308.16182).

 `official` equals the evaluator released with gRefCOCO: score threshold, *generalized* box IoU in float32, greedy
matching. `strict` is what the papers' text says: plain IoU, optimal one-to-one matching. F1 of a sample is 2 TP / (kept + wanted).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

import numpy as np

from grex_mllm.errors import fault
from grex_mllm.metrics.columns import Column, accepted, mean_of, rejected
from grex_mllm.metrics.segmentation import PROTOCOLS
from grex_mllm.metrics.sums import NUM_LIMBS, IntegerSums, half, limb_sums, mean, ratio
from grex_mllm.metrics.truth import Truth
from grex_mllm.types import MORE_THAN_FIVE

Selection = Literal["threshold", "count", "all"]
SELECTIONS = get_args(Selection)
FIELDS = ("num_samples", "correct", "TP", "FN", "TN", "FP")  # then limbs of F1
TITLE = "Boxes (GREC)"
COLUMNS = (
    Column("Pr@F1", "Pr@F1", mean_of("correct")),
    Column("mean_F1", "mean F1", mean_of("f1"), shown=("table", "compare")),
    Column("N_acc", "N-acc", rejected("box_no_target"), shown=("table", "compare")),
    Column("T_acc", "T-acc", accepted("box_no_target"), shown=("table", "compare")),
    Column("balanced_acc", "bal-acc", shown=("table",)),
)


@dataclass(frozen=True)
class Rules:
    """select: boxes that `strict` counts: "threshold" | "count" (N_O best) | "all"; official_select: the same for `official`."""

    select: Selection = "threshold"
    official_select: Selection = "threshold"
    box_threshold: float = 0.7
    iou_threshold: float = 0.5
    f1_threshold: float = 1.0


def needs(rules: Rules) -> dict[str, tuple[str, ...]]:
    """Return what it reads: the predicted count too, where it selects boxes."""
    fields = ("boxes_xyxy", "count") if "count" in (rules.select, rules.official_select) else ("boxes_xyxy",)
    return {"strict": fields, "official": fields}


def rows(samples: Sequence[tuple[dict[str, Any] | None, Truth]], rules: Rules, protocol: str) -> list[dict[str, Any]]:
    """Return tp, kept, f1, correct and box_no_target (said) of each answer; one array operation computes all overlaps."""
    given = [
        ([], [], [], not truth.targets, 0) if line is None else (*prediction_boxes(line), truth.boxes, not truth.targets, line.get("count"))
        for line, truth in samples
    ]
    found = []
    for (tp, kept, _), (line, truth) in zip(sums(rules, protocol).match(given), samples, strict=True):
        f1, says_none = judge(tp, kept, truth.num_targets, not truth.targets, line is None)
        found.append({"tp": tp, "kept": kept, "f1": f1, "correct": f1 >= rules.f1_threshold, "box_no_target": says_none})
    return found


def row(prediction: dict[str, Any] | None, truth: Truth, rules: Rules, protocol: str) -> dict[str, Any]:
    """Return the row of one answer, see `rows`."""
    return rows([(prediction, truth)], rules, protocol)[0]


def sums(rules: Rules, protocol: str) -> GREC:
    """Return empty sums."""
    select = rules.select if protocol == "strict" else rules.official_select
    return GREC(protocol, rules.box_threshold, rules.iou_threshold, rules.f1_threshold, select)


def baselines(columns: dict[str, np.ndarray], rules: Rules) -> dict[str, dict[str, np.ndarray]]:
    """Return the columns of an answer without boxes, and of the right ones."""
    num = columns["num_targets"]
    found = {}
    for name, kept in (("always_empty", num * 0), ("oracle", num)):
        f1, says_none = judge(kept, kept, num, num == 0, num < 0)
        found[name] = columns | {"f1": f1, "correct": f1 >= rules.f1_threshold, "box_no_target": says_none}
    return found


def judge(tp: Any, kept: Any, num: Any, e: Any, wrong: Any) -> tuple[Any, Any]:
    """Return F1 = 2 TP / (kept + wanted), and whether the answer is "no target": the one place where boxes get their score.

    tp: matched boxes. kept, num: predicted and wanted ones. e: there is no target: right where nothing is kept. wrong: no usable answer,
    which is wrong everywhere. Plain numbers or arrays [E] alike (hence `^ True`: not).
    """
    answers, both = wrong ^ True, kept + num
    f1 = (2 * tp + (e & (kept == 0))) / (both + (both == 0)) * answers
    return f1, (wrong & (e ^ True)) | (answers & (kept == 0))


def prediction_boxes(line: dict[str, Any]) -> tuple[list[list[float]], list[float]]:
    """Return boxes and scores of a line (absent scores = 1).

    Raises:
        GrexError: not [n, 4] numbers, or another number of scores.
    """
    boxes, scores = line.get("boxes_xyxy"), line.get("box_scores")
    name = line.get("expression_id") or line.get("image_id")
    if not isinstance(boxes, list) or not all(isinstance(b, list) and len(b) == 4 and all(_number(v) for v in b) for b in boxes):
        raise fault(f"{name}: boxes_xyxy {str(boxes)[:60]}", "a list of [x1, y1, x2, y2]", "fix the line")
    if scores is None:
        scores = [1.0] * len(boxes)
    if not isinstance(scores, list) or len(scores) != len(boxes) or not all(_number(s) for s in scores):
        raise fault(f"{name}: box_scores {str(scores)[:60]}", f"{len(boxes)} numbers, one for each box", "fix the line")
    return boxes, scores


class GREC(IntegerSums):
    """Accumulate Pr@F1 (share of samples with F1 >= f1_threshold), mean F1, N_acc and T_acc over expressions.

    protocol: "strict" | "official". iou_threshold: least overlap of a match.
    select: which predicted boxes count: "threshold" (score >= score_threshold), "count" (the N_O best, papers' count variant), "all".
    """

    def __init__(
        self,
        protocol: str = "strict",
        score_threshold: float = 0.7,
        iou_threshold: float = 0.5,
        f1_threshold: float = 1.0,
        select: str = "threshold",
    ) -> None:
        if protocol not in PROTOCOLS or select not in SELECTIONS:
            raise fault(f'protocol "{protocol}", select "{select}"', f"{PROTOCOLS} and {SELECTIONS}", "choose one of them")
        if not iou_threshold > 0:
            raise fault(f"iou_threshold {iou_threshold}", "a number above 0", "use the papers' 0.5")
        self.protocol, self.select = protocol, select
        self.score_threshold, self.iou_threshold, self.f1_threshold = score_threshold, iou_threshold, f1_threshold
        super().__init__(len(FIELDS) + NUM_LIMBS, (protocol, score_threshold, iou_threshold, f1_threshold, select))

    def update(
        self, pred_boxes_xyxy: Any, pred_scores: Any, gt_boxes_xyxy: Any, no_target: bool | None = None, count: int | None = None
    ) -> tuple[int, int, int]:
        """Add one expression: boxes [n, 4], scores [n], ground-truth boxes [m, 4] in absolute pixels; return (TP, kept, wanted).

        no_target: default: no ground-truth box. count: N_O, needed by select="count".
        """
        return self.update_many([(pred_boxes_xyxy, pred_scores, gt_boxes_xyxy, no_target, count)])[0]

    def update_many(self, samples: Sequence[tuple[Any, Any, Any, bool | None, int | None]]) -> list[tuple[int, int, int]]:
        """Add many expressions at once (see `update` for the order of each tuple); one array operation computes all overlaps."""
        matched = self.match(samples)
        e = np.array([bool(s[3]) if s[3] is not None else len(s[2]) == 0 for s in samples], bool)
        tp, kept, wanted = np.array(matched, np.int64).reshape(-1, 3).T
        self._add(e, *judge(tp, kept, wanted, e, e & False))
        return matched

    def match(self, samples: Sequence[tuple[Any, Any, Any, bool | None, int | None]]) -> list[tuple[int, int, int]]:
        """Return (TP, kept, wanted) of every sample without adding it.

        Raises:
            GrexError: NaN in scores or boxes, inverted boxes, or unequal numbers of boxes and scores.
        """
        kept = [self._keep(plain(s[0]), plain(s[1]), s[4]) for s in samples]
        if boxes := [box for k in kept for box in k]:
            checked(np.array(boxes, np.float64))  # those of no-target samples, too, which meet no other box below
        wanted = [[] if s[3] else plain(s[2]) for s in samples]
        overlaps = self._overlaps(kept, wanted)
        find = greedy_matches if self.protocol == "official" else most_matches
        return [
            (find(o, self.iou_threshold) if o is not None else 0, len(k), len(w)) for o, k, w in zip(overlaps, kept, wanted, strict=True)
        ]

    def update_rows(self, columns: dict[str, np.ndarray]) -> None:
        """Add rows of the scorer."""
        self._add(columns["num_targets"] == 0, columns["f1"], columns["box_no_target"])

    def _add(self, e: np.ndarray, f1: np.ndarray, says_none: np.ndarray) -> None:
        flags = (e & says_none, e & ~says_none, ~e & ~says_none, ~e & says_none)
        parts = [len(f1), (f1 >= self.f1_threshold).sum(), *(f.sum() for f in flags), *limb_sums(f1)]
        self._sums = self._sums + np.array([int(p) for p in parts], np.int64)

    def compute(self) -> dict[str, Any]:
        """Return num_samples, no_target_share, Pr@F1, mean_F1, N_acc, T_acc, balanced_acc; None where there is nothing to be a share of."""
        s = {key: int(v) for key, v in zip(FIELDS, self._sums[: len(FIELDS)], strict=True)}
        n_acc, t_acc = ratio(s["TP"], s["TP"] + s["FN"]), ratio(s["TN"], s["TN"] + s["FP"])
        return {
            "num_samples": s["num_samples"],
            "no_target_share": ratio(s["TP"] + s["FN"], s["num_samples"]),
            "Pr@F1": ratio(s["correct"], s["num_samples"]),
            "mean_F1": mean(self._sums[len(FIELDS) :], s["num_samples"]),
            "N_acc": n_acc,
            "T_acc": t_acc,
            "balanced_acc": half(n_acc, t_acc),
        }

    def _keep(self, boxes: list[list[float]], scores: list[float], count: int | None) -> list[list[float]]:
        check_scores(boxes, scores)
        if self.select == "threshold":
            chosen = [(s, b) for s, b in zip(scores, boxes, strict=True) if s >= self.score_threshold]
            return [b for _, b in (sorted(chosen, reverse=True) if len(chosen) > 1 else chosen)]
        ranked = [b for _, b in sorted(zip(scores, boxes, strict=True), reverse=True)]
        if self.select == "all":
            return ranked
        if count is None:
            raise fault('select "count" without a count', "a predicted count for each expression", 'use select "threshold"')
        if count >= MORE_THAN_FIVE:  # ">5": at least six, and whatever else stands above the threshold
            count = max(count, sum(s >= self.score_threshold for s in scores))
        return ranked[:count]

    def _overlaps(self, kept: list[list[Any]], wanted: list[list[Any]]) -> list[list[list[float]] | None]:
        """Return one [n, m] list of overlaps for each sample with boxes on both sides: all pairs of all samples in one array."""
        pairs = [pair for both in zip(kept, wanted, strict=True) for pair in product(*both)]
        if not pairs:
            return [None] * len(kept)
        first, second = (checked(np.array(boxes, np.float64)) for boxes in zip(*pairs, strict=True))
        flat = (pair_giou_float32 if self.protocol == "official" else pair_iou)(first, second)
        parts = np.split(flat, np.cumsum([len(k) * len(w) for k, w in zip(kept, wanted, strict=True)])[:-1])
        return [part.reshape(len(k), -1).tolist() if len(part) else None for k, part in zip(kept, parts, strict=True)]


def pair_iou(first_xyxy: np.ndarray, second_xyxy: np.ndarray) -> np.ndarray:
    """Return the plain IoU [P] of paired boxes [P, 4]; 0 where the union is empty."""
    inter, union, _ = _pair_parts(first_xyxy, second_xyxy)
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def pair_giou_float32(first_xyxy: np.ndarray, second_xyxy: np.ndarray) -> np.ndarray:
    """Return the generalized IoU [P] in float32, operation by operation as the released evaluator does; two zero-area boxes give NaN."""
    inter, union, enclosing = _pair_parts(first_xyxy.astype(np.float32), second_xyxy.astype(np.float32))
    with np.errstate(divide="ignore", invalid="ignore"):
        return inter / union - (enclosing - union) / enclosing


def greedy_matches(overlap: list[list[float]], threshold: float) -> int:
    """Return how many pairs greedy matching takes: the largest entry left, first in reading order among equals, until below the threshold.

    overlap: [n][m]. NaN counts as largest, as in the released code (torch.topk).
    """
    entries = [
        (-value if value == value else -np.inf, r, c)
        for r, row in enumerate(overlap)
        for c, value in enumerate(row)
        if not value < threshold
    ]
    if len(entries) < 2:
        return len(entries)
    rows, columns = set(), set()
    for _, r, c in sorted(entries):
        if r not in rows and c not in columns:
            rows.add(r)
            columns.add(c)
    return len(rows)


def most_matches(overlap: list[list[float]], threshold: float) -> int:
    """Return the largest number of one-to-one pairs with overlap >= threshold (what Hungarian matching finds), by augmenting paths."""
    edges = [[c for c, value in enumerate(row) if value >= threshold] for row in overlap]
    owner: dict[int, int] = {}

    def place(row: int, seen: set[int]) -> bool:
        for c in edges[row]:
            if c not in seen:
                seen.add(c)
                if c not in owner or place(owner[c], seen):
                    owner[c] = row
                    return True
        return False

    return sum(place(row, set()) for row in range(len(edges)))


def _pair_parts(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    a, b = a.T, b.T
    zero = a.dtype.type(0)
    width = np.maximum(np.minimum(a[2], b[2]) - np.maximum(a[0], b[0]), zero)
    height = np.maximum(np.minimum(a[3], b[3]) - np.maximum(a[1], b[1]), zero)
    inter = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    outer_width = np.maximum(np.maximum(a[2], b[2]) - np.minimum(a[0], b[0]), zero)
    outer_height = np.maximum(np.maximum(a[3], b[3]) - np.minimum(a[1], b[1]), zero)
    return inter, union, outer_width * outer_height


def _number(value: Any) -> bool:
    return type(value) is int or type(value) is float


def check_scores(boxes: list[Any], scores: list[float]) -> None:
    """Raise GrexError where scores are not one finite number for each box."""
    if len(boxes) != len(scores):
        raise fault(f"{len(boxes)} boxes with {len(scores)} scores", "one score for each box", "write them together")
    if any(score != score for score in scores):
        raise fault("a box score that is NaN", "finite scores", "look for the first NaN in the model's outputs")


def checked(boxes: np.ndarray) -> np.ndarray:
    """Return boxes [n, 4]; raise GrexError where they are none."""
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all() or (boxes[:, 2:] < boxes[:, :2]).any():
        wrong = boxes[~np.isfinite(boxes).all(1) | (boxes[:, 2:] < boxes[:, :2]).any(1)][:1].tolist() if boxes.ndim == 2 else boxes.shape
        raise fault(f"box {wrong}", "[x1, y1, x2, y2] with finite x1 <= x2, y1 <= y2", "convert xywh or cxcywh boxes to xyxy")
    return boxes


def plain(values: Any) -> list[Any]:
    """Return a list of a list, tuple, array or tensor."""
    return values if isinstance(values, list) else list(values) if isinstance(values, tuple) else values.tolist()
