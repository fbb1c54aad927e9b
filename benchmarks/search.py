"""Index a folder of synthetic images, time queries, and measure precision at 10 against known truth, beside chance.

python benchmarks/search.py --model runs/demo

Scenes of the split `test` are written as PNG into a temporary folder. Queries are expressions of the grammar, each drawn for one scene and
judged in all of them (`grex_mllm.data.synthetic.evaluate`): an image is right where the expression denotes something in it. Only queries
that are right for at least ten images and for at most half of them are asked. Chance is the share of right images; "without_rejection"
ranks by the best region alone, as a model without the no-target head does. CPU seconds are those of the process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from grex_mllm.data.synthetic import SyntheticDataset, evaluate, parse, scene_from_record
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.models.grex import GrexModel
from grex_mllm.search import SearchIndex, open_index

TOP = 10
LARGEST_SHARE = 0.5


def draw(folder: Path, number: int, queries: int, side: int) -> tuple[list[str], np.ndarray]:
    """Write scenes as NNNNN.png; return expressions, and bool [queries, number]: in which scenes each denotes something."""
    data = SyntheticDataset(SyntheticConfig(image_size=side), "test", number, 2)
    scenes, texts = [], []
    for n in range(number):
        sample = data[n]
        Image.fromarray(sample.image).save(folder / f"{n:05d}.png")
        scenes.append(scene_from_record(sample.record))
        texts += [record.expression for record in sample.expressions if record.targets]
    chosen, truth = [], []
    for text in dict.fromkeys(texts):
        tree = parse(text)
        if tree is None:
            continue
        right = np.array([bool(evaluate(tree, scene)) for scene in scenes])
        if min(TOP, number // 4) <= right.sum() <= LARGEST_SHARE * number:
            chosen.append(text)
            truth.append(right)
        if len(chosen) == queries:
            break
    return chosen, np.array(truth)


def measure(opened: SearchIndex, queries: list[str], truth: np.ndarray) -> dict[str, float]:
    """Return the median seconds of one query, and precisions at 10: as ranked, without the rejection probability, and by chance."""
    times, busy, ranked, regions = [], [], [], []
    for text, right in zip(queries, truth, strict=True):
        start, started = time.perf_counter(), time.process_time()
        opened.search(text, top=TOP)
        times.append(time.perf_counter() - start)
        busy.append(time.process_time() - started)
        scores = opened.scores(text)
        for values, found in ((scores.score[0], ranked), (scores.region_score[0], regions)):
            found.append(float(right[np.argsort(-values, kind="stable")[:TOP]].mean()))
    return {
        "query_s": round(statistics.median(times), 3),
        "query_cpu_s": round(statistics.median(busy), 3),
        "slowest_query_s": round(max(times), 3),
        "precision_at_10": round(float(np.mean(ranked)), 4),
        "without_rejection": round(float(np.mean(regions)), 4),
        "chance": round(float(truth.mean()), 4),
    }


def main() -> int:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model folder")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--side", type=int, default=96, help="pixels of a scene's side")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        queries, truth = draw(Path(folder), given.images, given.queries, given.side)
        model = GrexModel.from_pretrained(given.model)
        start, started = time.perf_counter(), time.process_time()
        opened = open_index(model, folder)
        indexed, busy = time.perf_counter() - start, time.process_time() - started
        start = time.perf_counter()
        open_index(model, folder)
        again = time.perf_counter() - start
        size = sum(file.stat().st_size for file in opened.store.folder.iterdir())
        about = {"images": len(opened), "queries": len(queries), "threads": given.threads}
        built = {
            "index_s": round(indexed, 1),
            "index_cpu_s": round(busy, 1),
            "open_again_s": round(again, 2),
            "bytes_per_image": round(size / max(1, len(opened))),
        }
        print(json.dumps(about | built | (measure(opened, queries, truth) if queries else {})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
