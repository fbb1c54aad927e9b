"""The language model's adapters as files that others read: a folder of peft, or merged into a copy of the language model.

A model folder already holds adapters and region tokens alone, without the base of a named language model; these exports are for programs
that know transformers and peft only, and for a merged copy to serve as the base of another training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grex_mllm.errors import fault
from grex_mllm.writing import whole_folder

BASE = "base"  # folder with the tiny language model, which no hub has


@dataclass
class ExportedAdapters:
    """What was written: out, the folder; base, where the unadapted LM is; merged; num_tensors of adapters; reader, class that reads it."""

    out: Path
    base: str
    merged: bool
    num_tensors: int
    reader: str = "AutoModelForCausalLM"

    def lines(self) -> list[str]:
        """Say what was written and how it is read, one line each."""
        if self.merged:
            return [f"{self.out}: {self.base} with {self.num_tensors} adapter tensors merged in; {self.reader} reads it"]
        return [f"{self.out}: {self.num_tensors} adapter tensors for {self.base}; peft.PeftModel.from_pretrained(base, {str(self.out)!r})"]


def export_adapters(source: str | Path, out: str | Path, merged: bool = False) -> ExportedAdapters:
    """Write the adapters of a trained model folder as a peft folder, or a copy of the LM with them merged in; both with the tokenizer.

    For `lm: tiny` the peft folder gets the base in `base/`. The output is new, and appears whole or not at all.

    Raises:
        GrexError: a model without adapters, `out` not empty, or merging into a quantised base (rounding would change the answers).
    """
    from grex_mllm.models.grex import GrexModel

    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise fault(f"output {target} exists and is not empty", "a new or empty folder", "remove it or choose another --out")
    generator = GrexModel.from_pretrained(source).generator
    lm: Any = getattr(generator, "lm", None)
    if lm is None or not hasattr(lm, "peft_config"):
        raise fault(f"model {source} without adapters on a language model", "a generator with lora_rank above 0", "give such a model")
    cfg: Any = generator.cfg
    if merged and cfg.quantisation != "none":
        raise fault(
            f"merging adapters into a base quantised as {cfg.quantisation}",
            "an unquantised base",
            f"set quantisation: none in {Path(source) / 'config.yaml'}, or leave out --merged",
        )
    base, num = cfg.lm, sum("lora_" in name for name in lm.state_dict())
    with whole_folder(target) as work:
        if merged:
            lm.merge_and_unload().save_pretrained(work)
        else:
            base = str((target / BASE).resolve()) if cfg.lm == "tiny" else base
            _save_peft(lm, work, base)
            if cfg.lm == "tiny":
                lm.unload().save_pretrained(work / BASE)
        generator.tokenizer.save(work)
    reader = "AutoModelForCausalLM" if getattr(lm.config, "vision_config", None) is None else "AutoModelForImageTextToText"
    return ExportedAdapters(target, base, merged, num, reader)


def _save_peft(lm: Any, folder: Path, base: str) -> None:
    for config in lm.peft_config.values():
        config.base_model_name_or_path = base
    # "auto" would ask the hub whether the vocabulary has grown
    lm.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty form
