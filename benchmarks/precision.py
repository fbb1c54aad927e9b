"""Measure matrix products in float32 and bfloat16 on this machine, and tell what `auto` chooses.

To make an x86-64 processor behave like one without bfloat16 units, set ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
MKL_ENABLE_INSTRUCTIONS=AVX2; the line of 1024 then shows whether it does (bfloat16 at least 20 times slower).

python benchmarks/precision.py [--threads 2] [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from grex_mllm.precision import resolve_precision

SIDES = (128, 256, 512, 1024)


def product_ms(side: int, dtype: torch.dtype, repeats: int) -> float:
    """Return the median milliseconds of a product of two square matrices."""
    matrix = torch.rand(side, side).to(dtype)
    torch.mm(matrix, matrix)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'side':>5} {'float32 ms':>11} {'bfloat16 ms':>12} {'bfloat16/float32':>17}")
    for side in SIDES:
        full, half = (product_ms(side, dtype, options.repeats) for dtype in (torch.float32, torch.bfloat16))
        print(f"{side:>5} {full:>11.3f} {half:>12.3f} {half / full:>17.2f}")
    chosen = resolve_precision("auto", "cpu")
    print(f"auto: {chosen.precision}, because {chosen.reason}")


if __name__ == "__main__":
    main()
