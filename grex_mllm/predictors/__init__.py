"""Who answers: PREDICTORS is the table, name -> "module:argument"; `protocol.py` says what an entry must do.

`--model` takes a name of the table (`oracle`), one with an argument (`replay:runs/x.jsonl`, `random:7`), any other module in the same way
(`my_module` or `my_module:argument`, found from the current folder as well), a multimodal language model (`qwen2.5-vl:FOLDER` by its family
in `zeroshot/families`, or `openai:MODEL` behind a server), or a model folder or hub id. The module's `build(argument, options)` gives the
predictor.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path

from grex_mllm.errors import fault
from grex_mllm.predictors.protocol import Options, Predictor

PREDICTORS: dict[str, str] = {
    "grex": "grex_mllm.predictors.grex",
    "always_empty": "grex_mllm.predictors.fixed:always_empty",
    "oracle": "grex_mllm.predictors.fixed:oracle",
    "largest": "grex_mllm.predictors.fixed:largest",
    "all": "grex_mllm.predictors.fixed:all",
    "random": "grex_mllm.predictors.fixed:random",
    "category_side": "grex_mllm.predictors.category_side",
    "replay": "grex_mllm.predictors.replay",
    "reparse": "grex_mllm.zeroshot.recorded",
}
ZEROSHOT, SERVER = "grex_mllm.zeroshot.predictor", "openai"  # of FAMILY:FOLDER and openai:MODEL
MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def open_predictor(name: str, options: Options) -> Predictor:
    """Return the predictor of a name of PREDICTORS, a module, a model folder or a hub id.

    Raises:
        GrexError: none of these; a module without `build`; an option that the predictor does not have; what the predictor raises.
    """
    module, _, argument = _place(name).partition(":")
    try:
        build = importlib.import_module(module).build
    except (ImportError, AttributeError) as error:
        raise fault(f"predictor {name} cannot be loaded ({error})", f"a module {module} with build(argument, options)", "fix it") from None
    predictor: Predictor = build(argument, options)
    _check_options(predictor, name, options)
    return predictor


def _check_options(predictor: Predictor, name: str, options: Options) -> None:
    """Raise on options that the predictor would silently ignore."""
    own = tuple(f"--{first}." for first in ("data", *predictor.can.takes))
    given = [] if predictor.can.takes else [f"--{key}" for key in options.asked]
    if predictor.can.config is None:
        given += [item.split("=")[0] for item in options.overrides if not item.startswith(own)]
        given += [f"--{key}" for key, value in (("listener", options.listener), ("threshold", options.threshold)) if value]
        given += [f"--{key}" for key in options.speech]
    if given:
        raise fault(f"{', '.join(given)} with {name}", "a predictor that has this option", "leave it out")


def open_blind(name: str, options: Options, task: str) -> Predictor:
    """Return a predictor for questions to which nobody has written down the answer. task: ground or generate.

    Raises:
        GrexError: what `open_predictor` raises; a predictor that cannot do the task, or that reads the targets.
    """
    predictor = open_predictor(name, options)
    if task not in predictor.can.tasks and task == "generate":
        raise fault("a model without a generator", "one trained with model.generator", "train with a generator, or use ground")
    if task not in predictor.can.tasks or predictor.can.truth == "targets":
        given = f"{name}, which {'reads the targets' if predictor.can.truth else 'does not ground'}"
        raise fault(given, "a predictor that answers without knowing them", "give another one")
    return predictor


def _place(name: str) -> str:
    """Return "module:argument" of a name."""
    head, colon, argument = name.partition(":")
    if head in PREDICTORS:
        module, _, own = PREDICTORS[head].partition(":")
        return f"{module}:{own}{colon if own else ''}{argument}"
    if Path(name).is_dir():
        return f"{PREDICTORS['grex']}:{name}"
    if argument and (head == SERVER or head in importlib.import_module("grex_mllm.zeroshot.families").FAMILIES):
        return f"{ZEROSHOT}:{name}"
    if MODULE.fullmatch(head):
        near = difflib.get_close_matches(head, PREDICTORS, n=1)
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        if _is_module(head):
            return name
        if near:
            raise fault(f'predictor "{head}"', f"one of {', '.join(PREDICTORS)}, a module or a model folder", f'did you mean "{near[0]}"?')
    return f"{PREDICTORS['grex']}:{name}"


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a package above it
        return False
