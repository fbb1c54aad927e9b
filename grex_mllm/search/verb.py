"""The verb `grex search`. It imports what is heavy when it runs, so that `grex --help` stays fast."""

from __future__ import annotations

import json
from pathlib import Path

from grex_mllm.arguments import Places


def search(
    expressions: Places,
    *,
    model: str,
    images: str,
    index: str | None = None,
    top: int = 12,
    out: str = "search.png",
    device: str = "auto",
    rebuild: bool = False,
) -> int:
    """Rank the images of a folder that contain what is said: prints JSON, writes a contact sheet with masks for each expression.

    Args:
        expressions: one or more expressions.
        model: a model folder or hub id whose image encoder reads no expression.
        images: the folder; what lies below it is searched, too.
        index: folder of the index, which is built once and brought up to date (default: .grex_index in the folder of images).
        top: how many images are shown, at most.
        out: the contact sheet, a PNG; of several expressions search.0.png, search.1.png, ...
        device: auto, cpu, cuda.
        rebuild: replace an index, also one of another model.
    """
    from grex_mllm.search.command import run_search

    found = run_search(model, images, expressions, index=index, top=top, out=Path(out), device=device, rebuild=rebuild)
    print(json.dumps(found, indent=2, ensure_ascii=False))
    return 0
