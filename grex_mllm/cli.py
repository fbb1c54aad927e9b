"""The command line: one function per verb. Heavy packages are imported inside the verbs, so that `grex --help` stays fast."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, get_type_hints

from grex_mllm.arguments import AS_WRITTEN, Place, Places, parsed, split_overrides
from grex_mllm.demo import demo
from grex_mllm.errors import GrexError, fault
from grex_mllm.export.command import card, export
from grex_mllm.search.verb import search
from grex_mllm.serve.command import serve


def train(config: str | None = None, overrides: list[str] | None = None) -> int:
    """Train a model: grex train --config configs/X.yaml --data.train FOLDER --train.out runs/X. Any field of the configuration is a flag.

    Args:
        config: a YAML of configs/.
    """
    from grex_mllm.config import load_config

    settings = load_config(config, overrides)  # before the heavy imports: its faults come at once
    from grex_mllm.training.engine import leave
    from grex_mllm.training.run import train_from_config

    train_from_config(settings)
    leave()
    return 0


def estimate(
    config: str,
    *,
    gpus: int = 1,
    gpu_memory_gb: float = 80.0,
    samples: int | None = None,
    samples_per_s: float | None = None,
    tflops: float | None = None,
    utilisation: float = 0.35,
    objects: int = 8,
    tokens: int = 16,
    device: str = "cuda",
    json: bool = False,
    overrides: list[str] | None = None,
) -> int:
    """Tell what a training would need: parameters, memory of each GPU by ZeRO stage, work and time, and what fits. Needs no weights.

    Args:
        config: a YAML of configs/; its fields are flags, as for train.
        gpus: how many processes share a batch.
        gpu_memory_gb: of one GPU.
        samples: image-expression pairs of an epoch, for its time.
        samples_per_s: a throughput that you know, of all GPUs together.
        tflops: or the speed of one GPU in TFLOP/s, of which a share is used.
        utilisation: that share, above 0 to 1.
        objects: objects of an image.
        tokens: tokens of an expression to generate.
        device: cuda, or cpu for a training on one.
        json: print JSON instead of a table.
    """
    from grex_mllm.estimate.command import Machine, run_estimate

    machine = Machine(gpus, gpu_memory_gb, samples_per_s, tflops, utilisation, device)
    return run_estimate(config, overrides or [], machine, samples=samples, objects=objects, tokens=tokens, as_json=json)


def predict(
    model: str,
    data: str,
    out: str,
    *,
    split: str = "test",
    tasks: str = "ground,generate",
    image_root: str | None = None,
    listener: int = 0,
    limit: int | None = None,
    sample: str | None = None,
    base_url: str | None = None,
    dry_run: bool = False,
    device: str = "auto",
    overrides: list[str] | None = None,
) -> int:
    """Answer every expression and describe every object set of a split; resumable.

    Args:
        model: a model folder or hub id, FAMILY:FOLDER, openai:NAME, always_empty, oracle, largest, replay:FILE, your own module, ...
        data: a dataset folder, or "synthetic": scenes are drawn into the folder x.data beside x.jsonl; give that to grex score --data.
        out: the predictions.jsonl to write; an interrupted run goes on from its .part file.
        split: which split.
        tasks: ground, generate or both with a comma.
        image_root: where the images lie, when not where dataset.json says.
        listener: candidates for the listener-chosen expression; 0 = greedy only.
        limit: only the first images; of synthetic data so many scenes (default: 250); with --sample so many expressions.
        sample: stratified or random: draw --limit expressions into the folder x.data beside x.jsonl; give that to grex score --data.
        base_url: openai: where the server is, as http://localhost:8000/v1; the key comes from the environment (OPENAI_API_KEY).
        dry_run: print the exact requests and what the run would need, and send nothing.
        device: auto, cpu, cuda, cuda:1, ...
        overrides: of FAMILY: and openai:, as --ask.prompt=native (zeroshot/settings.py); of a model folder, its configuration's.
    """
    from grex_mllm.predict import predict_split

    asked = {"base_url": base_url} if base_url is not None else {}
    options = {"image_root": image_root, "listener": listener, "limit": limit, "sample": sample, "device": device, "dry_run": dry_run}
    predict_split(model, data, Path(out), split, tasks.split(","), **options, asked=asked, overrides=overrides or [])  # type: ignore[arg-type]
    return 0


def score(
    predictions: Places,
    data: str,
    split: str,
    *,
    protocol: str | None = None,
    out: str = "results.json",
    per_sample: bool = False,
    allow_missing: bool = False,
    num_processes: int = 1,
    round_trip: str | None = None,
    image_root: str | None = None,
    device: str = "auto",
) -> int:
    """Score predictions of any system and write results.json.

    Args:
        predictions: predictions.jsonl, a COCO results JSON, a folder of PNG masks, or ReLA's .pth; several are read as one.
        data: the dataset folder; for predictions x.jsonl of --data synthetic x.data beside them.
        split: which split.
        protocol: a file of eval/protocols/ (default: all.yaml, every task).
        out: the results file.
        per_sample: also write one row per sample.
        allow_missing: count missing predictions as wrong instead of stopping.
        num_processes: how many processes share the split; the results are the same.
        round_trip: a model folder, or any --model of grex predict, that grounds generated texts whose lines carry no round trip.
        image_root: round_trip: where the images lie, when not where dataset.json says.
        device: round_trip: auto, cpu, cuda.
    """
    from grex_mllm.config import PROTOCOL_FOLDER
    from grex_mllm.score import score as run

    options = {"per_sample": per_sample, "allow_missing": allow_missing, "num_processes": num_processes, "round_trip": round_trip}
    where = protocol or PROTOCOL_FOLDER / "all.yaml"
    run(predictions, data, split, where, out, **options, image_root=image_root, device=device, show=True)  # type: ignore[arg-type]
    return 0


def ground(model: str, image: str, expression: list[str], *, out: str = ".", device: str = "auto", threshold: float | None = None) -> int:
    """Ground expressions in an image: prints JSON and writes an overlay PNG and a mask PNG for each.

    Args:
        model: a model folder or hub id.
        image: an image file.
        expression: one or more expressions.
        out: folder for the pictures.
        device: auto, cpu, cuda.
        threshold: "no target" is said above this probability, 0 to 1 (default: as the model's configuration says).
    """
    from grex_mllm.ask import ground_image

    print(json.dumps(ground_image(model, image, expression, Path(out), device=device, threshold=threshold), indent=2, ensure_ascii=False))
    return 0


def describe(
    model: str,
    image: str,
    *,
    boxes: Annotated[str | None, AS_WRITTEN] = None,
    masks: list[str] | None = None,
    mode: str = "greedy",
    candidates: int = 1,
    rerank: str | None = None,
    seed: int = 0,
    device: str = "auto",
) -> int:
    """Write one expression for a set of objects of an image.

    Args:
        model: a model folder or hub id.
        image: an image file.
        boxes: the objects as xyxy boxes in pixels, "[[x1,y1,x2,y2], ...]".
        masks: the objects as mask PNGs of the image's size.
        mode: greedy, beam or sample.
        candidates: how many to draw for the reranking.
        rerank: listener = choose the candidate that the model grounds best, objects = that picks out the objects best among those that are
            known (decoders that read regions); of mllm also own (likelihoods), own_grounding (its own boxes).
        seed: of the sampling.
        device: auto, cpu, cuda.
    """
    from grex_mllm.ask import describe_objects

    print(
        json.dumps(
            describe_objects(
                model, image, boxes=boxes, masks=masks, mode=mode, candidates=candidates, rerank=rerank, seed=seed, device=device
            ),
            indent=2,
            ensure_ascii=False,
        )
    )
    return 0


def data(
    action: Place,
    folders: Places,
    *,
    image_root: str | None = None,
    out: str | None = None,
    split: str = "test",
    length: int = 500,
    seed: int = 0,
) -> int:
    """Check, describe or make dataset folders: grex data check|stats|export FOLDER ...

    Args:
        action: check (prove every record), stats (counts and a picture sheet), export (write synthetic scenes into the folder).
        folders: dataset folders; several are checked as a mixture, too.
        image_root: where the images lie.
        out: stats: where the picture sheet goes (default FOLDER/samples.png).
        split: export: which synthetic split.
        length: export: how many scenes.
        seed: export: seed of the scenes; stats: of the sheet.
    """
    from grex_mllm.data.command import run_data

    return run_data(action, folders, image_root=image_root, out=out, split=split, length=length, seed=seed)


def convert(
    kind: Place,
    source: Places,
    out: str | None = None,
    config: str | None = None,
    vocab: str | None = None,
    merged: bool = False,
) -> int:
    """Convert: rela FILE --out DIR | swin FILE --out FILE | resnet FILE --out FILE | check MODEL RECORDED | adapters MODEL --out DIR.

    Args:
        kind: rela, swin, resnet, check or adapters (a trained generator's, as a folder that peft reads); coco or label_studio
            (predictions for other tools), from_label_studio (people's corrections as a dataset folder).
        source: the checkpoint; for check: a converted model and a folder of recorded tensors; for adapters: a model folder; for coco and
            label_studio: predictions.jsonl and its dataset folder; for from_label_studio: the JSON export and that dataset folder.
        out: where the result goes.
        config: sizes of a model that is none of the released three.
        vocab: BERT's vocab.txt for the model folder.
        merged: adapters: write a copy of the language model with the adapters merged in instead.
    """
    from grex_mllm.convert.command import run_convert

    return run_convert(kind, source, out, config, vocab, merged=merged)


def compare(
    results: Places,
    out: str | None = None,
    format: str = "markdown",
    no_published: bool = False,
    any_protocol: bool = False,
    metric: list[str] | None = None,
    spread: bool = False,
    data: str | None = None,
) -> int:
    """Set results side by side, with paired bootstrap intervals where per-sample rows exist.

    Args:
        results: one or more results.json.
        out: a file instead of the screen.
        format: markdown, latex, csv, or html: one page with models as rows, what asking cost, and pictures of disagreements.
        no_published: leave the published rows out.
        any_protocol: compare in spite of different protocol versions.
        metric: dotted paths of your own metrics, which are imported for their columns.
        spread: add mean and spread over the runs of one model: the same model over several prompts, or seeds.
        data: html: the dataset folder, for the pictures.
    """
    if format == "html":
        from grex_mllm.report.models import write_models_page

        published = not no_published
        page = write_models_page(
            results, out or "models.html", data=data, published=published, any_protocol=any_protocol, metrics=metric or ()
        )
        print(page)
        return 0
    from grex_mllm.compare import compare as run

    if data is not None:
        raise fault(f"--data {data} with --format {format}", "--format html, whose pictures need it", "leave it out")
    text = run(results, format=format, published=not no_published, any_protocol=any_protocol, metrics=metric or (), spread=spread)
    if out is None:
        print(text)
    else:
        Path(out).write_text(text, encoding="utf-8")
    return 0


def errors(results: Place, out: str = "errors", data: str | None = None, predictions: str | None = None) -> int:
    """Tell where the points are lost, with picture sheets of each kind of error.

    Args:
        results: a results.json with per-sample rows.
        out: folder for the sheets.
        data: the dataset folder, for pictures.
        predictions: the predictions, for pictures.
    """
    from grex_mllm.error_analysis import errors as run

    print(run(results, out, data=data, predictions=predictions))
    return 0


def report(run: Place, protocol: str | None = None, data: str | None = None, split: str = "test", unselected: int = 0) -> int:
    """Write report.html of a finished run.

    Args:
        run: the run's folder.
        protocol: the run's protocol file, where it names metrics of your own.
        data: its dataset folder (default: data/ in the run's folder).
        split: which split was predicted.
        unselected: show so many generated texts at even distances instead of random ones.
    """
    from grex_mllm.job import report_run

    print(report_run(Path(run), protocol, data=Path(data) if data else None, split=split, num_unselected=unselected))
    return 0


VERBS: dict[str, Callable[..., int]] = {
    "demo": demo, "train": train, "estimate": estimate, "predict": predict, "score": score, "ground": ground, "describe": describe,
    "data": data, "convert": convert, "compare": compare, "errors": errors, "report": report,
    "export": export, "card": card, "serve": serve, "search": search,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run a verb. Exit status: 0 done, 1 the check found faults, 2 the user's input is at fault."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _write_utf8()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        from grex_mllm import __version__

        print(__version__)
        return 0
    try:
        return _run(arguments[0], arguments[1:])
    except GrexError as error:
        print(f"grex {arguments[0]}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0


def _write_utf8() -> None:
    """Write UTF-8 where the system's own encoding (Windows, into a file or a program) has not every character of an expression."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() not in ("utf-8", "utf8"):
            stream.reconfigure(encoding="utf-8")


def _overview() -> str:
    lines = ["usage: grex VERB [options]     grex VERB --help tells the options", ""]
    lines += [f"  {name:10s} {(verb.__doc__ or '').strip().splitlines()[0]}" for name, verb in VERBS.items()]
    return "\n".join(lines)


def _run(verb: str, arguments: list[str]) -> int:
    if verb not in VERBS:
        import difflib

        near = difflib.get_close_matches(verb, VERBS, n=1)
        raise fault(f'unknown verb "{verb}"', f"one of {', '.join(VERBS)}", f'did you mean "{near[0]}"?' if near else "see grex --help")
    if "overrides" not in get_type_hints(VERBS[verb]):
        return VERBS[verb](**parsed(verb, VERBS[verb], arguments))
    own, overrides = split_overrides(arguments)
    return VERBS[verb](**parsed(verb, VERBS[verb], own), overrides=overrides)


if __name__ == "__main__":
    sys.exit(main())
