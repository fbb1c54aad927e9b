"""Entry "gres" of METRICS: masks of generalized referring segmentation, from masks, logits or run-length codes.

GRES (CVPR 2023) section 5.1. Two protocols from the same counts: `official` equals the released ReLA evaluator (after its fix of
2023-08-26), `strict` follows the paper's text. They differ where a targeted expression is rejected and in who says "no target".
Everything reduces to three numbers a sample, pixels in both masks and of each, and two flags (`judge`); all state is one int64 vector.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from grex_mllm.errors import GrexError, fault
from grex_mllm.metrics.columns import Column, accepted, mean_of, rejected
from grex_mllm.metrics.sums import NUM_LIMBS, IntegerSums, half, limb_sums, mean, ratio
from grex_mllm.metrics.truth import Truth

MANY_WAITING = 1024
CACHED_NUMBERS = 160_000  # 640 KiB of float32
PROTOCOLS = ("strict", "official")
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
FIELDS = ("num_samples", "TP", "FN", "TN", "FP", "intersection", "union")  # then limbs of all IoUs, limbs of targeted IoUs, Pr counts


ARGMAX = 0.5  # the larger of two probabilities
TITLE = "Masks (GRES)"
COLUMNS = (
    Column("gIoU", "gIoU", mean_of("iou")),
    Column("cIoU", "cIoU", lambda row, _: (row["intersection"], row["union"])),
    Column("N_acc", "N-acc", rejected("no_target")),
    Column("T_acc", "T-acc", accepted("no_target")),
    Column("balanced_acc", "bal-acc", shown=("table",)),
    *(Column(f"Pr@{x}", f"Pr@{x}", shown=("compare",)) for x in THRESHOLDS[2:]),
)


@dataclass(frozen=True)
class Rules:
    """thresholds: X of Pr@X. min_mask_pixels: smaller masks count as "no target" (0 = off)."""

    thresholds: tuple[float, ...] = THRESHOLDS
    min_mask_pixels: int = 0


def needs(rules: Rules) -> dict[str, tuple[str, ...]]:
    """Return what each protocol reads: `official` the mask at the model's input size and, unless masks are sieved, the head's decision."""
    return {"strict": ("mask_rle", "gt_mask"), "official": ("mask_rle_input", *(() if rules.min_mask_pixels else ("head",)), "gt_mask")}


def row(prediction: dict[str, Any] | None, truth: Truth, rules: Rules, protocol: str) -> dict[str, Any] | None:
    """Return iou, intersection, union, no_target (said) and gt_area of one answer; None in box-only data."""
    counts = mask_counts(prediction, truth, protocol)
    if counts is None:
        return None
    iou, i, u, says_none = judge(
        *counts, says_no_target(prediction or {}), not truth.targets, prediction is None, protocol == "official", rules.min_mask_pixels
    )
    return {"iou": iou, "intersection": i, "union": u, "no_target": says_none, "gt_area": counts[2]}


def sums(rules: Rules, protocol: str) -> GRES:
    """Return empty sums."""
    return GRES(protocol, rules.thresholds, rules.min_mask_pixels)


def baselines(columns: dict[str, np.ndarray], rules: Rules) -> dict[str, dict[str, np.ndarray]]:
    """Return the columns of an answer that is always "no target", and of the right one (strict)."""
    area, none = columns["gt_area"], columns["num_targets"] == 0
    never = none & False
    answers = {"always_empty": (area * 0, area * 0, area, ~never), "oracle": (area, area, area, none)}
    names = ("iou", "intersection", "union", "no_target")
    return {name: columns | dict(zip(names, judge(*given, none, never, False, 0), strict=True)) for name, given in answers.items()}


def judge(inter: Any, pred_n: Any, gt_n: Any, head: Any, e: Any, wrong: Any, official: bool, smallest: int) -> tuple[Any, Any, Any, Any]:
    """Apply the table of the protocol (`eval/protocols/README.md`): the one place where an answer gets its IoU.

    inter, pred_n, gt_n: pixels in both masks, of each. head: says "no target". e: there is none. wrong: no usable answer: IoU 0 and the
    no-target decision counted as the wrong one. Plain numbers, arrays [E] or tensors [E] alike (hence `^ True`: not).
    Returns IoU, I, U, and whether the answer is "no target".
    """
    answers = wrong ^ True
    says_none = (wrong & (e ^ True)) | (answers & (head | (pred_n < (smallest if official else max(1, smallest)))))
    counted = answers & (pred_n >= smallest)
    inter, pred_n = inter * counted, pred_n * counted
    given, whole = (says_none | e) ^ True, pred_n + gt_n - inter
    i = inter * given
    u = pred_n * (e & (says_none ^ True)) + (whole if official else gt_n) * (says_none & (e ^ True)) + whole * given
    return _double(i) / _double(u + (u == 0)) + (e & says_none), i, u, says_none


def mask_counts(prediction: dict[str, Any] | None, truth: Truth, protocol: str = "strict") -> tuple[int, int, int] | None:
    """Return pixels in both masks, of the prediction, of the ground truth, where the protocol compares them; None in box-only data.

    Raises:
        GrexError: a malformed mask, or one of another size.
    """
    from grex_mllm.ops.rle import area, empty_rle, overlap_counts

    gt, name = truth.mask(), "mask_rle_input" if protocol == "official" else "mask_rle"
    if gt is None:
        return None
    given = (prediction or {}).get(name)
    if prediction is None or given is None:  # what it missed is known at the original size only
        return 0, 0, area(gt)
    code = checked_mask(prediction, truth, name)
    if protocol == "official":
        shape = (code["size"][0], code["size"][1])
        gt = truth.mask(shape) or empty_rle(*shape)
    return overlap_counts(code, gt)


def checked_mask(prediction: dict[str, Any], truth: Truth, name: str = "mask_rle") -> dict[str, Any]:
    """Return the run-length code of a line: at original size (nothing given: an empty mask), or at its own size under another name.

    Raises:
        GrexError: a malformed mask, or one of another size.
    """
    from grex_mllm.ops.rle import check_rle, empty_rle

    size = (truth.image.height, truth.image.width) if name == "mask_rle" else (None, None)
    if prediction.get(name) is None:
        return empty_rle(truth.image.height, truth.image.width)
    try:
        return check_rle(prediction[name], *size)
    except GrexError as error:
        raise GrexError(f"prediction {truth.name} (image {truth.image.image_id}): {error}") from None


def says_no_target(prediction: dict[str, Any]) -> bool:
    """Return what the no-target head says: its decision, or its probability's argmax (a tie, or neither: "has a target")."""
    value = prediction.get("no_target")
    if value is None:
        return prediction.get("no_target_prob") is not None and no_target_probability(prediction) > ARGMAX
    if not isinstance(value, bool):
        raise fault(f"{prediction.get('expression_id')}: no_target {value!r}", "true or false", "fix the line")
    return value


def no_target_probability(prediction: dict[str, Any]) -> float:
    """Return the probability of a line that has one."""
    value = prediction["no_target_prob"]
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise fault(f"{prediction.get('expression_id')}: no_target_prob {value!r}", "a number in [0, 1]", "fix the line")
    return float(value)


class GRES(IntegerSums):
    """Accumulate gIoU, cIoU, N_acc, T_acc and Pr@X over expressions.

    protocol: "strict" | "official". thresholds: X of Pr@X (share of targeted samples with IoU >= X).
    min_mask_pixels: a smaller predicted mask counts as "no target" (papers: 50, for methods without a no-target head); 0 = off.
    """

    def __init__(self, protocol: str = "strict", thresholds: Sequence[float] = THRESHOLDS, min_mask_pixels: int = 0) -> None:
        if protocol not in PROTOCOLS:
            raise fault(f'protocol "{protocol}"', " or ".join(PROTOCOLS), "choose one of them")
        self.protocol, self.thresholds, self.min_mask_pixels = protocol, tuple(thresholds), int(min_mask_pixels)
        settings = (type(self).__name__, protocol, self.thresholds, self.min_mask_pixels)
        super().__init__(len(FIELDS) + 2 * NUM_LIMBS + len(self.thresholds), settings)
        self._buffers: dict[int, np.ndarray] = {}
        self._waiting: list[tuple[np.ndarray, ...]] = []  # small NumPy updates, added together
        self._device_sums: Any = None  # tensors add up on their own device: no host synchronisation before compute()

    def update(self, pred_mask: Any, gt_mask: Any, pred_no_target: Any = None, gt_no_target: Any = None) -> None:
        """Add masks: bool (or 0/1) [E, H, W] or [H, W], NumPy or torch; flags bool [E].

        pred_no_target: the head's decision; needed by `official`, optional for `strict` (an empty mask says it too).
        gt_no_target: default: the ground-truth mask is empty.
        """
        pred, gt = _as_masks(pred_mask), _as_masks(gt_mask)
        if tuple(pred.shape) != tuple(gt.shape):
            raise fault(
                f"predicted masks {tuple(pred.shape)}", f"the shape of the ground truth, {tuple(gt.shape)}", "resize the prediction"
            )
        gt = _like(gt, pred)
        if isinstance(pred, np.ndarray):
            counts: Any = self._overlaps(pred, gt)
        else:
            counts = [(pred & gt).sum((1, 2)), pred.sum((1, 2)), gt.sum((1, 2))]
        self.update_counts(counts[0], counts[1], counts[2], pred_no_target, gt_no_target)

    def update_logits(self, mask_logits: Any, gt_mask: Any, pred_no_target: Any = None, gt_no_target: Any = None) -> None:
        """Add mask logits, float [E, 2, H, W] (0 background, 1 target) or [2, H, W]; the mask is the argmax, ties to the background.

        One comparison replaces the argmax over two channels of the released evaluator.

        Raises:
            GrexError: NaN in NumPy logits (tensors are not looked at: that would wait for the device).
        """
        logits = mask_logits[None] if mask_logits.ndim == 3 else mask_logits
        if isinstance(logits, np.ndarray):
            pred = self._scratch(0, (len(logits), *logits.shape[2:]))
            _compare_channels(logits, pred)
        else:
            pred = logits[:, 1] > logits[:, 0]
        self.update(pred, gt_mask, pred_no_target, gt_no_target)

    def update_rle(self, pred_rles: Sequence[Any], gt_rles: Sequence[Any], pred_no_target: Any = None, gt_no_target: Any = None) -> None:
        """Add COCO run-length codes by merging runs, without decoding. Codes from a file are checked first (`ops.rle.check_rle`)."""
        from grex_mllm.ops.rle import overlap_counts

        counts = np.array([overlap_counts(p, g) for p, g in zip(pred_rles, gt_rles, strict=True)], np.int64).reshape(-1, 3)
        self.update_counts(counts[:, 0], counts[:, 1], counts[:, 2], pred_no_target, gt_no_target)

    def update_counts(
        self, intersection: Any, pred_area: Any, gt_area: Any, pred_no_target: Any = None, gt_no_target: Any = None, wrong: Any = None
    ) -> None:
        """Add samples by their pixel counts, int64 [E], NumPy or torch.

        wrong: bool [E], answers that are missing, refused or unreadable: IoU 0 and the no-target decision counted as the wrong one.
        """
        module, inter = _module_of(intersection)
        pred_n, gt_n = _like(pred_area, inter), _like(gt_area, inter)
        e = gt_n == 0 if gt_no_target is None else _flags(gt_no_target, inter)
        bad = None if wrong is None else _flags(wrong, inter)
        head = None if pred_no_target is None else _flags(pred_no_target, inter)
        if head is None and self.protocol == "official" and not self.min_mask_pixels:
            raise fault("no decision of a no-target head", 'one per sample under "official"', "pass pred_no_target, or set min_mask_pixels")
        if module is not np:
            self._add_samples(module, inter, pred_n, gt_n, head, e, bad)
            return
        nothing = np.zeros(len(inter), bool)
        self._waiting.append((inter, pred_n, gt_n, nothing if head is None else head, e, nothing if bad is None else bad))
        if len(self._waiting) >= MANY_WAITING or len(inter) >= MANY_WAITING:
            self._add_waiting()

    def update_rows(self, columns: dict[str, np.ndarray]) -> None:
        """Add rows of the scorer."""
        iou, i, u, says_none = (columns[key] for key in ("iou", "intersection", "union", "no_target"))
        self._add(np, iou, i, u, says_none, columns["num_targets"] == 0)

    def load_state(self, state: Sequence[Any]) -> Self:
        """Replace the sums by those of `state()`."""
        self._device_sums, self._waiting = None, []
        return super().load_state(state)

    def compute(self) -> dict[str, Any]:
        """Return fractions in [0, 1]; None where a share has no sample to be a share of.

        `official` without a no-target sample gives 0 for N_acc and T_acc, as the released code prints. cIoU is 0, with a warning, where
        no pixel was predicted or wanted (the released code divides by zero).
        """
        s = self._named()
        n_none, n_some = s["TP"] + s["FN"], s["TN"] + s["FP"]
        n_acc, t_acc = ratio(s["TP"], n_none), ratio(s["TN"], n_some)
        if self.protocol == "official" and n_none == 0 and s["num_samples"]:
            n_acc = t_acc = 0.0
        if s["num_samples"] and s["union"] == 0:
            warnings.warn("cIoU: no pixel was predicted or wanted in any sample; reported as 0", stacklevel=2)
        return {
            "num_samples": s["num_samples"],
            "no_target_share": ratio(n_none, s["num_samples"]),
            "gIoU": mean(s["iou"], s["num_samples"]),
            "cIoU": (ratio(s["intersection"], s["union"]) or 0.0) if s["num_samples"] else None,
            "N_acc": n_acc,
            "T_acc": t_acc,
            "balanced_acc": half(n_acc, t_acc),
            **{f"Pr@{x:g}": ratio(hits, n_some) for x, hits in zip(self.thresholds, s["hits"], strict=True)},
        }

    def _overlaps(self, pred: np.ndarray, gt: np.ndarray) -> np.ndarray:
        """Return (I, P, G) as int64 [3, E] of bool masks [E, H, W]."""
        both = self._scratch(1, pred.shape[1:])
        count = np.count_nonzero
        found = [(count(np.logical_and(p, g, out=both)), count(p), count(g)) for p, g in zip(pred, gt, strict=True)]
        return np.array(found, np.int64).reshape(-1, 3).T

    def _scratch(self, slot: int, shape: tuple[int, ...]) -> np.ndarray:
        """Return a bool array to write into, the same one for equal shapes: fresh pages cost more than the comparison itself."""
        if slot not in self._buffers or self._buffers[slot].shape != shape:
            self._buffers[slot] = np.empty(shape, bool)
        return self._buffers[slot]

    def _add_waiting(self) -> None:
        if self._waiting:
            columns = [np.concatenate(column) for column in zip(*self._waiting, strict=True)]
            self._waiting = []
            self._add_samples(np, *columns)

    def _add_samples(self, module: Any, inter: Any, pred_n: Any, gt_n: Any, head: Any, e: Any, bad: Any) -> None:
        never = e & False
        head, bad = never if head is None else head, never if bad is None else bad
        self._add(module, *judge(inter, pred_n, gt_n, head, e, bad, self.protocol == "official", self.min_mask_pixels), e)

    def _add(self, module: Any, iou: Any, i: Any, u: Any, says_none: Any, e: Any) -> None:
        flags = [e & says_none, e & ~says_none, ~e & ~says_none, ~e & says_none]
        num = int(iou.shape[0])
        parts = [num, *(f.sum() for f in flags), i.sum(), u.sum(), *limb_sums(iou), *limb_sums(iou * _double(~e))]
        parts += [((iou >= x) & ~e).sum() for x in self.thresholds]
        if module is np:
            self._sums = self._sums + np.array([int(p) for p in parts], np.int64)
            return
        counted = module.stack([module.as_tensor(p, dtype=module.int64, device=iou.device) for p in parts[1:]])
        self._sums[0] += num
        if self._device_sums is not None and self._device_sums.device != counted.device:
            self._whole()
        self._device_sums = counted if self._device_sums is None else self._device_sums + counted

    def _whole(self) -> np.ndarray:
        """Take in what waits, on this or another device, and return the sums."""
        self._add_waiting()
        if self._device_sums is not None:
            self._sums[1:] += self._device_sums.cpu().numpy()
            self._device_sums = None
        return self._sums

    def _named(self) -> dict[str, Any]:
        v = [int(x) for x in self._whole()]
        k = len(FIELDS)
        named: dict[str, Any] = dict(zip(FIELDS, v[:k], strict=True))
        named.update(iou=v[k : k + NUM_LIMBS], targeted_iou=v[k + NUM_LIMBS : k + 2 * NUM_LIMBS], hits=v[k + 2 * NUM_LIMBS :])
        return named


def _compare_channels(logits: np.ndarray, pred: np.ndarray) -> None:
    """Write channel 1 > channel 0 of [E, 2, H, W] into pred [E, H, W], in blocks that stay in the cache for the look at NaN.

    Raises:
        GrexError: NaN (a sum of squares is NaN only through NaN).
    """
    rows = max(1, CACHED_NUMBERS // max(1, 2 * logits.shape[3]))
    for logit, out in zip(logits, pred, strict=True):
        for first in range(0, len(out), rows):
            block = logit[:, first : first + rows]
            np.greater(block[1], block[0], out=out[first : first + rows])
            if np.isnan(np.vdot(block[0], block[0])) or np.isnan(np.vdot(block[1], block[1])):
                raise fault("mask logits with NaN", "finite numbers", "look for the first NaN in the model's outputs")


def _as_masks(mask: Any) -> Any:
    masks = mask[None] if mask.ndim == 2 else mask
    if isinstance(masks, np.ndarray):
        return masks if masks.dtype == bool else masks != 0
    return masks.bool()


def _module_of(values: Any) -> tuple[Any, Any]:
    if type(values).__module__.startswith("torch"):
        import torch

        return torch, values.reshape(-1).long()
    return np, np.atleast_1d(np.asarray(values, np.int64))


def _like(values: Any, reference: Any) -> Any:
    """Return values as the same kind of array, on the same device, as the reference."""
    if isinstance(reference, np.ndarray):
        return np.atleast_1d(np.asarray(values.cpu() if hasattr(values, "cpu") else values))
    import torch

    moved = torch.as_tensor(values, device=reference.device)
    return moved.reshape(-1) if reference.ndim == 1 else moved


def _flags(values: Any, reference: Any) -> Any:
    flags = _like(values, reference)
    return flags.astype(bool) if isinstance(flags, np.ndarray) else flags.bool()


def _double(values: Any) -> Any:
    return values.double() if hasattr(values, "double") else values * 1.0
