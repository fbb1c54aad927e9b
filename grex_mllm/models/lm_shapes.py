"""Language models as shapes, without weights: from a folder's config.json, or where there is none from the published sizes in `shapes/`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grex_mllm.errors import fault
from grex_mllm.models.lm_config import ModelChoice
from grex_mllm.models.placement import placement

FOLDER = Path(__file__).resolve().parent / "shapes"  # facts of the models' config.json, as their authors publish them
_STATE = {"left_out": False}


@contextmanager
def leaving_out_weights() -> Iterator[None]:
    """Build language models of folders as shapes within the block; used on devices without memory."""
    _STATE["left_out"] = True
    try:
        yield
    finally:
        _STATE["left_out"] = False


def weights_are_left_out() -> bool:
    """Tell whether this is within `leaving_out_weights`."""
    return _STATE["left_out"]


def shape_file(lm: str) -> Path:
    """Return the config.json of a language model's folder, or the file of published sizes of that name where there is no such folder.

    Raises:
        GrexError: neither is there.
    """
    own = Path(lm) / "config.json"
    if own.is_file():
        return own
    name = Path(lm).name.lower()
    known = {file.stem.lower(): file for file in sorted(FOLDER.glob("*.json"))}
    if name not in known:
        raise fault(
            f"language model {lm} is not there",
            f"its folder with config.json, or a name among {', '.join(known)}",
            "fix model.generator.lm",
        )
    return known[name]


def config_of(lm: str) -> Any:
    """Return the configuration of transformers with the sizes of `shape_file`.

    Raises:
        GrexError: as `shape_file`.
    """
    from transformers import AutoConfig

    values = json.loads(shape_file(lm).read_text(encoding="utf-8"))
    return AutoConfig.for_model(values.pop("model_type"), **values)


def shape_of(cfg: ModelChoice) -> Any:
    """Return the language model that a configuration names, with the sizes of `shape_file` and no weights worth the name.

    Raises:
        GrexError: as `shape_file`.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from grex_mllm.models.lm_loading import base_dtype

    config = config_of(cfg.lm)
    kind = AutoModelForCausalLM if getattr(config, "vision_config", None) is None else AutoModelForImageTextToText
    dtype = base_dtype(cfg, placement().precision)
    options = {} if cfg.attn_implementation == "auto" else {"attn_implementation": cfg.attn_implementation}
    return kind.from_config(config, dtype=dtype, **options)
