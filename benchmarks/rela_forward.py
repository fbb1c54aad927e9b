"""Time and memory of the full-size ReLA models at 480 x 480 on CPU: one expression, eleven expressions of one image, a training step.

    python benchmarks/rela_forward.py                                    # this checkout alone
    git worktree add --detach ../before b8d97eb
    python benchmarks/rela_forward.py --baseline ../before               # in turn with this project at another commit
    python benchmarks/rela_forward.py --authors ../ReLA                  # in turn with the authors' code
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/rela_forward.py   # as plain laptops

Every measurement is a process of its own, and the checkouts take turns (A B A B ...), so that a machine that others use as well burdens
all alike: trust the ratios. A process runs once to warm up and then `--inner` times; the median over all processes is printed with the
quartiles, and the highest resident memory (the whole process, imports and weights included). Weights, image and words are random: times
do not depend on them. `--clock cpu` counts processor seconds of all threads; take it with `--threads 1` on a machine that is never quiet.

A training step is forward pass, losses, backward pass, clipping and AdamW of the released configuration, in float32, on `--batch` images.

`--authors CHECKOUT` needs the authors' repository (github.com/henghuiding/ReLA) with detectron2, detectron2's DeepLab project and their
other requirements installed beside this package, and BERT's weights where their configuration looks for them. Their deformable attention
runs through its pure PyTorch form where the compiled one is absent. This way was written from their public code and has not been run
by us here, because detectron2 does not install beside the torch of this project; plain AdamW stands for their optimizer.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent.parent
MODELS = ("swin_base", "swin_tiny", "r50")
AUTHORS_CONFIGS = {"swin_base": "referring_swin_base", "swin_tiny": "referring_swin_tiny", "r50": "referring_R50"}
TASKS = {"one": "one expression", "many": "eleven expressions of one image", "step": "training step"}
MANY = 11
NUM_TOKENS = 20
VOCABULARY = 30522
OFFSETS_STD = 0.02  # spreads the sampling points, which start in a regular star
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def our_task(name: str, task: str, args: argparse.Namespace) -> Callable[[], object]:
    """Build a model of the checkout on PYTHONPATH with random weights, and return what is to be timed."""
    import torch
    from torch import nn

    from grex_mllm.config import load_config
    from grex_mllm.models import build_grounding
    from grex_mllm.models.grounding import upsample_logits
    from grex_mllm.training.optim import build_optimizer, clip_gradients, optimized_parameters

    config = load_config(str(Path(args.worker) / "configs" / f"gres_rela_{name}.yaml"))
    config.model.vision.weights = config.model.text.path = None
    model: Any = build_grounding(config.model)
    for layer in model.pixel_decoder.layers:
        nn.init.normal_(layer.attention.sampling_offsets.weight, std=OFFSETS_STD)
    image, ids, mask = made_inputs(task, args)
    if task == "step":
        model.train()
        loss, optimizer = criterion_of(config), build_optimizer(model, config.train.optim)
        trained, batch = optimized_parameters(optimizer), made_targets(args)

        def step() -> None:
            output = model(image, torch.arange(len(image)), ids, mask)
            loss(output, batch)["total"].backward()  # type: ignore[arg-type]
            clip_gradients(trained, config.train.optim.clip)
            optimizer.step()
            model.zero_grad()

        return step
    model.eval()

    @torch.inference_mode()
    def ground() -> None:
        features = model.encode_image(image)
        output = model.ground(features, torch.zeros(len(ids), dtype=torch.int64), ids, mask)
        upsample_logits(output.mask_logits, features.padded_size).sigmoid()

    return ground


def authors_task(name: str, task: str, args: argparse.Namespace) -> Callable[[], object]:
    """Build the authors' model from their checkout, and return what is to be timed.

    Raises:
        GrexError: their checkout, detectron2 or another of their requirements is not there.
    """
    import torch

    from grex_mllm.errors import fault

    checkout = Path(args.worker)
    file = checkout / "configs" / f"{AUTHORS_CONFIGS[name]}.yaml"
    if not file.is_file() or not (checkout / "gres_model").is_dir():
        raise fault(f"--authors {checkout}", "a checkout of the authors' ReLA (gres_model/, configs/)", "clone it, or leave --authors out")
    sys.path.insert(0, str(checkout))
    try:
        from detectron2.config import get_cfg
        from detectron2.modeling import build_model
        from detectron2.projects.deeplab import add_deeplab_config
        from detectron2.structures import Instances
        from gres_model import add_maskformer2_config, add_refcoco_config
    except ImportError as error:
        raise fault(f"--authors without {error.name}", "detectron2 and the authors' requirements", "install them as well") from None
    settings = get_cfg()
    for add in (add_deeplab_config, add_maskformer2_config, add_refcoco_config):
        add(settings)
    settings.merge_from_file(str(file))
    settings.MODEL.DEVICE, settings.MODEL.WEIGHTS = "cpu", ""
    model: Any = build_model(settings).train(task == "step")
    image, ids, mask = made_inputs(task, args)
    samples = []
    for e in range(len(ids)):
        picture = image[e if len(image) > 1 else 0]
        instances = Instances((args.size, args.size))
        instances.gt_classes = torch.zeros(1, dtype=torch.int64)
        instances.gt_masks = made_targets(args).gt_masks[:1]
        words = {"lang_tokens": ids[e : e + 1], "lang_mask": mask[e : e + 1]}
        samples.append({"image": picture, "gt_mask_merged": instances.gt_masks.long(), "empty": False, "instances": instances, **words})
    if task == "step":
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.05)

        def step() -> None:
            sum(model(samples).values()).backward()
            torch.nn.utils.clip_grad_norm_(trained, 0.01)
            optimizer.step()
            model.zero_grad()

        return step

    @torch.inference_mode()
    def ground() -> None:
        for sample in samples:  # their code answers one expression at a time
            model([sample])

    return ground


def criterion_of(config: Any) -> Any:
    """Return the losses of ReLA, of this checkout or of one from before decoders had their own."""
    if hasattr(config.loss, "mask"):
        from grex_mllm.training.losses import ReLALoss  # type: ignore[import-not-found]

        return ReLALoss(config.loss)
    from grex_mllm.entries import entry

    return entry("model.decoder", config.model.decoder.name).Criterion(config.model.decoder)


def made_inputs(task: str, args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Return uint8 images [B, 3, H, W] and int64 ids and mask [E, L] of a task."""
    import torch

    images = args.batch if task == "step" else 1
    image = torch.randint(0, 256, (images, 3, args.size, args.size), dtype=torch.uint8)
    ids = torch.randint(1, VOCABULARY, (MANY if task == "many" else images, NUM_TOKENS))
    return image, ids, torch.ones_like(ids)


def made_targets(args: argparse.Namespace) -> SimpleNamespace:
    """Return what the losses read of a batch: one rectangle an image."""
    import torch

    masks = torch.zeros(args.batch, args.size, args.size, dtype=torch.bool)
    masks[:, args.size // 4 : args.size // 2, args.size // 4 : args.size // 2] = True
    return SimpleNamespace(gt_masks=masks, no_target=torch.zeros(args.batch, dtype=torch.bool))


def work(args: argparse.Namespace) -> None:
    """Measure one task of one model in this process and print {"seconds": [...], "peak_gib"} as the last line."""
    import torch

    from grex_mllm.errors import GrexError
    from grex_mllm.training.engine import determinism

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock, seconds = CLOCKS[args.clock], []
    try:
        task = (authors_task if args.is_authors else our_task)(args.models[0], args.tasks[0], args)
    except GrexError as error:
        sys.exit(str(error))
    with determinism(torch.device("cpu")):  # as training runs on CPU
        for repeat in range(args.inner + 1):
            start = clock()
            task()
            if repeat:  # the first run warms up
                seconds.append(clock() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "peak_gib": peak}))


def one_process(checkout: Path, is_authors: bool, name: str, task: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run `work` in a process that imports the package from `checkout` (ours beside the authors' code) and return what it printed."""
    options = [f"--{key}={getattr(args, key)}" for key in ("threads", "inner", "size", "batch", "clock")]
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(checkout), "--models", name, "--tasks", task, *options]
    package = HERE if is_authors else checkout
    environment = {**os.environ, "PYTHONPATH": str(package)}
    done = subprocess.run(
        [*command, *(["--is-authors"] if is_authors else [])], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{checkout}, {name}, {task}: {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(name: str, task: str, ways: dict[str, tuple[Path, bool]], args: argparse.Namespace) -> None:
    """Print one table: every way in turn, medians, quartiles, peak memory and how many times as long as ours it takes."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peaks = dict.fromkeys(ways, 0.0)
    for _ in range(args.repeats):
        for way, (checkout, is_authors) in ways.items():
            result = one_process(checkout, is_authors, name, task, args)
            seconds[way] += result["seconds"]
            peaks[way] = max(peaks[way], result["peak_gib"])
    images = f", {args.batch} image(s)" if task == "step" else ""
    print(f"\n{name}, {TASKS[task]}{images}: {args.size} x {args.size}, {args.threads} thread(s), {args.clock} seconds")
    ours = statistics.median(seconds["this checkout"])
    for way, measured in seconds.items():
        low, middle, high = statistics.quantiles(measured, n=4, method="inclusive") if len(measured) > 1 else measured * 3
        print(f"  {way:14s} {middle:7.2f} ({low:.2f} .. {high:.2f})  {middle / ours:5.2f}x ours  peak {peaks[way]:.2f} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--baseline", type=Path, help="checkout of this project at another commit")
    parser.add_argument("--authors", type=Path, help="checkout of the authors' code; see above for what it needs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each checkout")
    parser.add_argument("--inner", type=int, default=2, help="measured runs in each process")
    parser.add_argument("--batch", type=int, default=2, help="images of a training step")
    parser.add_argument("--size", type=int, default=480)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: seconds of all threads, for a busy machine")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--is-authors", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    ways = {"this checkout": (HERE, False)}
    for way, folder, mark in (("baseline", args.baseline, "grex_mllm"), ("authors", args.authors, "gres_model")):
        if folder is None:
            continue
        if not (folder / mark).is_dir():
            parser.error(f"--{way} {folder} has no folder {mark}; expected a checkout of that code; give its top folder")
        ways[way] = (folder.resolve(), way == "authors")
    for name in args.models:
        for task in args.tasks:
            measure(name, task, ways, args)


if __name__ == "__main__":
    main()
