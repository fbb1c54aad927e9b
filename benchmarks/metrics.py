"""Measure the metric room beside plain implementations of the authors' procedures, in one run on one machine.

    python benchmarks/metrics.py                      # masks, boxes
    python benchmarks/metrics.py --text               # METEOR + CIDEr on 10,000 pairs too (needs Java)
    python benchmarks/metrics.py --million 1000000    # streams that many predictions through `score`, prints seconds and peak memory

Baselines: `torch argmax` = argmax over two full-size channels, then logical and / or in NumPy, as the released GRES evaluator does
(`NumPy argmax`: with the faster argmax); `decode` = decode both
run-length codes, then the same; `torch loop` = per sample: sort, threshold, generalized IoU, top-1 until below the threshold, as the
released GREC evaluator does. The machine is the one the numbers are printed on; nothing is compared across runs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from grex_mllm.metrics import GREC, GREG, GRES
from grex_mllm.ops.masks import encode_rle
from grex_mllm.ops.rle import check_rle

HEIGHT, WIDTH = 480, 640
NUM_BOXES = 30


def timed(work: Callable[[], Any], num_samples: int, repeats: int = 3) -> float:
    """Return the best milliseconds a sample over some repeats."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best / num_samples


def report(name: str, baseline: str, plain_ms: float, ours_ms: float) -> None:
    """Print one comparison."""
    print(f"{name:28} ours {ours_ms:9.4f} ms   {baseline:13} {plain_ms:9.4f} ms   {plain_ms / ours_ms:6.1f}x")


def blobs(count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return bool masks [H, W] of some ellipses with ragged edges, about as many runs as real instance masks."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    masks = []
    for _ in range(count):
        mask = np.zeros((HEIGHT, WIDTH), bool)
        for _ in range(rng.integers(1, 4)):
            angle = np.arctan2(y - (cy := rng.integers(60, 420)), x - (cx := rng.integers(60, 580)))
            radius = rng.integers(30, 110) * (1 + 0.2 * np.sin(angle * rng.integers(3, 9)))
            mask |= (x - cx) ** 2 + (y - cy) ** 2 < radius**2
        masks.append(mask)
    return masks


def masks_from_logits(rng: np.random.Generator, count: int = 20) -> None:
    """GRES from logits [2, H, W]."""
    import torch

    gts = blobs(count, rng)
    logits = [np.stack([-(v := np.where(g, 1.0, -1.0) + rng.normal(0, 0.7, g.shape)), v]).astype(np.float32) for g in gts]

    tensors = [torch.from_numpy(logit) for logit in logits]

    def plain() -> list[float]:
        ious = []
        for logit, gt in zip(logits, gts, strict=True):
            pred = logit.argmax(axis=0)
            inter = np.sum(np.logical_and(pred, gt))
            union = np.sum(np.logical_or(pred, gt))
            ious.append(inter / union)
        return ious

    def released() -> None:
        for tensor, gt in zip(tensors, gts, strict=True):
            pred = np.asarray(tensor.argmax(dim=0).numpy(), np.int8)
            np.sum(np.logical_and(pred, gt)) / np.sum(np.logical_or(pred, gt))

    def ours() -> float:
        metric = GRES("official")
        for logit, gt in zip(logits, gts, strict=True):
            metric.update_logits(logit, gt, [False], [False])
        return float(metric.compute()["gIoU"])

    assert abs(float(np.mean(plain())) - ours()) < 1e-12
    ours_ms = timed(ours, count)
    report("GRES from logits", "torch argmax", timed(released, count), ours_ms)
    report("GRES from logits", "NumPy argmax", timed(plain, count), ours_ms)


def masks_from_rle(rng: np.random.Generator, count: int = 100) -> None:
    """GRES from run-length codes, with and without the safety check that files get."""
    gts = blobs(count, rng)
    gt_codes = [encode_rle(g) for g in gts]
    codes = [encode_rle(np.roll(g, int(rng.integers(-20, 20)), axis=int(rng.integers(0, 2)))) for g in gts]

    def plain() -> list[float]:
        ious = []
        for code, gt_code in zip(codes, gt_codes, strict=True):
            pred, gt = coco_mask.decode(code), coco_mask.decode(gt_code)
            ious.append(np.sum(np.logical_and(pred, gt)) / np.sum(np.logical_or(pred, gt)))
        return ious

    def ours() -> float:
        metric = GRES("strict")
        metric.update_rle(codes, gt_codes)
        return float(metric.compute()["gIoU"])

    def checked() -> None:
        GRES("strict").update_rle([check_rle(code, HEIGHT, WIDTH) for code in codes], gt_codes)

    assert abs(float(np.mean(plain())) - ours()) < 1e-12
    plain_ms = timed(plain, count)
    report("GRES from RLE", "decode", plain_ms, timed(ours, count))
    report("GRES from RLE, checked", "decode", plain_ms, timed(checked, count))


def boxes(rng: np.random.Generator, count: int = 500) -> None:
    """GREC official over samples of 30 boxes."""
    import torch

    samples = []
    for _ in range(count):
        gt = np.sort(rng.uniform(0, 400, (rng.integers(1, 4), 2, 2)), axis=1).reshape(-1, 4) + [0, 0, 20, 20]
        found = np.concatenate(
            [gt + rng.normal(0, 2, gt.shape) + [0, 0, 9, 9], np.sort(rng.uniform(0, 400, (NUM_BOXES, 2, 2)), axis=1).reshape(-1, 4)]
        )
        scores = np.concatenate([rng.uniform(0.5, 1, len(gt)), rng.uniform(0, 0.75, NUM_BOXES)])[:NUM_BOXES]
        samples.append((found[:NUM_BOXES].tolist(), scores.tolist(), gt.tolist(), False, None))

    def plain() -> float:
        return sum(_plain_grec(torch, *s[:3]) for s in samples) / count

    def ours() -> float:
        metric = GREC("official")
        metric.update_many(samples)
        return float(metric.compute()["Pr@F1"])

    assert plain() == ours()
    report("GREC, 30 boxes", "torch loop", timed(plain, count), timed(ours, count))


def _plain_grec(torch: Any, found: list[Any], scores: list[float], gt: list[Any]) -> bool:
    ranked = sorted(zip(scores, found, strict=True), reverse=True)
    pred = torch.cat([torch.as_tensor(b).view(1, 4) for s, b in ranked])[np.array([s for s, _ in ranked]) >= 0.7]
    want = torch.stack([torch.tensor(g) for g in gt])
    low, high = torch.max(pred[:, None, :2], want[:, :2]), torch.min(pred[:, None, 2:], want[:, 2:])
    inter = (high - low).clamp(min=0).prod(2)
    area_p, area_g = (pred[:, 2:] - pred[:, :2]).prod(1), (want[:, 2:] - want[:, :2]).prod(1)
    union = area_p[:, None] + area_g - inter
    outer = (torch.max(pred[:, None, 2:], want[:, 2:]) - torch.min(pred[:, None, :2], want[:, :2])).clamp(min=0).prod(2)
    giou = inter / union - (outer - union) / outer
    hits = 0
    for _ in range(min(giou.shape)):
        value, place = torch.topk(giou.flatten(), 1)
        if value < 0.5:
            break
        hits += 1
        giou[place // len(gt), :] = 0
        giou[:, place % len(gt)] = 0
    return bool(2 * hits >= len(pred) + len(gt))


def texts(rng: np.random.Generator, count: int = 10_000) -> None:
    """METEOR and CIDEr (and the rest) on generated pairs with three references each."""
    words = [
        "left",
        "right",
        "man",
        "woman",
        "red",
        "blue",
        "shirt",
        "dog",
        "car",
        "front",
        "behind",
        "table",
        "the",
        "a",
        "on",
        "in",
        "white",
    ]
    metric = GREG()
    for k in range(count):
        base = [str(w) for w in rng.choice(words, rng.integers(2, 9))]
        refs = [" ".join(base[: rng.integers(1, len(base) + 1)]) + f" {rng.integers(0, 999)}" for _ in range(3)]
        metric.update(" ".join(base), refs, 1 + k % 2)
    start, before = time.perf_counter(), sum(os.times()[:4])
    scores = metric.compute()["all"]
    wall, processor = time.perf_counter() - start, sum(os.times()[:4]) - before
    print(f"GREG, {count:,} pairs in three subsets: {wall:.1f} s, {processor:.1f} s of processor time")
    print(f"  METEOR {scores['METEOR']}, CIDEr {scores['CIDEr']:.4f}")


def million(count: int) -> None:
    """Stream `count` predictions through `score` in a process of its own; print seconds and that process's peak memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_million(folder, count)
        code = (
            "import sys, time; from grex_mllm.score import score; t = time.perf_counter(); "
            "r = score(sys.argv[1] + '/p.jsonl', sys.argv[1], 'val', sys.argv[2], sys.argv[1] + '/r.json'); "
            "print(r['results']['strict']['gres']['num_samples'], 'predictions in', round(time.perf_counter() - t, 1), 's')"
        )
        protocol = Path(__file__).resolve().parent.parent / "eval" / "protocols" / "all.yaml"
        subprocess.run([sys.executable, "-c", code, name, str(protocol)], check=True)
        print(f"peak memory {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024:.0f} MiB")


def _write_million(folder: Path, count: int) -> None:
    rng = np.random.default_rng(1)
    kinds = [{k: v for k, v in encode_rle(m).items()} for m in blobs(16, rng)]
    per_image = 10
    with (folder / "images.jsonl").open("w") as images:
        for n in range(-(-count // per_image)):
            found = [
                {"annotation_id": str(a), "category": "thing", "box_xyxy": [10.0 * a, 0.0, 10.0 * a + 9, 9.0], "iscrowd": False}
                | {"segmentation": kinds[(n + a) % 16]}
                for a in range(2)
            ]
            images.write(json.dumps({"image_id": str(n), "file": "x.jpg", "height": HEIGHT, "width": WIDTH, "instances": found}) + "\n")
    with (folder / "expressions.jsonl").open("w") as expressions, (folder / "p.jsonl").open("w") as predictions:
        for k in range(count):
            targets = ["0", "1"][: k % 3]
            line = {
                "expression_id": f"made:{k}",
                "ref_id": str(k),
                "image_id": str(k // per_image),
                "expression": "a thing",
                "raw": "a thing",
            }
            expressions.write(json.dumps(line | {"targets": targets, "split": "val", "source": "made", "tags": []}) + "\n")
            answer = {"expression_id": f"made:{k}", "mask_rle": kinds[k % 16], "boxes_xyxy": [[0.0, 0.0, 9.0, 9.0]], "box_scores": [0.9]}
            predictions.write(json.dumps(answer | {"count": k % 3, "no_target_prob": 0.1, "no_target": False, "status": "ok"}) + "\n")
    (folder / "dataset.json").write_text(json.dumps({"name": "made", "image_root": ".", "counts": {}}))


def main() -> None:
    """Run the chosen measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="store_true")
    parser.add_argument("--million", type=int, default=0, metavar="COUNT")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    if options.million:
        million(options.million)
        return
    masks_from_logits(rng)
    masks_from_rle(rng)
    boxes(rng)
    if options.text:
        texts(rng)


if __name__ == "__main__":
    main()
