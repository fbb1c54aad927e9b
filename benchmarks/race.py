"""Every grounding system at an equal budget: the same scenes or photographs, encoders, optimizer and seconds, three seeds, intervals.

    python benchmarks/race.py --out runs/race                                    # drawn scenes
    python benchmarks/race.py --data runs/photos/data --out runs/race_photos     # photographs: a folder with splits train and test
    python benchmarks/race.py --out runs/race --table options.md --systems ReLA "ReLA, focal loss" "ReLA, hardest pixels"    # options

First the steps of all systems are timed, in turn and several times over (the machine should do nothing else); the seconds of a run then
are a number of steps (steps.json), so that every schedule ends with its budget and a run can be repeated. Then each system is trained with
each seed, predicts the test split, and is scored (strict); what is finished is not repeated, what was cut off goes on. The table gives
means over sources, each counting the same, with 95 % intervals from drawing seeds and, within each source, images (the same ones for all
rows), and beside them what a model costs: weights, multiplications and additions of one expression, milliseconds of one and of eleven of
one image.

All systems have the encoders of configs/race.yaml. LAVT, ReLA and LAVT+ReLA read language in the image encoder, as published; the others do
not, and share the work on an image. All learn boxes, count and no target beside masks. The options of configs/README.md are further rows,
raced where --systems names them; the distilled one is taught by this folder's ReLA of the same seed, which must be there.

Two races may share a machine and a folder: time the steps once (--steps-only), then give each its share of the systems, and ask for all
of them at last: what is there is only put into the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import photo_comparison as shared

from grex_mllm.compare import read_run, share_of
from grex_mllm.config import load_config
from grex_mllm.data.records import load_dataset
from grex_mllm.metrics import entry
from grex_mllm.writing import whole_file

MEASURES = {"gIoU": "gres", "cIoU": "gres", "N_acc": "gres", "T_acc": "gres", "Pr@F1": "grec"}  # key of a column -> its metric
PLAIN = ("--model.vision.fusion=none", "--model.pixel_decoder.name=fpn_levels")
AJAR = ("--model.vision.fusion_start=open", "--model.pixel_decoder.name=top_down")
GRID = "width: 96, num_heads: 4, feedforward: 256, grid_side: GRID, maps: three, mask_widths: [64, 32, 16], heads: {minimap_side: 12}"
RELA = "width: 96, num_heads: 4, num_layers: 3, feedforward: 256, minimap_side: 12, mask_language_padding: true"
SYSTEMS: dict[str, tuple[str, ...]] = {
    "ISFP": (*PLAIN, "--model.decoder={name: isfp, width: 96, segmentation_width: 64, refinement_width: 16, minimap_side: 12}"),
    "VLT": (*PLAIN, f"--model.decoder={{name: vlt, {GRID}}}"),
    "M3Att": (*PLAIN, f"--model.decoder={{name: m3att, {GRID}}}"),
    "LAVT": (*AJAR, "--model.decoder={name: lavt, width: 96, heads: {minimap_side: 12}}"),
    "VLT+ReLA": (*PLAIN, f"--model.decoder={{name: vlt_rela, {RELA}, grid_side: GRID, maps: three, encoder_feedforward: 256}}"),
    "LAVT+ReLA": AJAR,
    "ReLA": (),
    "instance_selection": (
        "--model.vision.fusion=none",
        "--model.decoder={name: instance_selection, width: 96, num_heads: 4, feedforward: 256, minimap_side: 12, kept_regions: 16}",
    ),
}
SMALL = (
    "--model.vision.embed_width=16",
    "--model.pixel_decoder.width=48",
    "--model.pixel_decoder.mask_width=48",
    "--model.decoder.width=48",
)
OPTIONS: dict[str, tuple[str, ...]] = {
    "ReLA, focal loss": ("--model.decoder.loss.hard.focal_gamma=2.0",),
    "ReLA, hardest pixels": ("--model.decoder.loss.hard.pixels=0.25",),
    "ReLA, hardest masks": ("--model.decoder.loss.hard.masks=0.5",),
    "ReLA, regions by the image": ("--model.decoder.minimap_side=16", "--model.decoder.region_sides=[4, 8, 16]"),
    "ReLA, batch norm": ("--model.map_norm=batch",),
    "small ReLA": SMALL,
    "small ReLA, distilled": (*SMALL, "--train.teacher=TEACHER", "--loss.distill=1.0"),
}
CELL = 8  # pixels of a grid cell of drawn scenes; PHOTO_CELL of photographs
PHOTO_CELL, PHOTO_SIZE = 16, 288
SCENES, EXPRESSIONS = 250, 8  # of the drawn test split
ROUNDS, LEAST_STEPS, REPEATS, TOGETHER = 3, 2, 5, 11


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="dataset folder of photographs, splits train and test; without it, drawn scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/race"))
    parser.add_argument("--seconds", type=float, default=1200.0, help="of the training of a run (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=[*SYSTEMS, *OPTIONS])
    parser.add_argument("--table", default="table.md", help="file of --out for the table (default: %(default)s)")
    parser.add_argument("--steps-only", action="store_true", help="time the steps and stop")
    parser.add_argument("--config", default="configs/race.yaml")
    parser.add_argument("--scenes", type=int, default=SCENES, help="of the drawn test split (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], help="a further change of the configuration, for all systems: --set=--a.b=c")
    options = parser.parse_args(arguments)
    tested = options.data or drawn_scenes(options)
    steps = count_steps(options)
    if options.steps_only:
        return
    for seed in options.seeds:
        for name in options.systems:
            one_run(name, seed, steps[name], tested, options)
    text = table(tested, steps, options)
    (options.out / options.table).write_text(text + "\n", encoding="utf-8")
    print(text)


def drawn_scenes(options: argparse.Namespace) -> Path:
    """Return the folder of the drawn test split, written where it is not there yet."""
    from grex_mllm.data.synthetic.export import export
    from grex_mllm.data.synthetic.settings import SyntheticConfig

    folder = options.out / "scenes"
    if not folder.exists():
        export(
            SyntheticConfig(image_size=load_config(options.config, options.set).data.image_size),
            "test",
            options.scenes,
            folder,
            EXPRESSIONS,
        )
    return folder


def fields(name: str, seed: int, options: argparse.Namespace) -> list[str]:
    """Return the fields of a training beside its steps and its folder."""
    size = [f"--data.train={options.data}", f"--data.image_size={PHOTO_SIZE}", "--data.resize=pad"] if options.data else []
    common = [*size, f"--train.seed={seed}", f"--train.num_threads={options.threads}", "--train.resume=true", *options.set]
    pixels = load_config(options.config, common).data.image_size
    grid = str(pixels // (PHOTO_CELL if options.data else CELL))
    teacher = str(shared.run_folder(options.out, "ReLA", seed))
    own = [change.replace("GRID", grid).replace("TEACHER", teacher) for change in (SYSTEMS | OPTIONS)[name]]
    return [*own, *common]


def count_steps(options: argparse.Namespace) -> dict[str, int]:
    """Return the steps of the systems, timed in turn where steps.json does not have them for these seconds yet."""
    from grex_mllm.training.run import forecast_from_config

    file = options.out / "steps.json"
    known: dict[str, Any] = {"seconds": options.seconds, "step_s": {}, "steps": {}}
    if file.exists():
        known = json.loads(file.read_text(encoding="utf-8"))
    if known["seconds"] != options.seconds:
        raise SystemExit(f"{file} is of {known['seconds']} seconds a run; expected {options.seconds}; choose another --out")
    found: dict[str, list[float]] = {name: [] for name in options.systems if name not in known["steps"]}
    for _ in range(ROUNDS):
        for name, times in found.items():
            folder = options.out / "timing" / name
            config = load_config(options.config, [*fields(name, 0, options), f"--train.out={folder}"])
            times.append(forecast_from_config(config)[0].joint_s / config.train.steps)
    for name, times in found.items():
        known["step_s"][name] = statistics.median(times)
        known["steps"][name] = max(LEAST_STEPS, round(options.seconds / known["step_s"][name]))
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as work:
        work.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return {name: known["steps"][name] for name in options.systems}


def one_run(name: str, seed: int, steps: int, tested: Path, options: argparse.Namespace) -> None:
    """Train, predict, score and measure, each in a process of its own and only where its result is not there yet."""
    run = shared.run_folder(options.out, name, seed)
    if not (run / "model.safetensors").exists():
        given = [*fields(name, seed, options), f"--train.steps={steps}", f"--train.out={run}"]
        shared.grex("train", "--config", str(options.config), *given)
    split = ["--data", str(tested), "--split", "test"]
    if not (run / "predictions.jsonl").exists():
        shared.grex("predict", "--model", str(run), *split, "--tasks", "ground", "--out", str(run / "predictions.jsonl"))
    if not (run / "results.json").exists():
        protocol = ["--protocol", "eval/protocols/all.yaml", "--per_sample"]
        shared.grex("score", str(run / "predictions.jsonl"), *split, *protocol, "--out", str(run / "results.json"))
    if not (run / "cost.json").exists():
        with whole_file(run / "cost.json") as work:
            work.write_text(json.dumps(cost(run, tested, options.threads)) + "\n", encoding="utf-8")


def cost(run: Path, tested: Path, threads: int) -> dict[str, float]:
    """Return weights, operations of one expression (2 for a multiplication and an addition), and the milliseconds of one and of eleven."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from grex_mllm.data.images import load_image
    from grex_mllm.models.grex import GrexModel

    torch.set_num_threads(threads)
    net = GrexModel.from_pretrained(run)
    data = load_dataset(tested)
    record = next(r for r in data.expressions if r.split == "test")
    image = load_image(Path(data.image_root) / data.images[record.image_id].file)
    with FlopCounterMode(display=False) as counter:
        net.ground(image, record.raw)
    found = {"parameters": sum(p.numel() for p in net.parameters()), "flops": float(counter.get_total_flops())}
    for key, number in (("one_ms", 1), ("eleven_ms", TOGETHER)):
        times = []
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            net.ground(image, [record.raw] * number)
            times.append(1000 * (time.perf_counter() - start))
        found[key] = statistics.median(times[1:])
    return found


def read_sums(results: Path, sources: dict[str, str]) -> dict[str, dict[tuple[str, str], np.ndarray]]:
    """Return what every image adds above and below the line to every measure of a run: measure -> (source, image) -> two sums."""
    found: dict[str, dict[tuple[str, str], np.ndarray]] = {}
    columns = {key: next(c for c in entry(task).COLUMNS if c.key == key) for key, task in MEASURES.items()}
    for row in read_run(results).rows.values():
        for key, column in columns.items():
            place = found.setdefault(key, {}).setdefault((sources[row["image_id"]], row["image_id"]), np.zeros(2))
            place += share_of(column, row, "strict")
    return found


def table(tested: Path, steps: dict[str, int], options: argparse.Namespace) -> str:
    """Return the table in Markdown."""
    sources = {record.image_id: record.source for record in load_dataset(tested).expressions}
    costs = ("parameters, M", "GFLOP", "ms, one", f"ms, {TOGETHER}")
    lines = [["system", *MEASURES, *costs, "steps", "seconds"], ["---", *["---:"] * (len(MEASURES) + len(costs) + 2)]]
    for name in options.systems:
        folders = [shared.run_folder(options.out, name, seed) for seed in options.seeds]
        runs = [read_sums(folder / "results.json", sources) for folder in folders]
        cells = [shared.cell(shared.interval(runs, measure)) for measure in MEASURES]
        paid = [json.loads((folder / "cost.json").read_text(encoding="utf-8")) for folder in folders]
        middle = {key: statistics.median(each[key] for each in paid) for key in paid[0]}
        cells += [
            f"{middle['parameters'] / 1e6:.2f}",
            f"{middle['flops'] / 1e9:.2f}",
            f"{middle['one_ms']:.0f}",
            f"{middle['eleven_ms']:.0f}",
        ]
        lines.append([name, *cells, str(steps[name]), f"{statistics.mean(shared.seconds_of(folder) for folder in folders):.0f}"])
    note = f"Percent; mean of the sources, {len(options.seeds)} seeds, [95 % of {shared.DRAWS} draws of seeds and images]."
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", note])


if __name__ == "__main__":
    main()
