"""A training step of a configuration at full size: seconds, samples, tokens, memory, share of the machine's arithmetic, time by part.

    python benchmarks/train_step.py --config configs/joint_rela_r50.yaml --lm FOLDER
    python benchmarks/train_step.py --config configs/joint_rela_r50.yaml --variant recompute=--model.vision.gradient_checkpointing=true
    python benchmarks/train_step.py --config configs/joint_rela_r50.yaml --baseline ../before      # in turn with another checkout

The real loop trains on synthetic scenes, enlarged to the configuration's image size, with random weights (times do not depend on
them): image and text encoder in the configuration's sizes without their files, and with `--lm` the language model of a folder. Every
measurement is a process of its own; checkouts and variants take turns, so that a machine that others use as well burdens all alike: trust
the ratios. The first two steps of a process warm up; the median of the others is printed with the quartiles, then what one step
multiplies and adds (torch's counter), as a share of what a large matrix product reaches on this machine in the precision of the training,
and the time by part. `--set` adds to all of them, `--variant NAME=FLAG[;FLAG...]` makes another row.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
WARM_UP = 2
SIDE = 4096  # of the matrices whose product stands for what the machine can do


def work(args: argparse.Namespace) -> None:
    """Train some steps in this process and print the measured numbers as JSON in the last line."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from grex_mllm.config import load_config, name_no_parts
    from grex_mllm.training.run import train_from_config

    flags = ["--model.text.tokenizer=train", "--data.train=synthetic", "--data.num_workers=0", f"--train.batch_images={args.batch}"]
    flags += [f"--train.steps={WARM_UP + args.steps + 1}", f"--train.out={args.out}", "--train.precision=auto"]
    flags += ["--train.log_every=1000", "--train.save_every=1000"]
    flags += [f"--train.profile={args.profile}"] if args.profile else []
    flags += [f"--model.generator.lm={args.lm}"] if args.lm else []
    config = load_config(args.config, [*flags, *args.set])
    name_no_parts(config)
    torch.set_num_threads(args.threads)
    ends: list[float] = []
    counter = FlopCounterMode(display=False)

    def on_step(step: int, _losses: dict[str, float]) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        if step == WARM_UP + args.steps:
            counter.__enter__()  # the last step is counted, not timed
        elif step == WARM_UP + args.steps + 1:
            counter.__exit__(None, None, None)

    train_from_config(config, on_step=on_step)
    seconds = [after - before for before, after in pairwise(ends[WARM_UP - 1 : -1])]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"seconds": seconds, "peak_gib": peak / 2**30, "flops": counter.get_total_flops()}
    print(json.dumps(found | {"machine_flops_s": product_flops_s(precision_here())}))


def precision_here() -> str:
    """Return the precision that `auto` finds here."""
    import torch

    from grex_mllm.precision import resolve_precision

    return resolve_precision("auto", torch.device("cuda" if torch.cuda.is_available() else "cpu")).precision


def product_flops_s(precision: str) -> float:
    """Return the floating-point operations a second of a large matrix product, best of five."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = SIDE if device == "cuda" else SIDE // 2
    a = torch.randn(side, side, device=device, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[precision])
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def one_process(checkout: Path, flags: list[str], args: argparse.Namespace, profile: int = 0) -> tuple[dict[str, Any], str]:
    """Run `work` in a process that imports the package of a checkout; return what it printed and the table by part, if any."""
    out = Path(tempfile.mkdtemp())
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", f"--config={checkout / args.config}", f"--out={out / 'run'}"]
    command += [f"--{name}={getattr(args, name)}" for name in ("batch", "steps", "threads")]
    command += [f"--lm={args.lm}"] if args.lm else []
    command += [f"--profile={profile}"] if profile else []
    command += [f"--set={flag}" for flag in [*args.set, *flags]]
    try:
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{checkout}, {flags}: {done.stderr.strip()[-2000:]}")
        table = out / "run" / "profile" / "parts.txt"
        return json.loads(done.stdout.splitlines()[-1]), table.read_text() if table.is_file() else ""
    finally:
        shutil.rmtree(out, ignore_errors=True)


def report(name: str, results: list[dict[str, Any]], base: float, args: argparse.Namespace) -> float:
    """Print one row; return its median seconds."""
    seconds = [value for result in results for value in result["seconds"]]
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    flops, machine = results[0]["flops"], statistics.median(result["machine_flops_s"] for result in results)
    peak = max(result["peak_gib"] for result in results)
    print(
        f"{name:24s} {middle:7.2f} s ({low:.2f} .. {high:.2f})  {(base or middle) / middle:5.2f}x  {args.batch / middle:6.2f} images/s  "
        f"{flops / 1e12:6.2f} TFLOP, {flops / middle / machine:4.0%} of {machine / 1e12:.2f} TFLOP/s  peak {peak:.2f} GiB",
        flush=True,
    )
    return middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/joint_rela_r50.yaml")
    parser.add_argument("--lm", help="folder of a language model, for configurations with a generator")
    parser.add_argument("--batch", type=int, default=2, help="images of a step")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="processes of each row")
    parser.add_argument("--set", action="append", default=[], metavar="FLAG", help="a flag of `grex train` for all rows")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=FLAG[;FLAG...]", help="another row with these flags")
    parser.add_argument("--baseline", type=Path, help="checkout of this project at another commit")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--profile", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    rows: dict[str, tuple[Path, list[str]]] = {"this checkout": (HERE, [])}
    for text in args.variant:
        name, _, flags = text.partition("=")
        rows[name] = (HERE, flags.split(";"))
    if args.baseline:
        rows["baseline"] = (args.baseline.resolve(), [])
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for _ in range(args.repeats):
        for name, (checkout, flags) in rows.items():
            found[name].append(one_process(checkout, flags, args)[0])
    print(f"{args.config}: {args.batch} image(s), {args.threads} thread(s), wall seconds of a step; x: times as fast as the first row")
    base = 0.0
    for name, results in found.items():
        middle = report(name, results, base, args)
        base = base or middle
    print("\n" + one_process(HERE, [], args, profile=max(args.steps - 1, 1))[1])


if __name__ == "__main__":
    main()
