"""What each idea brings on photographs at an equal budget: the same data, encoders and seconds, three seeds, intervals.

    python benchmarks/photo_comparison.py --data runs/photos/data --out runs/photo_comparison

First the steps of all variants are timed, in turn and several times over (the machine should do nothing else); the seconds of a run then
are a number of steps (steps.json), so that every schedule ends with its budget and a run can be repeated. Then every variant is trained
with every seed, predicts the test split, and is scored; what is finished is not repeated, what was cut off goes on. The table gives the
mean of the sources, each counting the same, and 95 % intervals from drawing seeds and, within each source, photographs (the same ones for
all rows).

Variants: `rela` (the papers' decoder, here with the same pixel decoder and image encoder; also with plain AdamW), `instance_selection`
(ours), and ours without the relative geometry of regions, with one expression of an image a step, after a third of the time on drawn
scenes; and grounding and generation learned jointly, or each alone in half of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from grex_mllm.compare import read_run, share_of
from grex_mllm.config import load_config
from grex_mllm.data.records import load_dataset
from grex_mllm.job import RULES, rule_results
from grex_mllm.metrics import entry
from grex_mllm.writing import whole_file

HERE = Path(__file__).resolve().parent
RELA = "--model.decoder={name: rela, width: PIXEL_WIDTH, num_heads: 8, num_layers: 4, feedforward: 512, mask_language_padding: true}"
SCENES = ["--data.train=synthetic", "--data.sources.synthetic.image_size=160"]
ROUNDS, DRAWS, LEAST_STEPS = 3, 2000, 2
MEASURES = {"gIoU": "gres", "N_acc": "gres", "T_acc": "gres", "accuracy": "count", "Pr@F1": "grec"}  # key of a column -> its metric
EXACT = "exact, greedy"  # object sets whose greedy text means exactly them
COLUMNS = (*MEASURES, EXACT)


@dataclass(frozen=True)
class Phase:
    """A part of a run's time. config: ground or joint, which file.  share: of the seconds."""

    config: str
    share: float
    changes: tuple[str, ...] = ()


VARIANTS: dict[str, list[Phase]] = {
    "instance_selection": [Phase("ground", 1.0)],
    "rela": [Phase("ground", 1.0, (RELA,))],
    "rela, AdamW": [Phase("ground", 1.0, (RELA, "--train.optim.muon=false"))],
    "without geometry": [Phase("ground", 1.0, ("--model.decoder.name=without_geometry",))],
    "one expression an image": [Phase("ground", 1.0, ("--data.expressions_per_image=1",))],
    "scenes first": [Phase("ground", 1 / 3, tuple(SCENES)), Phase("ground", 2 / 3)],
    "joint": [Phase("joint", 1.0)],
    "grounding alone, half the time": [Phase("joint", 0.5, ("--train.tasks=ground",))],
    "generation alone, half the time": [Phase("joint", 0.5, ("--train.tasks=generate",))],
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="dataset folder of data_prep/coco_templates.py, splits train and test")
    parser.add_argument("--out", type=Path, default=Path("runs/photo_comparison"))
    parser.add_argument("--seconds", type=float, default=1200.0, help="of the training of a run (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--ground", default="configs/photos_ground.yaml", help="configuration of grounding alone")
    parser.add_argument("--joint", default="configs/photos.yaml", help="configuration of both tasks")
    options = parser.parse_args(arguments)
    files = {"ground": options.ground, "joint": options.joint}
    steps = count_steps(options, files)
    for seed in options.seeds:
        for name in options.variants:
            one_run(name, seed, steps[name], files, options)
    for rule in RULES:
        rule_results(rule, options.data, "test", options.out / "rules")
    text = table(options.out, options.variants, options.seeds, options.data)
    (options.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def count_steps(options: argparse.Namespace, files: dict[str, str]) -> dict[str, list[int]]:
    """Return the steps of every phase of the variants, timed in turn where steps.json does not have them for these seconds yet."""
    from grex_mllm.training.run import forecast_from_config

    sys.path.insert(0, str(HERE))  # without_geometry
    file = options.out / "steps.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"seconds": options.seconds, "step_s": {}, "steps": {}}
    if known["seconds"] != options.seconds:
        raise SystemExit(f"{file} is of {known['seconds']} seconds a run; expected {options.seconds}; choose another --out")
    open_ones = [name for name in options.variants if name not in known["steps"]]
    found: dict[str, list[list[float]]] = {name: [[] for _ in VARIANTS[name]] for name in open_ones}
    for _ in range(ROUNDS):
        for name in open_ones:
            for place, phase in enumerate(VARIANTS[name]):
                config = load_config(
                    files[phase.config], [*fields(phase, 0, files, options), f"--train.out={options.out / 'timing' / name}"]
                )
                forecast, _ = forecast_from_config(config)
                found[name][place].append(forecast.joint_s / config.train.steps)
    for name in open_ones:
        known["step_s"][name] = [median(times) for times in found[name]]
        budget = [options.seconds * phase.share for phase in VARIANTS[name]]
        known["steps"][name] = [max(LEAST_STEPS, round(s / step)) for s, step in zip(budget, known["step_s"][name], strict=True)]
    with whole_file(file) as work:
        work.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return {name: known["steps"][name] for name in options.variants}


def fields(phase: Phase, seed: int, files: dict[str, str], options: argparse.Namespace) -> list[str]:
    """Return the fields of a training of a phase beside its steps; its own changes come last."""
    own, first = (load_config(files[name]).model for name in (phase.config, "ground"))
    parts = {"text.path": first.text.path, "text.tokenizer": first.text.tokenizer, "vision.weights": first.vision.weights}
    missing = parts if own.text.path is None and own.text.tokenizer is None else {}  # a later stage has them from its start
    given = [f"--model.{name}={value}" for name, value in missing.items() if value is not None]
    width = str(own.pixel_decoder.width)  # which rela shares
    common = [f"--data.train={options.data}", f"--train.seed={seed}", f"--train.num_threads={options.threads}", "--train.resume=true"]
    return [*common, *given, *(change.replace("PIXEL_WIDTH", width) for change in phase.changes)]


def run_folder(out: Path, name: str, seed: int) -> Path:
    """Return the folder of a run."""
    return out / f"{name.replace(' ', '_').replace(',', '')}-{seed}"


def one_run(name: str, seed: int, steps: list[int], files: dict[str, str], options: argparse.Namespace) -> None:
    """Train, predict and score, each in a process of its own and only where its result is not there yet."""
    run = run_folder(options.out, name, seed)
    start: list[str] = []
    for place, (phase, number) in enumerate(zip(VARIANTS[name], steps, strict=True)):
        folder = run if place == len(steps) - 1 else run / f"phase{place}"
        if not (folder / "model.safetensors").exists():
            given = [*fields(phase, seed, files, options), f"--train.steps={number}", f"--train.out={folder}", *start]
            grex("train", "--config", files[phase.config], *given)
        start = [f"--train.start={folder}"]
    predictions, results = run / "predictions.jsonl", run / "results.json"
    split = ["--data", str(options.data), "--split", "test"]
    if not predictions.exists():
        grex("predict", "--model", str(run), *split, "--tasks", predicted_tasks(name), "--out", str(predictions))
    if not results.exists():
        protocol = ["--protocol", "eval/protocols/all.yaml", "--per_sample"]
        grex("score", str(predictions), *split, *protocol, "--out", str(results))


def predicted_tasks(name: str) -> str:
    """Return what a variant has learned."""
    return "generate" if "generation alone" in name else "ground,generate" if name == "joint" else "ground"


def grex(*arguments: str) -> None:
    """Run a verb in a process of its own, with the variants' own module allowed."""
    print(" ".join(("grex", *arguments)), flush=True)
    paths = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "GREX_MODULES": "without_geometry", "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-m", "grex_mllm", *arguments], check=True, env=environment)


Sums = dict[str, dict[tuple[str, str], np.ndarray]]  # measure -> (source, image) -> what its rows add above and below the line


def read_sums(results: Path, predictions: Path, sources: dict[str, str]) -> Sums:
    """Return what every photograph adds to every measure of a run; a measure that the run does not answer is left out."""
    found: Sums = {}

    def add(measure: str, image: str, above: float, below: float) -> None:
        place = found.setdefault(measure, {}).setdefault((sources[image], image), np.zeros(2))
        place += (above, below)

    columns = {key: next(c for c in entry(task).COLUMNS if c.key == key) for key, task in MEASURES.items()}
    for row in read_run(results).rows.values():
        for key, column in columns.items():
            if any(name in row.get("strict", {}) for name in ("iou", "f1")):
                add(key, row["image_id"], *share_of(column, row, "strict"))
    with predictions.open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            if "targets" in line and "image_id" in line:
                add(EXACT, line["image_id"], float(line.get("judgement") == "exact"), 1.0)
    return found


def interval(runs: list[Sums], measure: str, seed: int = 0) -> tuple[float, float, float] | None:
    """Return mean and 95 % interval, percent, of the mean over sources; None where no run has the measure.

    Drawn: the runs (seeds) with replacement, and within each source its photographs, the same ones for every caller with this seed.
    """
    runs = [run for run in runs if measure in run]
    if not runs:
        return None
    dice, images = np.random.default_rng(seed), sorted(runs[0][measure])
    groups = [[n for n, key in enumerate(images) if key[0] == source] for source in sorted({source for source, _ in images})]
    values = np.array([[run[measure].get(key, np.zeros(2)) for key in images] for run in runs])  # [runs, images, 2]
    weights = np.zeros((DRAWS + 1, len(images)))
    weights[0] = 1  # the runs as they are
    for group in groups:
        weights[1:, group] = dice.multinomial(len(group), np.full(len(group), 1 / len(group)), DRAWS)
    with np.errstate(divide="ignore", invalid="ignore"):
        of_sources = [weights[:, g] @ values[:, g, 0].T / (weights[:, g] @ values[:, g, 1].T) for g in groups]  # each [draws, runs]
        each = np.nanmean(np.array(of_sources), axis=0)
    picked = dice.integers(0, len(runs), (DRAWS, len(runs)))
    drawn = np.take_along_axis(each[1:], picked, axis=1).mean(axis=1)
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(100 * each[0].mean()), float(100 * low), float(100 * high)


def seconds_of(run: Path) -> float:
    """Return the seconds of a training by its log, those of every call added up, phases included."""
    total = 0.0
    for file in (run / "log.jsonl", *run.glob("phase*/log.jsonl")):
        last = 0.0
        for line in file.read_text(encoding="utf-8").splitlines():
            now = json.loads(line)["elapsed_s"]
            total, last = total + (last if now < last else 0.0), now
        total += last
    return total


def table(out: Path, variants: list[str], seeds: list[int], data: Path) -> str:
    """Return the table in Markdown: mean over sources and seeds with intervals, steps and seconds of a run; the rules below."""
    sources = {record.image_id: record.source for record in load_dataset(data).expressions}
    steps = json.loads((out / "steps.json").read_text(encoding="utf-8"))["steps"]
    lines = [["variant", *COLUMNS, "steps", "seconds"], ["---", *["---:"] * (len(COLUMNS) + 2)]]
    for name in variants:
        folders = [run_folder(out, name, seed) for seed in seeds]
        runs = [read_sums(folder / "results.json", folder / "predictions.jsonl", sources) for folder in folders]
        spent = [seconds_of(folder) for folder in folders]
        lines.append([name, *(cell(interval(runs, measure)) for measure in COLUMNS)])
        lines[-1] += [" + ".join(map(str, steps[name])), f"{sum(spent) / len(spent):.0f}"]
    for rule in RULES:
        runs = [read_sums(out / "rules" / f"{rule}.json", out / "rules" / f"{rule}.jsonl", sources)]
        lines.append([rule, *(cell(interval(runs, measure)) for measure in COLUMNS), "-", "-"])
    note = f"Percent; mean of the sources, {len(seeds)} seeds, [95 % of {DRAWS} draws of seeds and photographs]."
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", note])


def cell(found: tuple[float, float, float] | None) -> str:
    """Return mean and interval as a cell of the table."""
    return "-" if found is None else f"{found[0]:.1f} [{found[1]:.1f}, {found[2]:.1f}]"


if __name__ == "__main__":
    main()
