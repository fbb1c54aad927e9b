"""The verbs `grex export` and `grex card`; what they need is imported when they run."""

from __future__ import annotations

import json
from pathlib import Path


def export(model: str, out: str, *, format: str = "onnx", task: str = "all") -> int:
    """Write a model as a folder that runs without this package; its answers are compared with torch's first.

    Args:
        model: a model folder or hub id.
        out: the folder to write.
        format: onnx (runs with onnxruntime, without torch), or torch (programs of torch.export).
        task: all (objects from expressions, and expressions from objects where the model has a generator), or ground.
    """
    from grex_mllm.export.folder import export_model

    facts = export_model(model, out, format, task)
    print(json.dumps({name: facts[name] for name in ("format", "any_size", "largest_difference")}, indent=2))
    return 0


def card(model: str, results: str, out: str | None = None) -> int:
    """Write a model card: what the model is, what it was trained on, its numbers under their protocol, and its limits.

    Args:
        model: a model folder.
        results: a results.json of this model (grex score).
        out: the file to write (default: README.md in the model folder).
    """
    from grex_mllm.export.card import write_card

    print(write_card(Path(model), Path(results), Path(out) if out else Path(model) / "README.md"))
    return 0
