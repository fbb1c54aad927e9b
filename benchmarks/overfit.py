"""Learn a few real photographs by heart, with the same loop, and say how well: masks, boxes, no-target, and expressions repeated.

python data_prep/grefcoco.py --refs grefs.json --instances instances.json --images images --out data/mini
python benchmarks/overfit.py --data data/mini --split test --images 16 --out runs/overfit
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from grex_mllm.config import CONFIG_FOLDER, PROTOCOL_FOLDER, load_config
from grex_mllm.data.records import load_dataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data_prep"))
from subset import subset


def main() -> int:
    """Run everything and print one line of numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--split", required=True)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/overfit"))
    given, overrides = parser.parse_known_args()
    from grex_mllm.predict import predict_split
    from grex_mllm.score import score
    from grex_mllm.training.run import train_from_config

    shutil.rmtree(given.out, ignore_errors=True)
    subset(given.data, given.split, given.out / "data", given.images, given.seed)
    fields = [
        f"--data.train={given.out / 'data'}",
        f"--data.train_split={given.split}",
        f"--train.out={given.out}",
        f"--train.seed={given.seed}",
    ]
    start = time.monotonic()
    train_from_config(load_config(CONFIG_FOLDER / "overfit.yaml", [*fields, *overrides]))
    trained = time.monotonic() - start
    predictions = given.out / "predictions.jsonl"
    predict_split(str(given.out), str(given.out / "data"), predictions, given.split, ["ground", "generate"], device="cpu")
    results = score(predictions, given.out / "data", given.split, PROTOCOL_FOLDER / "all.yaml", given.out / "results.json", show=True)
    strict = results["results"]["strict"]
    repeated, sets = repeats(given.out / "data", given.split, predictions)
    row = {"gIoU": strict["gres"]["gIoU"], "Pr@F1": strict["grec"]["Pr@F1"], "N_acc": strict["gres"]["N_acc"], "repeated": repeated / sets}
    print(json.dumps({"training_s": round(trained), "object_sets": sets} | {name: round(value, 3) for name, value in row.items()}))
    return 0


def repeats(data: Path, split: str, predictions: Path) -> tuple[int, int]:
    """Count the object sets whose greedy expression is one of their references, and all sets."""
    references: dict[tuple[str, tuple[str, ...]], set[str]] = {}
    for record in load_dataset(data).expressions_of(split):
        references.setdefault((record.image_id, tuple(sorted(record.targets))), set()).add(" ".join(record.expression.split()))
    lines = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    generated = [line for line in lines if "targets" in line]
    return sum(line["expression"] in references[line["image_id"], tuple(line["targets"])] for line in generated), len(generated)


if __name__ == "__main__":
    sys.exit(main())
