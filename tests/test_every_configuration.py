"""Every shipped configuration trains alike as one process and as two, under every engine.

The rule by which a configuration is made tiny, and free of chance, for this (`exact`):

1. `shrink_run` of tests/shrink.py makes every width tiny and leaves every choice as it is; released weights are random ones.
2. Every dropout is 0: of the text encoder, of the adapters, of Swin's paths, of distractors, and the share of boxes instead of masks.
3. Ten steps of four images, at most two batches a step; no pre-training. Dataset folders are one of SCENES synthetic scenes, some of
   whose expressions have no target; a named language model is a tiny random one of its family, in the type that is computed in.
4. AdamW with epsilon 1e-2, learning rate 2e-6, gradients clipped at norm 1, no decay. With its usual epsilon AdamW divides the
   gradient of each weight by its own size, so that a weight whose gradient is zero but for rounding (the bias of a key, of what is
   normalised next) moves as far as any other, in a direction that rounding draws. The moments stay.
5. Under DeepSpeed neither Muon nor an average of weights, as deepspeed_configs/README.md says; plain data parallelism keeps both.

6. ReLA's masked attention lets a region look where its mask's probability is at least 0.5, as released. Where the one process finds
   a probability within NEAR of that, rounding decides, and this step alone has the bound DECIDED_BY_ROUNDING.
7. Losses agree within EXACT; with language fusion in Swin within FUSED: its normalisation over positions multiplies the rounding of
   maps that are almost constant, as those of drawn scenes are (float32 and float64 differ there by 1e-5 in the first fusion already).

As a program: `python test_every_configuration.py CONFIG.yaml ...` trains one after the other, also as several processes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from shrink import LANGUAGE_MODELS, shrink_run
from test_deepspeed import launch_program, write_json
from tiny import WORDS
from tiny_llms import write_llm
from toy_training import losses

from grex_mllm.config import Config, load_config, save_config
from grex_mllm.data.synthetic.export import export
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.errors import GrexError
from grex_mllm.models.decoders.rela.network import LanguagePart
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.text import train_text_tokenizer
from grex_mllm.training import run
from grex_mllm.training.engine import leave
from grex_mllm.training.run import train_from_config

pytest.importorskip("deepspeed")
FILES = {file.stem: file for file in sorted((ROOT / "configs").glob("*.yaml"))}
SCENES, STEPS, CORPUS_LINES = 16, 10, 300
EXACT, FUSED, IN_BF16 = 1e-5, 3e-5, 0.02  # bounds of the relative difference of a loss
NEAR, DECIDED_BY_ROUNDING = 1e-6, 2e-2
MOMENTS = ("exp_avg", "momentum_buffer")  # Adam's, Muon's: in front of a weight's name in a checkpoint of the optimizer
DEAD = re.compile(r"grounding\.vision\.stages\.\d\.gate\.[02]\.weight")  # as released, zero on both sides of a ReLU: no gradient ever
CPU: dict[str, str] = {"device": "cpu"}
PARTS: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": 0}
ENGINES: dict[str, dict[str, Any] | None] = {
    "DDP": None,
    "ZeRO-1": {"stage": 1},
    "ZeRO-2": {"stage": 2},
    "ZeRO-2 offloaded": {"stage": 2, "offload_optimizer": CPU},
    "ZeRO-3": PARTS,
    "ZeRO-3 offloaded": PARTS | {"offload_optimizer": CPU, "offload_param": CPU},
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with data, a text tokenizer and language models, and this process set as the program that the processes run."""
    folder = tmp_path_factory.mktemp("stage")
    threads, lines = torch.get_num_threads(), run.CORPUS_LINES
    run.CORPUS_LINES = CORPUS_LINES
    torch.set_num_threads(1)
    export(SyntheticConfig(image_size=64), "train", SCENES, folder / "data", expressions_per_image=3)
    train_text_tokenizer(WORDS, 300).save(folder / "text")
    for family in sorted(set(LANGUAGE_MODELS.values())):
        write_llm(family, folder / family, WORDS * 5)
    yield folder
    run.CORPUS_LINES = lines
    torch.set_num_threads(threads)


def exact(name: str, stage: Path, engine: str, precision: str) -> Config:
    """Return a shipped configuration after the rule above."""
    config = load_config(FILES[name])
    accumulation = min(config.train.accumulation, 2)
    config = shrink_run(config)
    model, generator, train, optim = config.model, config.model.generator, config.train, config.train.optim
    model.vision.weights = model.text.path = train.pretraining = None
    model.text.tokenizer, model.text.dropout, model.vision.drop_path = str(stage / "text"), 0.0, 0.0
    if generator is not None:
        generator.lora_dropout = generator.distractor_dropout = generator.box_share = 0.0
        generator.dtype = "auto"
        if generator.lm != "tiny":
            generator.lm = str(stage / LANGUAGE_MODELS[Path(generator.lm).name])
    if config.data.train != "synthetic":
        config.data.train = str(stage / "data")
    train.steps, train.save_every, train.log_every, train.batch_images, train.accumulation = STEPS, STEPS, 1, 4, accumulation
    train.precision, train.num_threads = precision, 1
    optim.lr, optim.eps, optim.clip, optim.weight_decay, optim.adapter_decay = 2e-6, 1e-2, 1.0, 0.0, 0.0
    if ENGINES[engine] is not None:
        optim.muon, optim.average_decay = False, 0.0
    return config


def one(name: str, stage: Path, engine: str, precision: str) -> Path:
    """Return the folder of the run of one process, which all engines with the same settings share."""
    config = exact(name, stage, engine, precision)
    out = stage / f"{name}_{precision}_{config.train.optim.muon}_{config.train.optim.average_decay:g}"
    if not out.exists():
        config.train.out = str(out)
        with counting_close_decisions() as close:
            counts: list[int] = []
            train_from_config(config, on_step=lambda *_: counts.append(close.pop(0)) or close.append(0))  # type: ignore[func-returns-value]
        (out / "close.json").write_text(json.dumps(counts))
    return out


@contextmanager
def counting_close_decisions() -> Iterator[list[int]]:
    """Yield a list of one number: the decisions of masked attention that lie near its threshold, since the number was last replaced."""
    plain, close = LanguagePart._allowed, [0]

    def counted(self: Any, x: torch.Tensor, mask_level: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            prob = (self.heads.mask(self.norm(x)) @ mask_level).sigmoid()
        close[0] += int(((prob - 0.5).abs() < NEAR).sum())
        return plain(self, x, mask_level)

    LanguagePart._allowed = counted  # type: ignore[method-assign]
    try:
        yield close
    finally:
        LanguagePart._allowed = plain  # type: ignore[method-assign]


def two(cases: list[tuple[str, str]], stage: Path, folder: Path, precision: str) -> dict[tuple[str, str], Path]:
    """Train (configuration, engine) as two processes, one after the other in one launch, and return their folders.

    Plain data parallelism comes first: Accelerate forgets no DeepSpeed.
    """
    outs = {case: folder / f"{case[0]} {case[1]}" for case in cases}
    for (name, engine), out in outs.items():
        config, zero = exact(name, stage, engine, precision), ENGINES[engine]
        config.train.out = str(out)
        config.train.deepspeed = write_json(folder, f"{engine}.json", **zero) if zero is not None else None
        save_config(config, Path(f"{out}.yaml"))
    program = [str(Path(__file__)), *(f"{out}.yaml" for out in outs.values())]
    status, shown = launch_program(folder, program, limit_s=3000)
    assert status == 0, shown[-6000:]
    return outs


def worst_differences(ours: Path, theirs: Path) -> tuple[float, float, float]:
    """Return the largest relative differences of a loss term, of the gradient norm, and of either in steps that rounding may decide."""
    found, expected = losses(ours), losses(theirs)
    assert [sorted(line) for line in found] == [sorted(line) for line in expected] and len(found) == STEPS
    worst, counts = dict.fromkeys(("loss", "norm", "close"), 0.0), json.loads((theirs / "close.json").read_text())
    assert 0 in counts, counts
    for line, other, close in zip(found, expected, counts, strict=True):
        for key in line:
            kind = "close" if close else "norm" if key == "grad_norm" else "loss"
            worst[kind] = max(worst[kind], abs(line[key] - other[key]) / max(abs(other[key]), 1e-6))
    return worst["loss"], worst["norm"], worst["close"]


def unreached(out: Path) -> list[str]:
    """Return the trained weights that no gradient but zero has reached; the first moments tell."""
    moments = load_file(out / "checkpoints" / f"step_{STEPS:08d}" / "optimizer.safetensors")
    states = [(*key.split("/"), value) for key, value in moments.items()]
    reached = {name for kind, name, value in states if kind in MOMENTS and bool(value.any())}
    return [name for name in json.loads((out / "trained.json").read_text()) if name not in reached and not DEAD.fullmatch(name)]


def compare(cases: list[tuple[str, str]], stage: Path, folder: Path, bound: float, precision: str = "fp32") -> None:
    """Require of two processes the losses of one, its gradient norm within ten times the bound, and a gradient for every trained weight."""
    far, still = dict[tuple[str, str], tuple[float, ...]](), {}
    for (name, engine), out in two(cases, stage, folder, precision).items():
        far[name, engine] = worst_differences(out, one(name, stage, engine, precision))
        still[name, engine] = unreached(out)
        print(f"{precision} {engine}: {name}", *(f"{gap:.1e}" for gap in far[name, engine]))
    for (name, engine), gaps in far.items():
        fused = load_config(FILES[name]).model.vision.fusion != "none"
        most = max(bound, FUSED) if fused else bound
        if gaps[0] <= most and gaps[1] <= 10 * most and gaps[2] <= max(most, DECIDED_BY_ROUNDING):
            far[name, engine] = ()
    assert {case: gaps for case, gaps in far.items() if gaps} == {}
    assert {case: names for case, names in still.items() if names} == {}


def test_two_processes_equal_one(stage: Path, tmp_path: Path) -> None:
    """Our own decoder with Muon; ReLA with a named language model, whole and in partitions."""
    joint = "joint_rela_r50_qwen2.5_0.5b"
    compare([("demo", "DDP"), (joint, "DDP"), (joint, "ZeRO-3")], stage, tmp_path, EXACT)


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES)
def test_every_configuration(engine: str, stage: Path, tmp_path: Path) -> None:
    """Losses within 1e-5 over ten steps, and a gradient for every weight; what ZeRO-3 cannot hold is refused."""
    cases = []
    for name in FILES:
        if "ZeRO-3" in engine and "qlora" in name:
            config = exact(name, stage, engine, "fp32")
            config.train.deepspeed = write_json(tmp_path, "refused.json", **PARTS)
            with pytest.raises(GrexError, match="quantisation nf4 with ZeRO-3"):
                train_from_config(config)
        else:
            cases.append((name, engine))
    compare(cases, stage, tmp_path, EXACT)


@pytest.mark.long
def test_bfloat16(stage: Path, tmp_path: Path) -> None:
    """Autocast rounds each process's gradients to 8 bits, and their sums differently."""
    names = ["demo", "gres_rela_swin_base", "joint_rela_swin_base_qwen2.5_7b"]
    compare([(name, engine) for engine in ("DDP", "ZeRO-2", "ZeRO-3") for name in names], stage, tmp_path, IN_BF16, "bf16")


def main() -> None:
    """Train as the given files say, one after the other; the names of the trained weights go into `trained.json`."""
    for path in sys.argv[1:]:
        config, built = load_config(path), list[GrexModel]()

        class Kept(GrexModel):
            def __init__(self, *given: Any, built: list[GrexModel] = built) -> None:
                super().__init__(*given)
                built.append(self)

        run.GrexModel = Kept  # type: ignore[misc]
        if train_from_config(config).is_main:
            names = [name for name, parameter in built[0].named_parameters() if parameter.requires_grad]
            (Path(config.train.out) / "trained.json").write_text(json.dumps(names))
    leave(0)


if __name__ == "__main__":
    run.CORPUS_LINES = CORPUS_LINES
    main()
