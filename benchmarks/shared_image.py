"""Time eleven expressions of one image answered together and one after the other, for decoders whose image part needs no language.

python benchmarks/shared_image.py --decoders vlt m3att isfp

Plain Swin-T at 480 x 480, random weights. "together" encodes the image once; "apart" is eleven calls with one expression each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch

from grex_mllm.config import load_config
from grex_mllm.models import build_grounding

EXPRESSIONS, TOKENS, VOCABULARY = 11, 20, 30522
SWIN_T = ["embed_width=96", "swin_depths=[2,2,6,2]", "swin_heads=[3,6,12,24]", "window=7", "drop_path=0.0"]
BERT_TINY = ["hidden_size=256", "num_layers=4", "num_heads=4", "intermediate_size=1024"]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def build(decoder: str, small_text: bool, size: int, extra: list[str]) -> torch.nn.Module:
    """Return the grounding model with random weights."""
    changes = [f"--model.decoder.name={decoder}", "--model.vision.name=swin", *(f"--model.vision.{item}" for item in SWIN_T)]
    changes += [f"--model.text.{item}" for item in BERT_TINY] if small_text else []
    changes += ["--model.pixel_decoder.name=fpn_levels", f"--data.image_size={size}", *extra]
    torch.manual_seed(0)
    return build_grounding(load_config(None, changes).model).eval()


@torch.inference_mode()
def times(model: torch.nn.Module, size: int, repeats: int, clock: str) -> tuple[float, float]:
    """Return the median seconds of eleven expressions together, and of eleven calls."""
    now = CLOCKS[clock]
    image = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    ids = torch.randint(1, VOCABULARY, (EXPRESSIONS, TOKENS))
    mask, index = torch.ones_like(ids), torch.zeros(EXPRESSIONS, dtype=torch.int64)
    found: dict[str, list[float]] = {"together": [], "apart": []}
    for repeat in range(repeats + 1):
        start = now()
        model(image, index, ids, mask)
        middle = now()
        for e in range(EXPRESSIONS):
            model(image, index[:1], ids[e : e + 1], mask[:1])
        if repeat:  # the first run warms up
            found["together"].append(middle - start)
            found["apart"].append(now() - middle)
    return statistics.median(found["together"]), statistics.median(found["apart"])


def main() -> int:
    """Print one line for each decoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoders", nargs="+", default=["vlt", "m3att", "isfp"])
    parser.add_argument("--small-text", action="store_true", help="four BERT layers 256 wide in place of BERT-base")
    parser.add_argument("--size", type=int, default=480)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: seconds of all threads, for a busy machine")
    args, extra = parser.parse_known_args()
    torch.set_num_threads(args.threads)
    for decoder in args.decoders:
        together, apart = times(build(decoder, args.small_text, args.size, extra), args.size, args.repeats, args.clock)
        print(
            f"{decoder}: {EXPRESSIONS} together {together:.2f} s, {EXPRESSIONS} calls {apart:.2f} s, {apart / together:.1f} times",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
