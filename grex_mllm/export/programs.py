"""Graphs as programs of `torch.export`: they run with torch alone, without this package. The image size is the configuration's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grex_mllm.export.decision import PICTURE
from grex_mllm.export.graphs import TEXT_IDS, TEXT_MASK, Graph

MOST_EXPRESSIONS, MOST_PIXELS = 1024, 16384


def write_program(work: Path, graph: Graph, varies: bool) -> list[str]:
    """Write NAME.pt2; the numbers of expressions and tokens stay open.

    Raises:
        ValueError: an image size that is to vary: that takes minutes to prove, and what does not fit the proof is refused.
    """
    if varies:
        raise ValueError("one image size")
    name, module, example, inputs, _ = graph
    expressions = torch.export.Dim("expressions", min=1, max=MOST_EXPRESSIONS)
    height, width = (torch.export.Dim(side, min=1, max=MOST_PIXELS) for side in ("height", "width"))
    open_sizes = {PICTURE: {0: height, 1: width}}
    if name != "whole":
        open_sizes |= {TEXT_IDS: {0: expressions}, TEXT_MASK: {0: expressions}}
    shapes = [open_sizes.get(given) for given in inputs]
    program = torch.export.export(module, example, dynamic_shapes=_as_arguments(module, shapes), strict=False)
    torch.export.save(program, str(work / f"{name}.pt2"))
    return inputs


def _as_arguments(module: torch.nn.Module, shapes: list[Any]) -> Any:
    """Return the shapes as `forward` takes the inputs: what it takes with a star is one tuple."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    starred = parameters[-1].kind is inspect.Parameter.VAR_POSITIONAL
    return (*shapes[: len(parameters) - 1], tuple(shapes[len(parameters) - 1 :])) if starred else tuple(shapes)


def run_program(file: Path, inputs: list[str], outputs: list[str]) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Return a program as a function from named arrays to named arrays. file: its path without the ending."""
    program = torch.export.load(f"{file}.pt2").module()

    def run(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        answers = program(*(torch.from_numpy(arrays[name]) for name in inputs))
        return dict(zip(outputs, (answer.detach().numpy() for answer in answers)))

    return run
