"""Graphs as programs of `torch.export`: they run with torch alone, without this package. The image size is the configuration's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grex_mllm.export.graphs import TEXT_IDS, TEXT_MASK, Graph, LanguageGraph

MOST_EXPRESSIONS = 1024


def write_program(work: Path, graph: Graph, varies: bool) -> list[str]:
    """Write NAME.pt2; the numbers of expressions and tokens stay open.

    Raises:
        ValueError: an image size that is to vary: that takes minutes to prove, and what does not fit the proof is refused.
    """
    if varies:
        raise ValueError("one image size")
    name, module, example, inputs, _ = graph
    expressions = torch.export.Dim("expressions", min=1, max=MOST_EXPRESSIONS)
    shapes = [{0: expressions} if given in (TEXT_IDS, TEXT_MASK) and name != "whole" else None for given in inputs]
    program = torch.export.export(module, example, dynamic_shapes=_as_arguments(module, shapes), strict=False)
    torch.export.save(program, str(work / f"{name}.pt2"))
    return inputs


def _as_arguments(module: torch.nn.Module, shapes: list[Any]) -> Any:
    return (*shapes[:2], tuple(shapes[2:])) if isinstance(module, LanguageGraph) else tuple(shapes)


def run_programs(folder: Path, facts: dict[str, Any]) -> dict[str, Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]]:
    """Return the programs of a folder as functions from named arrays to named arrays."""
    programs = {name: torch.export.load(str(folder / f"{name}.pt2")).module() for name in facts["graphs"]}

    def run(name: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        answers = programs[name](*(torch.from_numpy(arrays[key]) for key in facts["graphs"][name]["inputs"]))
        return dict(zip(facts["graphs"][name]["outputs"], (answer.detach().numpy() for answer in answers)))

    return {name: lambda arrays, name=name: run(name, arrays) for name in programs}  # type: ignore[misc]
