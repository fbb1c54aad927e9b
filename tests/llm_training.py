"""A program that trains as configurations say, one after the other: `python llm_training.py CONFIG.yaml ...`, also as several processes.

Into each train.out go `first.safetensors` (the weights that a run begins with) and, by process, `held_<rank>.json`: the parameters of the
language model that were read, how many of them this process holds, the types of them, and by how many bytes
the model's making has raised its peak memory.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from grex_mllm.config import Config, load_config
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.language_model import is_base_key
from grex_mllm.training import run
from grex_mllm.training.engine import is_main_process, leave

STOP = "stop_after"  # in the environment: a run ends after that many steps, without checkpoint and model


class Stopped(BaseException):
    """Ends a run."""


def peak_bytes() -> int:
    """Return the most memory that this process has had, file pages included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train(config: Config) -> None:
    """Train, and write what the module's docstring says."""
    built: list[GrexModel] = []

    class Kept(GrexModel):
        def __init__(self, *given: Any) -> None:
            start = peak_bytes()  # everything is imported, and the processes have met
            super().__init__(*given)
            built.append(self)
            loaded.append(peak_bytes() - start)
            if is_main_process():
                save_file(self.saved_state(), Path(config.train.out) / "first.safetensors")

    out, loaded = Path(config.train.out), list[int]()
    run.GrexModel = Kept  # type: ignore[misc]

    def after(step: int, _: dict[str, float]) -> None:
        if step == 1:
            base = [p for name, p in built[0].generator.lm.named_parameters() if is_base_key(name)]
            held = {
                "whole": sum(getattr(p, "ds_numel", p.numel()) for p in base),
                "held": sum(p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in base),
                "dtypes": sorted({str(p.dtype) for p in base}),
            }
            (out / f"held_{os.environ.get('RANK', 0)}.json").write_text(json.dumps(held | {"loading_bytes": loaded[0]}))
        if step == int(os.environ.get(STOP, -1)):
            raise Stopped

    try:
        run.train_from_config(config, on_step=after)
    except Stopped:
        return


def main() -> None:
    """Do the runs."""
    for path in sys.argv[1:]:
        train(load_config(path))
    leave(0)


if __name__ == "__main__":
    run.CORPUS_LINES = 300
    import deepspeed  # noqa: F401  so that no import counts as memory of a run
    import peft  # noqa: F401

    main()
