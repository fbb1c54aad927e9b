"""Index a folder of synthetic images, time queries, and measure precision at 10 against known truth, beside chance.

python benchmarks/search.py --model runs/demo

Scenes of the split `test` are written as PNG into a temporary folder. Queries are expressions of the grammar, each drawn for one scene and
judged in all of them (`grex_mllm.data.synthetic.evaluate`): an image is right where the expression denotes something in it, wrong where it
denotes nothing, and has no truth where the scene leaves it undetermined ("the four circles" among five, "the star" of two, places within a
margin). Only queries that are right for at least ten images and for at most half of them are asked. precision_at_10 counts undetermined
images as wrong, judged_precision_at_10 leaves them out of the ranking ("condensed lists", Sakai, "Alternatives to Bpref", SIGIR 2007).
Chance is the share of right images, of all and of the judged ones; "regions_alone" ranks by the best region of the whole expression,
"target_and_region" by its probability times that of a target. --table adds a line for each query. CPU seconds are those of the process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from grex_mllm.data.synthetic import SyntheticDataset, evaluate, parse, scene_from_record
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.models.grex import GrexModel
from grex_mllm.search import SearchIndex, open_index

TOP = 10
RIGHT, WRONG, UNKNOWN = 1, 0, -1
LARGEST_SHARE = 0.5


def draw(folder: Path, split: str, number: int, queries: int, side: int) -> tuple[list[str], np.ndarray]:
    """Write scenes as NNNNN.png; return expressions, and int8 [queries, number]: RIGHT where a scene holds what is said, WRONG, UNKNOWN."""
    data = SyntheticDataset(SyntheticConfig(image_size=side), split, number, 2)
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
        denoted = [evaluate(tree, scene) for scene in scenes]
        judged = np.array([UNKNOWN if found is None else RIGHT if found else WRONG for found in denoted], np.int8)
        if min(TOP, number // 4) <= (judged == RIGHT).sum() <= LARGEST_SHARE * number:
            chosen.append(text)
            truth.append(judged)
        if len(chosen) == queries:
            break
    return chosen, np.array(truth)


def precision(values: np.ndarray, judged: np.ndarray, condensed: bool = False) -> float:
    """Return the share of right images among the first TOP by their values; condensed: without those that have no truth."""
    order = np.argsort(-values, kind="stable")
    ranked = judged[order[judged[order] != UNKNOWN] if condensed else order][:TOP]
    return float((ranked == RIGHT).mean())


def measure(opened: SearchIndex, queries: list[str], truth: np.ndarray) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return medians of seconds and means of precisions, and a row for each query."""
    times, busy, rows = [], [], []
    for text, judged in zip(queries, truth, strict=True):
        start, started = time.perf_counter(), time.process_time()
        opened.search(text, top=TOP)
        times.append(time.perf_counter() - start)
        busy.append(time.process_time() - started)
        scores = opened.scores(text)
        score, whole = scores.score[0], opened.scores(text, divide=False)
        region, there = whole.region_score[0], 1 - whole.no_target_prob[0]
        first = judged[np.argsort(-score, kind="stable")[:TOP]]
        row = {"precision_at_10": precision(score, judged), "judged_precision_at_10": precision(score, judged, condensed=True)}
        row |= {"target_and_region": precision(there * region, judged), "regions_alone": precision(region, judged)}
        row |= {"judged_target_and_region": precision(there * region, judged, condensed=True)}
        row |= {"undetermined_of_10": float((first == UNKNOWN).mean()), "chance": float((judged == RIGHT).mean())}
        rows.append({"query": text, **row, "judged_chance": float((judged == RIGHT).sum() / (judged != UNKNOWN).sum())})
    means = {name: round(float(np.mean([row[name] for row in rows])), 4) for name in rows[0] if name != "query"}
    return {
        "query_s": round(statistics.median(times), 3),
        "query_cpu_s": round(statistics.median(busy), 3),
        "slowest_query_s": round(max(times), 3),
        **means,
    }, rows


def main() -> int:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model folder")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--side", type=int, default=96, help="pixels of a scene's side")
    parser.add_argument("--split", default="test", help="of the scenes; whoever changes the ranking chooses on val")
    parser.add_argument("--table", action="store_true", help="print every query")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        queries, truth = draw(Path(folder), given.split, given.images, given.queries, given.side)
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
        measured, rows = measure(opened, queries, truth) if queries else ({}, [])
        print(json.dumps(about | built | measured))
        for row in sorted(rows if given.table else [], key=lambda row: row["precision_at_10"]):
            print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
