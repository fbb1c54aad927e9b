"""The verb `grex convert`: rela, swin, resnet, check, adapters; coco, label_studio, from_label_studio."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grex_mllm.errors import fault

EXCHANGES = {  # kind -> the paths that it reads
    "coco": "predictions.jsonl and its dataset folder",
    "label_studio": "predictions.jsonl and its dataset folder",
    "from_label_studio": "Label Studio's JSON export and the dataset folder that its tasks were made of",
}


def run_convert(
    kind: str, source: list[str], out: str | None = None, config: str | None = None, vocab: str | None = None, *, merged: bool = False
) -> int:
    """Convert or compare, print what became of it, and return the exit status (1 where a comparison disagrees).

    Raises:
        GrexError: unknown kind, wrong number of paths, an option that the kind does not have, or what the conversion raises.
    """
    if merged and kind != "adapters":
        raise fault(f"grex convert {kind} with --merged", "only the options that it has", "leave it out")
    if kind == "check":
        _only(kind, source, 2, {"--out": out, "--config": config, "--vocab": vocab})
        from grex_mllm.convert.check import convert_check

        return 0 if convert_check(source[0], source[1]) else 1
    if kind in EXCHANGES:
        _only(kind, source, 2, {"--config": config, "--vocab": vocab})
        if out is None:
            raise fault(f"grex convert {kind} without --out", "where the result goes", "add --out")
        print("\n".join(_exchange(kind)(source[0], source[1], out)))
        return 0
    if kind not in ("rela", "swin", "resnet", "adapters"):
        known = f"adapters, rela, swin, resnet, check, {', '.join(EXCHANGES)}"
        raise fault(f"grex convert {kind}", known, "see grex convert --help")
    _only(kind, source, 1, {} if kind == "rela" else {"--config": config, "--vocab": vocab})
    if out is None:
        raise fault(f"grex convert {kind} without --out", "where the result goes", "add --out")
    done: Any
    if kind == "adapters":
        from grex_mllm.convert.adapters import export_adapters

        done = export_adapters(source[0], out, merged)
    elif kind == "rela":
        from grex_mllm.convert.rela import convert_rela

        done = convert_rela(source[0], out, config, vocab)
    elif kind == "resnet":
        from grex_mllm.convert.resnet import convert_resnet

        done = convert_resnet(source[0], out)
    else:
        from grex_mllm.convert.swin import convert_swin

        done = convert_swin(source[0], out)
    print("\n".join(done.lines()))
    return 0


def _exchange(kind: str) -> Callable[[str, str, str], list[str]]:
    if kind == "coco":
        from grex_mllm.exchange.coco import write_coco

        return write_coco
    from grex_mllm.exchange.label_studio import read_annotations, write_tasks

    return write_tasks if kind == "label_studio" else read_annotations


def _only(kind: str, source: list[str], wanted: int, foreign: dict[str, str | None]) -> None:
    if len(source) != wanted:
        what = "a checkpoint or model folder" if wanted == 1 else "a model folder and a folder of recorded tensors"
        what = EXCHANGES.get(kind, what)
        raise fault(f"grex convert {kind} with {len(source)} paths", what, "see grex convert --help")
    given = [name for name, value in foreign.items() if value is not None]
    if given:
        raise fault(f"grex convert {kind} with {', '.join(given)}", "only the options that it has", "leave them out")
