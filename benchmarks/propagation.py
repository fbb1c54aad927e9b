"""Time ISFP's propagation against eight 3x3 convolutions of the same size, forward and backward.

Four paths of two passes each over a grid of S x S cells with C channels; at most three times the convolutions are wanted. Both run in turn,
the medians are compared.

python benchmarks/propagation.py [--side 13] [--width 256] [--batch 8] [--threads 2] [--repeats 9] [--device cpu]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from grex_mllm.models.decoders.isfp.propagation import Propagation

NUM_CONVOLUTIONS = 8


def seconds(run: Callable[[], Tensor], device: torch.device, backward: bool) -> float:
    """Return the wall seconds of one run."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        out = run()
    if backward:
        out.sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"side": 13, "width": 256, "batch": 8, "threads": 2, "repeats": 9}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    paths = Propagation(options.width, options.side, 0.3).to(device)
    convolutions = nn.Sequential(*(nn.Conv2d(options.width, options.width, 3, padding=1) for _ in range(NUM_CONVOLUTIONS))).to(device)
    cells = torch.randn(options.batch, options.side**2, options.width, device=device, requires_grad=True)
    grid = torch.randn(options.batch, options.width, options.side, options.side, device=device, requires_grad=True)
    for backward in (False, True):
        times: dict[str, list[float]] = {"propagation": [], "convolutions": []}
        for _ in range(options.repeats + 1):
            times["propagation"].append(seconds(lambda: paths(cells), device, backward))
            times["convolutions"].append(seconds(lambda: convolutions(grid), device, backward))
        ours, theirs = (1000 * statistics.median(values[1:]) for values in times.values())
        what = "forward and backward" if backward else "forward"
        print(f"{what}: propagation {ours:.1f} ms, eight 3x3 convolutions {theirs:.1f} ms, ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
