"""Graphs as ONNX files: recorded while they run, with sizes, numbers of expressions and of tokens left open."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import torch

from grex_mllm.errors import fault
from grex_mllm.export.decision import ORIGINAL, PICTURE, PLACE
from grex_mllm.export.graphs import IMAGE, TEXT_IDS, TEXT_MASK, Graph

OPSET = 18
NEEDED = ("onnx", "onnxruntime")
MOST_BYTES = 2_000_000_000  # of one file: protobuf holds no more


def check_installed() -> None:
    """Raise where a package is missing.

    Raises:
        GrexError: names it and how to install it.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise fault(f"grex export --format onnx without {', '.join(missing)}", "the extra `export`", "pip install 'grex-mllm[export]'")


def write_onnx(work: Path, graph: Graph, varies: bool, axes: dict[str, dict[int, str]] | None = None) -> list[str]:
    """Write NAME.onnx and return the inputs that it reads.

    varies: height and width of the image stay open; those of a picture, and the numbers of expressions and tokens, always do.  axes: of
    each input, the sizes that stay open (None: those of the grounding model).
    The recorder is torch's older one. The newer (`dynamo=True`) takes minutes for what this does in seconds, with open sizes.
    """
    name, module, example, inputs, outputs = graph
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    if size > MOST_BYTES:
        raise fault(f"a model of {size / 1e9:.1f} GB", "at most 2 GB in one ONNX file", "use --format torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the older recorder, and of sizes that became constants: the check that follows finds them
        torch.onnx.export(
            module,
            example,
            str(work / f"{name}.onnx"),
            dynamo=False,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=_grounding_axes(graph, varies) if axes is None else axes,
        )
    import onnx

    written = onnx.load(str(work / f"{name}.onnx"))
    onnx.checker.check_model(written)
    return [entry.name for entry in written.graph.input]


def _grounding_axes(graph: Graph, varies: bool) -> dict[str, dict[int, str]]:
    name, _, example, inputs, _ = graph
    axes: dict[str, dict[int, str]] = {}
    for given, tensor in zip(inputs, example):
        if given in (TEXT_IDS, TEXT_MASK):
            axes[given] = {0: "expressions", 1: "tokens"} if name != "whole" else {1: "tokens"}
        elif given == PICTURE:
            axes[given] = {0: "picture_height", 1: "picture_width"}
        elif varies and given not in (PLACE, ORIGINAL):
            axes[given] = {i: f"{given}_{i}" for i in (range(2, 4) if given == IMAGE else range(1, tensor.dim()))}
    return axes
