"""Learn a few real photographs by heart, with the same loop, and say how well: masks, boxes, no-target, and expressions repeated.

python data_prep/grefcoco.py --refs grefs.json --instances instances.json --images images --out data/mini
python benchmarks/overfit.py --data data/mini --split test --images 16 --out runs/overfit
python benchmarks/overfit.py --data data/mini --split test --images 16 --out runs/overfit_vlt --system vlt

With --system another decoder takes the place of the configuration's, without a generator: masks, boxes and no-target alone.
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

# masks learned by heart: at the article's weights the boxes take most of the gradient, and small objects get no mask for long
HEAVY = "loss: {mask: 40.0}"
PLAIN = ("model.pixel_decoder.name=fpn_levels",)
SWIN = "{name: swin, embed_width: 24, swin_depths: [1, 1, 2, 1], swin_heads: [1, 2, 4, 8], window: 6, drop_path: 0.0, fusion: pwam"
CELLS = "width: 96, num_heads: 4, feedforward: 256, grid_side: 24, maps: three, mask_widths: [64, 48, 32], heads: {minimap_side: 12}"
OWN = "loss: {identification: 20.0, segmentation: 8.6, refinement: 16.0}"  # the same for ISFP, whose masks have terms of their own
GRID = f"{CELLS}, {HEAVY}"
RELA = f"width: 96, num_heads: 4, num_layers: 3, feedforward: 256, minimap_side: 12, mask_language_padding: true, {HEAVY}"
SYSTEMS: dict[str, tuple[str, ...]] = {
    "instance_selection": (),
    "rela": (f"model.decoder={{name: rela, {RELA}}}",),
    "isfp": (*PLAIN, f"model.decoder={{name: isfp, width: 96, segmentation_width: 64, refinement_width: 16, minimap_side: 12, {OWN}}}"),
    "lavt": (
        f"model.vision={SWIN}, fusion_start: open}}",
        "model.pixel_decoder.name=top_down",
        f"model.decoder={{name: lavt, width: 96, heads: {{minimap_side: 12}}, {HEAVY}}}",
    ),
    "lavt_rela": (f"model.vision={SWIN}, fusion_start: open}}", f"model.decoder={{name: rela, {RELA}}}"),
    "vlt": (*PLAIN, f"model.decoder={{name: vlt, {GRID}}}"),
    "vlt_rela": (*PLAIN, f"model.decoder={{name: vlt_rela, {RELA}, grid_side: 24, maps: three, encoder_feedforward: 256}}"),
    "m3att": (*PLAIN, f"model.decoder={{name: m3att, {GRID}, max_words: 40}}"),
}


def main() -> int:
    """Run everything and print one line of numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--split", required=True)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/overfit"))
    parser.add_argument("--system", choices=list(SYSTEMS), help="a decoder, without a generator")
    given, overrides = parser.parse_known_args()
    print(json.dumps(learn(given.data, given.split, given.images, given.seed, given.out, given.system, overrides)))
    return 0


def learn(data: Path, split: str, images: int, seed: int, out: Path, system: str | None, overrides: list[str]) -> dict[str, float]:
    """Train on some photographs, predict them, and return the numbers."""
    from grex_mllm.predict import predict_split
    from grex_mllm.score import score
    from grex_mllm.training.run import train_from_config

    shutil.rmtree(out, ignore_errors=True)
    subset(data, split, out / "data", images, seed)
    fields = [f"--data.train={out / 'data'}", f"--data.train_split={split}", f"--train.out={out}", f"--train.seed={seed}"]
    if system is not None:
        fields += ["--model.generator=null", "--train.pretraining=null", *(f"--{field}" for field in SYSTEMS[system])]
    start = time.monotonic()
    train_from_config(load_config(CONFIG_FOLDER / "overfit.yaml", [*fields, *overrides]))
    trained = time.monotonic() - start
    predictions = out / "predictions.jsonl"
    tasks = ["ground"] if system is not None else ["ground", "generate"]
    predict_split(str(out), str(out / "data"), predictions, split, tasks, device="cpu")
    results = score(predictions, out / "data", split, PROTOCOL_FOLDER / "all.yaml", out / "results.json", show=True)
    strict = results["results"]["strict"]
    row = {"gIoU": strict["gres"]["gIoU"], "Pr@F1": strict.get("grec", {}).get("Pr@F1"), "N_acc": strict["gres"]["N_acc"]}
    found: dict[str, float] = {"training_s": round(trained)}
    if system is None:
        repeated, sets = repeats(out / "data", split, predictions)
        found["object_sets"], row["repeated"] = sets, repeated / sets
    return found | {name: round(value, 3) for name, value in row.items() if value is not None}


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
