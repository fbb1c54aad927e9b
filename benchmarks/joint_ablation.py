"""What makes joint training more than its parts: options against the same short recipe without them, three seeds each.

    python benchmarks/joint_ablation.py --out runs/joint_ablation

trains every variant of VARIANTS with every seed on synthetic scenes without metadata (configs/demo.yaml, a third of its steps), predicts
100 scenes, scores them, and prints a table: mean and range over the seeds. What is finished is not repeated, what was cut off goes on.
With --metadata, attributes of the objects are used in training, as in the demo: then the generator has something to say after as few steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

WITHOUT_METADATA = [
    "--model.decoder.attribute_classes={}", "--model.generator.attribute_classes={}", "--train.pretraining.scenes=0",
    "--train.pretraining.batch=128", "--train.pretraining.lr=3e-3", "--loss.generate_start=0", "--train.optim.lr_scale={}",
]  # fmt: skip
STEPS, SCENES, EXPRESSIONS, LISTENER = 300, 100, 8, 6
WORDS = [  # objects and regions are shown by words, and the language model's base learns from places and words, not from text alone
    "--model.generator.words=400", "--model.decoder.words=400", "--train.pretraining.scenes=250", "--train.pretraining.batch=64",
    "--train.pretraining.lr=2e-3", "--train.pretraining.num_generation_targets=16",
]  # fmt: skip
VARIANTS: dict[str, list[str]] = {
    "baseline": [],
    "contrast": ["--loss.contrast=0.3"],
    "words": WORDS,
    "round_trip": ["--loss.round_trip=3.0"],
    "found": ["--model.generator.found_share=0.5"],
    "image_grid": ["--model.generator.image_grid=4"],
}
MEASURES = {  # column -> place in results.json, strict protocol
    "gIoU": "gres.gIoU",
    "Pr@F1": "grec.Pr@F1",
    "N-acc": "gres.N_acc",
    "count": "count.accuracy",
    "exact": "greg.all.correct",
    "exact, others found": "greg.among_found.all.correct",
    "exact, re-ranked": "greg.listener.all.correct",
    "round-trip gIoU": "greg.all.round_trip_gIoU",
}
LAST = 5  # lines of the log whose mean is the loss at the end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/joint_ablation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="of the joint training; the language model reads text for two thirds as many"
    )
    parser.add_argument("--scenes", type=int, default=SCENES, help="that are predicted")
    parser.add_argument("--metadata", action="store_true", help="train with the scenes' attributes, as the demo does")
    options = parser.parse_args()
    data = scenes(options.out, options.scenes)
    for seed in options.seeds:
        for name in options.variants:
            recipe = [*([] if options.metadata else WITHOUT_METADATA), *VARIANTS[name]]
            one_run(recipe, seed, options.steps, options.out / f"{name}-{seed}", data)
    print(table(options.out, options.variants, options.seeds))


def table(out: Path, variants: list[str], seeds: list[int]) -> str:
    """Return the measures in Markdown: mean (lowest to highest), percent; the losses at the end of the training as they are."""
    head = ["variant", *MEASURES, "loss of expressions", "loss of selection"]
    lines = [head, ["---"] * len(head)]
    for name in variants:
        rows = [measures(out / f"{name}-{seed}") for seed in seeds]
        lines.append(
            [name, *(f"{sum(each) / len(each):.1f} ({min(each):.1f} to {max(each):.1f})" for each in zip(*(row[:-2] for row in rows)))]
        )
        lines[-1] += [f"{sum(each) / len(each):.3f} ({min(each):.3f} to {max(each):.3f})" for each in zip(*(row[-2:] for row in rows))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measures(run: Path) -> list[float]:
    """Return MEASURES in percent, then the mean losses of the last steps."""
    strict = json.loads((run / "results.json").read_text(encoding="utf-8"))["results"]["strict"]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()][-LAST:]
    losses = [sum(line[f"loss/{name}"] for line in log) / len(log) for name in ("generate/lm", "ground/target")]
    return [100 * float(_at(strict, place)) for place in MEASURES.values()] + losses


def _at(tree: Any, place: str) -> Any:
    for key in place.split("."):
        tree = tree[key]
    return tree


def scenes(out: Path, number: int) -> Path:
    """Write the test scenes, or find them there."""
    from grex_mllm.data.synthetic.export import export
    from grex_mllm.data.synthetic.settings import SyntheticConfig

    if not (out / "data").is_dir():
        export(SyntheticConfig(), "test", number, out / "data", EXPRESSIONS)
    return out / "data"


def one_run(recipe: list[str], seed: int, steps: int, run: Path, data: Path) -> None:
    """Train, predict and score, each in a process of its own and only where its result is not there yet."""
    length = [f"--train.steps={steps}", f"--train.pretraining.steps={2 * steps // 3}"]
    train(run, seed, [*length, *recipe])
    split = ["--data", str(data), "--split", "test"]
    predictions, results = run / "predictions.jsonl", run / "results.json"
    if not predictions.exists():
        grex("predict", "--model", str(run), *split, "--listener", str(LISTENER), "--out", str(predictions))
    if not results.exists():
        grex("score", str(predictions), *split, "--protocol", "eval/protocols/all.yaml", "--out", str(results))


def train(run: Path, seed: int, overrides: list[str]) -> None:
    """Train a variant of the demo's recipe, unless it is trained."""
    if not (run / "model.safetensors").exists():
        options = ["--train.num_threads=1", "--train.save_every=100", "--train.resume=true", *overrides]
        grex("train", "--config", "configs/demo.yaml", f"--train.seed={seed}", f"--train.out={run}", *options)


def grex(*arguments: str) -> None:
    print(" ".join(("grex", *arguments)), flush=True)
    subprocess.run([sys.executable, "-m", "grex_mllm", *arguments], check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


if __name__ == "__main__":
    main()
