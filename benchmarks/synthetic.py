"""Measure how fast synthetic samples are drawn: one thread, warm, image and masks and 8 expressions each.

Time is the processor time of this one thread, so that other programs on the machine do not count.

python benchmarks/synthetic.py [--scenes 500] [--repeats 7] [--profile]
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time

from grex_mllm.data.synthetic import SyntheticDataset
from grex_mllm.data.synthetic.settings import SyntheticConfig

WARM_UP = 2500  # scenes; fills the cache of rasterised shapes


def scenes_per_second(size: int, scenes: int, repeats: int, expressions: int) -> list[float]:
    """Return the rate of every repeat, each over other scenes."""
    dataset = SyntheticDataset(SyntheticConfig(image_size=size), "train", 1 << 40, expressions)
    for index in range(WARM_UP):
        dataset[index]
    rates = []
    for repeat in range(repeats):
        first = WARM_UP + repeat * scenes
        start = time.process_time()
        for index in range(first, first + scenes):
            dataset[index]
        rates.append(scenes / (time.process_time() - start))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="show where the time goes at 96 px instead")
    options = parser.parse_args()
    if options.profile:
        profile = cProfile.Profile()
        profile.runcall(scenes_per_second, 96, options.scenes, 1, 8)
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        return
    print(f"{'pixels':>6} {'expressions':>11} {'scenes/s (median)':>18} {'least':>7} {'most':>7}")
    for size in (96, 128):
        for expressions in (0, 8):
            rates = scenes_per_second(size, options.scenes, options.repeats, expressions)
            print(f"{size:>6} {expressions:>11} {statistics.median(rates):>18,.0f} {min(rates):>7,.0f} {max(rates):>7,.0f}")


if __name__ == "__main__":
    main()
