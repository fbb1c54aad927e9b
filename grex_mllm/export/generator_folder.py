"""The generator's part of an exported folder: its graphs, its tokenizer, its script, and the comparison with torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grex_mllm.errors import fault
from grex_mllm.export.generator_graphs import (
    LOGITS,
    NEXT,
    PREFIX,
    SEE,
    STEP,
    TOKEN,
    PrefixGraph,
    SeeGraph,
    StepGraph,
    example_objects,
    generator_facts,
    generator_graphs,
)
from grex_mllm.export.graphs import CHOSEN, IMAGE, MASKS, SEEN
from grex_mllm.export.ground import onnx_graph
from grex_mllm.export.onnx_graphs import write_onnx

TOKENIZER = "lm_tokenizer.json"
PLACE = Path(__file__).parent
OBJECTS_AND_SETS = ((7, 4), (2, 1))  # of the comparison: other numbers than those that were recorded
STEPS = 4


def write_generator(model: Any, work: Path, image: Tensor, varies: bool) -> dict[str, Any]:
    """Write the graphs, tokenizer and script of a model's generator and return what the script must know.

    Raises:
        GrexError: a tokenizer that the package `tokenizers` does not read, or a language model that is too large for one file.
    """
    tokenizer = getattr(model.generator.tokenizer.hf, "backend_tokenizer", None)
    if tokenizer is None:
        raise fault("a generator's tokenizer that only Python runs", "one of the package tokenizers", "export with --task ground")
    tokenizer.save(str(work / TOKENIZER))
    shutil.copy(PLACE / "describe.py", work / "describe.py")
    graphs = {}
    for graph, axes in generator_graphs(model, image, varies):
        graphs[graph[0]] = {"inputs": write_onnx(work, graph, varies, axes), "outputs": graph[-1]}
    return {"graphs": graphs, **generator_facts(model.generator)}


@torch.no_grad()
def compared_logits(
    model: Any, exact: Any, folder: Path, facts: dict[str, Any], images: dict[tuple[int, int], Tensor]
) -> list[tuple[Any, ...]]:
    """Return logits [E, V] of the first tokens that torch writes for objects of some images: exported, torch's, and `exact`'s or None.

    exact: the model in float64, or None.  images: normalised, by their sizes before padding.
    """
    graphs, rows = {name: onnx_graph(folder / name, **ends) for name, ends in facts["graphs"].items()}, []
    see, prefix, step = SeeGraph(model.grounding), PrefixGraph(model.generator), StepGraph(model.generator)
    for seed, (size, image) in enumerate(images.items(), start=1):
        seen_by = graphs[SEE]({IMAGE: image.numpy()})
        maps = see(image)[see.proposes :]
        for num, sets in OBJECTS_AND_SETS:
            masks, chosen, seen = example_objects(size, seed, num, sets)
            out = graphs[PREFIX](seen_by | {MASKS: masks.numpy(), CHOSEN: chosen.numpy(), SEEN: seen.numpy()})
            wanted = prefix(masks, chosen, seen, *maps)
            precise = None
            if exact is not None:
                precise = PrefixGraph(exact.generator)(masks, chosen, seen, *SeeGraph(exact.grounding)(image.double())[see.proposes :])
            rows.append((out[LOGITS], wanted[1].numpy(), None if precise is None else precise[1].numpy()))
            for _ in range(STEPS):
                token = wanted[0]
                wanted = step(token, *wanted[2:])
                precise = None if precise is None else StepGraph(exact.generator)(token, *precise[2:])
                out = graphs[STEP](out | {TOKEN: token.numpy()})
                out = {name.removeprefix(NEXT): value for name, value in out.items()}
                rows.append((out[LOGITS], wanted[1].numpy(), None if precise is None else precise[1].numpy()))
    return rows
