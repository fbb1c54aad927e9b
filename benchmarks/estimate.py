"""Compare `grex estimate` with real trainings: growth of peak memory of a process over one that has only imported everything. Linux, CPU.

    python benchmarks/estimate.py                       # all of CASES; --case NAME: one of them

Each case trains for two steps in a process of its own, through the loop of `grex train`, on the batch that the estimate assumes. glibc
keeps freed memory of changing thresholds; the processes run with MALLOC_MMAP_THRESHOLD_ fixed, so that large blocks go back to the system
when they are freed, and the peak is what the program holds, not what the allocator has kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESNET = ["--model.vision.name=resnet", "--model.decoder.boxes=true", "--model.decoder.count=true"]
LOSS = ["--model.decoder.loss.minimap=0.2", "--model.decoder.loss.no_target=0.2", "--model.decoder.loss.count=1.0"]
LM = ["--model.generator.lm=LM", "--model.generator.lora_rank=16", "--data.expressions_per_image=2"]
SIZES = {  # of the random language models
    "small": {"hidden_size": 1024, "num_hidden_layers": 16, "intermediate_size": 2816, "num_attention_heads": 16, "vocab_size": 32000},
    "large": {"hidden_size": 1536, "num_hidden_layers": 20, "intermediate_size": 4096, "num_attention_heads": 12, "vocab_size": 32000},
}
# name -> configuration, language model, images of a batch, changes
CASES: dict[str, tuple[str, str | None, int, list[str]]] = {
    "joint": ("joint_rela_r50.yaml", "small", 4, LM),
    "generate": ("joint_rela_r50.yaml", "large", 2, [*LM, "--train.tasks=generate", "--model.generator.gradient_checkpointing=true"]),
    "ground": ("gres_rela_swin_tiny.yaml", None, 6, []),
}
COMMON = ["--train.precision=fp32", "--train.steps=3", "--train.save_every=1000", "--data.num_workers=0", "--train.num_threads=2"]
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}


def settings(name: str, folder: Path) -> tuple[Any, Any]:
    """Return the configuration of a case and its load."""
    from grex_mllm.config import load_config, name_no_parts
    from grex_mllm.estimate.model import Load

    file, lm, images, changes = CASES[name]
    changes = [change.replace("=LM", f"={folder / 'lm'}") for change in changes]
    config = load_config(ROOT / "configs" / file, [*changes, *COMMON, f"--train.batch_images={images}", f"--train.out={folder / 'run'}"])
    name_no_parts(config)
    if lm is not None and not (folder / "lm").is_dir():
        write_lm(folder / "lm", SIZES[lm])
    return config, Load(images)


def write_lm(folder: Path, sizes: dict[str, int]) -> None:
    """Write a random Llama of these sizes, with a tokenizer of words, into a folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "dog": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4)).save_pretrained(folder)


def status(key: str) -> int:
    """Return a line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure(name: str, folder: Path) -> int:
    """Train a case and return the growth of the peak, in bytes."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.bert.modeling_bert
    import transformers.models.llama.modeling_llama  # noqa: F401

    from grex_mllm.estimate.model import made_batch, word_tokenizers
    from grex_mllm.models.grex import GrexModel
    from grex_mllm.training.loop import train
    from grex_mllm.training.step import Step

    config, load = settings(name, folder)
    start = status("VmHWM")
    model = GrexModel(config, *word_tokenizers(config))

    class Same:
        def at(self, index: int) -> Any:
            return made_batch(config, model, load)

    class Enough(Exception):
        """Two steps are done: the second is the first with the optimizer's state."""

    def on_step(step: int, losses: dict[str, float]) -> None:
        if step == 2:
            raise Enough

    with contextlib.suppress(Enough):
        train(Step(model, config), model, Same(), config, on_step=on_step)  # type: ignore[arg-type]
    return status("VmHWM") - start


def estimated(name: str, folder: Path) -> int:
    """Return what the estimate says for a case, in bytes."""
    from grex_mllm.estimate.count import count
    from grex_mllm.estimate.memory import Plan, memory
    from grex_mllm.estimate.model import standing_alone

    config, load = settings(name, folder)
    counted = count(standing_alone(config)[0], load, device="cpu", precision="fp32")
    return memory(counted, Plan(), gpus=1).total


def compare(name: str) -> tuple[int, int]:
    """Return (estimated, measured) of a case, each from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        settings(name, Path(folder))  # writes the language model
        found = []
        for what in ("estimated", "measured"):
            command = [sys.executable, str(Path(__file__).resolve()), "--case", name, "--part", what, "--folder", folder]
            environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
            run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert run.returncode == 0, run.stderr[-3000:]
            found.append(int(json.loads(run.stdout.splitlines()[-1])))
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=sorted(CASES))
    parser.add_argument("--part", choices=("estimated", "measured"), help="print one number, in this process")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.part:
        print(json.dumps((estimated if given.part == "estimated" else measure)(given.case, given.folder)))
        return
    for name in [given.case] if given.case else CASES:
        guess, true = compare(name)
        print(
            f"{name:10s} estimated {guess / 2**30:6.2f} GiB, measured {true / 2**30:6.2f} GiB, difference {guess / true - 1:+.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
