"""What is gained by answering only where the model is sure: risk-coverage curves, the area under them, accuracies at every threshold.

Selective prediction (El-Yaniv and Wiener, JMLR 2010; Geifman and El-Yaniv, "Selective classification for deep neural networks", NeurIPS
2017): answers are ranked by confidence; coverage is the share that is kept, risk the mean loss of these. The area under the curve (AURC;
Geifman, Uziel and El-Yaniv, ICLR 2019) is the mean of the risks at coverages 1/n, 2/n, ..., 1. Answers of equal confidence have no order:
they enter with their mean loss, which is the expectation over all orders, so that the file order does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from grex_mllm.errors import fault
from grex_mllm.metrics.sums import ratio

NUM_POINTS = 20  # of the curve: coverage 0.05, 0.10, ... 1
SCALE = 1 << 40  # losses are summed as whole multiples of 2**-40
THRESHOLDS = tuple(k / 20 for k in range(21))


def risk_coverage(confidence: Sequence[float], loss: Sequence[float]) -> dict[str, Any]:
    """Return num_samples, AURC, risk (of all answers) and `curve`: {coverage, risk} at 20 coverages, each rounded up to whole answers.

    confidence: any finite numbers, higher is surer, [E].  loss: in [0, 1], [E].

    Raises:
        GrexError: lists of different lengths, a confidence that is not finite, or a loss outside [0, 1].
    """
    sure, lost = np.asarray(confidence, np.float64), np.asarray(loss, np.float64)
    if sure.shape != lost.shape or sure.ndim != 1:
        raise fault(f"{sure.shape} confidences and {lost.shape} losses", "one loss for each confidence", "give lists of one length")
    if not np.isfinite(sure).all() or not ((lost >= 0) & (lost <= 1)).all():
        raise fault("a confidence that is not finite or a loss outside [0, 1]", "finite numbers and losses in [0, 1]", "fix the lists")
    num = len(sure)
    if num == 0:
        return {"num_samples": 0, "AURC": None, "risk": None, "curve": []}
    risks = _risks(sure, lost)
    counts = [-(-num * k // NUM_POINTS) for k in range(1, NUM_POINTS + 1)]
    curve = [{"coverage": count / num, "risk": float(risks[count - 1])} for count in dict.fromkeys(counts)]
    return {"num_samples": num, "AURC": math.fsum(risks) / num, "risk": float(risks[-1]), "curve": curve}


def _risks(confidence: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Return the risk of the k most confident answers, k = 1 ... n. Losses are summed as whole numbers: no order changes the result."""
    order = np.argsort(-confidence, kind="stable")
    whole = np.rint(loss[order] * SCALE).astype(np.int64)
    starts = np.flatnonzero(np.diff(confidence[order], prepend=np.inf))  # of each run of equal confidences
    sizes = np.diff([*starts, len(order)])
    sums = np.add.reduceat(whole, starts)
    before = np.cumsum(sums) - sums
    rank = np.arange(1, len(order) + 1)
    shares = (rank - np.repeat(starts, sizes)) / np.repeat(sizes, sizes)  # of its run that is kept
    return (np.repeat(before, sizes) + np.repeat(sums, sizes) * shares) / rank / SCALE


def no_target_at_thresholds(no_target_prob: Sequence[float], gt_no_target: Sequence[bool]) -> list[dict[str, Any]]:
    """Return for thresholds 0, 0.05, ... 1 what saying "no target" above each of them gives: threshold, N_acc, T_acc, answered, risk.

    answered: share of expressions that get an answer (probability at most the threshold); risk: share of these without a target. At 0
    everything is "no target" and at 1 nothing, as in prediction (`predict.no_target_threshold`). None where there is nothing to divide by.
    """
    prob, truth = np.asarray(no_target_prob, np.float64), np.asarray(gt_no_target, bool)
    table = []
    for threshold in THRESHOLDS:
        says_none = np.ones(len(prob), bool) if threshold == 0 else prob > threshold
        answered = ~says_none
        table.append(
            {
                "threshold": threshold,
                "N_acc": ratio(int((says_none & truth).sum()), int(truth.sum())),
                "T_acc": ratio(int((answered & ~truth).sum()), int((~truth).sum())),
                "answered": ratio(int(answered.sum()), len(prob)),
                "risk": ratio(int((answered & truth).sum()), int(answered.sum())),
            }
        )
    return table
