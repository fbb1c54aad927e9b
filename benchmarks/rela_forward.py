"""Time the evaluation forward of the full-size ReLA models at 480 x 480, by part, against the plain grid_sample attention.

    python benchmarks/rela_forward.py                       # three models, batch 1, two threads, one expression
    python benchmarks/rela_forward.py --models r50 --expressions 11

Both are measured in turn in the same run. Weights are random (times do not depend on them). Prints medians and the spread (quartiles) in
seconds. `authors` are the times of the released code on a machine of the same kind (wall clock, two threads).

Measured 2026-11 on two AVX-512 cores, median (quartiles) in seconds; authors' code; plain grid_sample attention in our model:
    swin_base  1.22 (1.21 .. 1.24)   2.08   1.64    vision 0.75  pixel decoder 0.34 (deformable 0.05)  decoder 0.08  text 0.04
    swin_tiny  0.72 (0.69 .. 0.72)   1.39   1.10    vision 0.26  pixel decoder 0.33 (deformable 0.05)  decoder 0.08  text 0.04
    r50        0.63 (0.62 .. 0.65)   1.19   0.99    vision 0.17  pixel decoder 0.35 (deformable 0.06)  decoder 0.07  text 0.05
Peak memory with Swin-B 1.6 GiB (authors 1.8 GB). Eleven expressions of one image, R50, in processor seconds: 1.76 together, 11.9 apart.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grex_mllm.config import DecoderConfig, ModelConfig, VisionConfig
from grex_mllm.models import build_grounding, deformable
from grex_mllm.models.grounding import GroundingModel, upsample_logits
from grex_mllm.ops.deform_attn import deformable_attention, deformable_attention_reference

MODELS = {
    "swin_base": VisionConfig(name="swin", embed_width=128, swin_depths=[2, 2, 18, 2], swin_heads=[4, 8, 16, 32], window=12, fusion="pwam"),
    "swin_tiny": VisionConfig(name="swin", embed_width=96, swin_depths=[2, 2, 6, 2], swin_heads=[3, 6, 12, 24], window=7, fusion="pwam"),
    "r50": VisionConfig(),
}
AUTHORS = {"swin_base": 2.08, "swin_tiny": 1.39, "r50": 1.19}
PARTS = ("vision", "pixel_decoder", "deformable_attention", "decoder", "text")
NUM_TOKENS = 20
VOCABULARY = 30522
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def build(name: str) -> GroundingModel:
    """Build a full-size model with random weights whose sampling points are spread."""
    torch.manual_seed(0)
    model = build_grounding(ModelConfig(vision=MODELS[name], decoder=DecoderConfig(boxes=False, count=False))).eval()
    for layer in model.pixel_decoder.layers:
        nn.init.normal_(layer.attention.sampling_offsets.weight, std=0.02)
    return model


class Stopwatch:
    """Add up the seconds spent in each part of a model, and in the model."""

    def __init__(self, model: GroundingModel, clock: Callable[[], float]) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.clock = clock
        for module, names in ((model.vision, ("forward", "encode_prefix", "finish")), (model.decoder, ("encode", "forward"))):
            for name in names:
                if hasattr(module, name):
                    part = "vision" if module is model.vision else "decoder"
                    setattr(module, name, self._timed(part, getattr(module, name)))
        model.pixel_decoder.forward = self._timed("pixel_decoder", model.pixel_decoder.forward)
        model.text.forward = self._timed("text", model.text.forward)

    def _timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self.clock()
            result = call(*args, **kwargs)
            self.spent[part] += self.clock() - start
            return result

        return timed

    @contextmanager
    def attention(self, kernel: Callable[..., Tensor]) -> Iterator[None]:
        """Let the pixel decoder use this deformable attention, and time it."""
        deformable.deformable_attention = self._timed("deformable_attention", kernel)
        try:
            yield
        finally:
            deformable.deformable_attention = deformable_attention


@torch.inference_mode()
def forward(model: GroundingModel, image: Tensor, ids: Tensor, mask: Tensor, together: bool) -> None:
    """Ground all expressions in the image: with its work shared, or one call each."""
    if together:
        features = model.encode_image(image)
        output = model.ground(features, torch.zeros(len(ids), dtype=torch.int64), ids, mask)
        upsample_logits(output.mask_logits, features.padded_size).sigmoid()
        return
    for e in range(len(ids)):
        forward(model, image, ids[e : e + 1], mask[e : e + 1], True)


def measure(name: str, args: argparse.Namespace) -> None:
    """Print the table of one model: ours and the plain formulation, measured in turn."""
    model = build(name)
    watch = Stopwatch(model, CLOCKS[args.clock])
    image = torch.randint(0, 256, (1, 3, args.size, args.size), dtype=torch.uint8)
    ids = torch.randint(1, VOCABULARY, (args.expressions, NUM_TOKENS))
    mask = torch.ones_like(ids)
    ways: dict[str, tuple[Callable[..., Tensor], bool]] = {
        "ours": (deformable_attention, True),
        "plain": (deformable_attention_reference, True),
    }
    if args.expressions > 1:
        ways["one call each"] = (deformable_attention, False)
    times: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in ways}
    for repeat in range(args.repeats + 1):
        for way, (kernel, together) in ways.items():
            watch.spent.clear()
            with watch.attention(kernel):
                start = watch.clock()
                forward(model, image, ids, mask, together)
                watch.spent["total"] = watch.clock() - start
            if repeat:  # the first run warms up
                for part, seconds in watch.spent.items():
                    times[way][part].append(seconds)
    print(f"\n{name}: {args.size} x {args.size}, {args.expressions} expression(s), {args.threads} threads, {args.clock} seconds")
    for way, parts in times.items():
        cells = [f"{part} {statistics.median(parts[part]):.3f}" for part in PARTS if parts[part]]
        low, _, high = statistics.quantiles(parts["total"], n=4)
        print(f"  {way:14s} total {statistics.median(parts['total']):.3f} ({low:.3f} .. {high:.3f})  " + "  ".join(cells))
    ours = statistics.median(times["ours"]["total"])
    if args.expressions == 1:
        print(f"  authors        total {AUTHORS[name]:.3f}: {AUTHORS[name] / ours:.2f}x faster than the released code")
    else:
        print(f"  {statistics.median(times['one call each']['total']) / ours:.2f}x faster than one call each")
    print(f"  peak memory of the process so far {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--expressions", type=int, default=1)
    parser.add_argument("--size", type=int, default=480)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: seconds of all threads, for a busy machine")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.models:
        measure(name, args)


if __name__ == "__main__":
    main()
