"""The tables of what can be exchanged: name -> module path, imported when asked for. A dotted path works as well as a name.

An entry is a module with the names of its contract; CONTRIBUTING.md says what each has to give. Its `Config` is a dataclass with a field
`name` and the knobs of that entry alone.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from grex_mllm.errors import GrexError, fault

DECODERS = {
    "rela": "grex_mllm.models.decoders.rela",
    "instance_selection": "grex_mllm.models.decoders.instance_selection",
    "isfp": "grex_mllm.models.decoders.isfp",
    "lavt": "grex_mllm.models.decoders.lavt",
    "vlt": "grex_mllm.models.decoders.vlt",
    "vlt_rela": "grex_mllm.models.decoders.vlt_rela",
    "m3att": "grex_mllm.models.decoders.m3att",
}
GENERATORS = {
    "region_tokens": "grex_mllm.models.generators.region_tokens",
    "mllm": "grex_mllm.models.generators.mllm",
}
PRETRAINING = {
    "tiny_lm": "grex_mllm.training.pretraining",
}
LISTENERS = {
    "own_grounding": "grex_mllm.zeroshot.own_grounding",
}
SOURCES = {
    "synthetic": "grex_mllm.data.synthetic.source",
    "dialogue": "grex_mllm.data.synthetic.dialogue_source",
}
CONTRACTS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "model.decoder": (DECODERS, ("Config", "Decoder", "Criterion")),
    "model.generator": (GENERATORS, ("Config", "Generator", "make_tokenizer", "load_tokenizer", "collate")),
    "train.pretraining": (PRETRAINING, ("Config", "stages")),
}


def entry(field: str, name: str, trusted: bool = True) -> ModuleType:
    """Import the entry of a configuration field ("model.decoder", ...) by its name or dotted path.

    trusted: False for a file that may come from the net. It may name entries of the table only, and modules that are imported already or
    that the environment variable GREX_MODULES allows (their paths, with colons between): importing a module runs it.

    Raises:
        GrexError: no such entry or module, one that is not allowed, or a module that lacks a name of the contract.
    """
    table, needed = CONTRACTS[field]
    path = table.get(name, name)
    if name not in table and "." not in name and (not name.isidentifier() or find_spec(name) is None):
        raise fault(f'{field}.name "{name}"', f"one of {', '.join(sorted(table))}, or the dotted path of a module", "fix the name")
    if not trusted and name not in table and name not in sys.modules and name not in os.environ.get("GREX_MODULES", "").split(":"):
        given = f"{field}.name {name}: a module that the model's configuration names"
        raise fault(given, "one that you trust, because importing runs it", f"set GREX_MODULES={name}, or import {name} before")
    try:
        module = import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not path.startswith(error.name):
            raise
        raise GrexError(
            f'{field}.name "{name}": no module {error.name}; expected a module that Python finds; '
            "install it, or run python -m grex_mllm in its folder"
        ) from None
    missing = [part for part in needed if not hasattr(module, part)]
    if missing:
        raise fault(f"{field}.name {name}: a module without {', '.join(missing)}", f"{', '.join(needed)} in it", "see CONTRIBUTING.md")
    return module
