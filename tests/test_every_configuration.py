"""Every shipped configuration trains alike as one process and as two, under every engine.

The rule by which a configuration is made tiny, and free of chance, for this (`exact`):

1. `shrink_run` of tests/shrink.py makes every width tiny and leaves every choice as it is; released weights are random ones.
2. Every dropout is 0: of the text encoder, of the adapters, of Swin's paths, of distractors, and the share of boxes instead of masks; no
   words are masked at random. A teacher is a random ReLA.
3. Ten steps of four images, at most two batches a step; no pre-training. Dataset folders are one of SCENES synthetic scenes, some of
   whose expressions have no target; a named language model is a tiny random one of its family, in the type that is computed in.
4. AdamW with epsilon 1e-2, learning rate 2e-6, gradients clipped at norm 1, no decay. With its usual epsilon AdamW divides the
   gradient of each weight by its own size, so that a weight whose gradient is zero but for rounding (the bias of a key, of what is
   normalised next) moves as far as any other, in a direction that rounding draws. The moments stay.
5. Under DeepSpeed neither Muon nor an average of weights, as deepspeed_configs/README.md says; plain data parallelism keeps both.

6. An image encoder that cuts the image into cells gets 2 x 2 cells of 64 pixels, which have several positions on every map, as at full
   size; a normalisation over a single position gives zero, and no gradient.
7. ReLA's masked attention lets a region look where its mask's probability is at least 0.5, as released. Where the one process finds
   a probability within NEAR of that, rounding decides, and this step alone has the bound DECIDED_BY_ROUNDING (unless every step is so:
   then none has). Where the input of a ReLU is that near to zero, rounding decides whether one unit takes part in the gradient (a leaky
   one: how much), but no loss: the gradient's norm of this step has the bound KINK. (In every such step that was looked into, one unit
   behind the pixel decoder's last normalisation had turned.)
8. Configurations that this makes equal (Swin-T and Swin-B, Llama and Vicuna) are trained once.
9. The refinement of ISFP learns from every choice; with random weights all are wrong, and it would get no gradient.
10. Losses agree within EXACT; with language fusion in Swin, or batch norm, within FUSED: a normalisation over positions multiplies the
   rounding of maps that are almost constant, as those of drawn scenes are (float32 and float64 differ by 1e-5 in the first fusion already).
11. In bfloat16 all terms of a loss agree within IN_BF16 of their sum, and the gradient's norm within IN_BF16 of itself. Rounding decides
   much more there (hundreds of probabilities of masked attention lie at 0.5 exactly), and Muon makes of a direction in a rounded gradient
   a step as long as any. Measured: sums up to 0.037, norms up to 0.26; one process in bfloat16 and in float32 differ by 0.056 and 0.38.

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
from shrink import LANGUAGE_MODELS, MULTIMODAL_MODELS, shrink_run, write_language_models
from test_deepspeed import launch_program, write_json
from tiny import WORDS
from torch import Tensor, nn
from toy_training import losses

from grex_mllm.config import Config, load_config, name_no_parts, save_config
from grex_mllm.data.synthetic.export import export
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.errors import GrexError
from grex_mllm.models.decoders.rela.network import LanguagePart
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.text import load_text_tokenizer, train_text_tokenizer
from grex_mllm.training import run
from grex_mllm.training.engine import leave
from grex_mllm.training.run import train_from_config

pytest.importorskip("deepspeed")
FILES = {file.stem: file for file in sorted((ROOT / "configs").glob("*.yaml"))}
SCENES, STEPS, CORPUS_LINES = 16, 10, 300
EXACT, FUSED = 1e-5, 3e-5  # bounds of the relative difference of a loss; NORM times as much for the gradient's norm
IN_BF16 = {"loss": 0.06, "norm": 0.4}
NORM, NEAR, DECIDED_BY_ROUNDING, KINK = 10, {"attention": 1e-6, "relu": 1e-4}, 1e-3, 0.02
MOMENTS = ("exp_avg", "momentum_buffer")  # Adam's, Muon's: in front of a weight's name in a checkpoint of the optimizer
# no gradient: Swin's gates, as released zero on both sides of a ReLU; heads whose loss has weight 0, with what they alone read
DEAD = re.compile(r"grounding\.vision\.(net\.)?stages\.\d\.gate\.[02]\.weight")
UNASKED = {
    "ablation_grec_only": re.compile(
        r"grounding\.(decoder\.language_part\.heads\.mask|pixel_decoder\.(lateral|smooth|mask_features)|vision\.(norms\.0|stages\.0\.fusion))\."
    ),
    "ablation_vlt_queries_1": re.compile(  # a softmax over one query is 1
        r"grounding\.decoder\.language_part\.decoder\.layers\.\d\.self_attention\.attention\.(query|key)\."
    ),
    "ablation_no_target_pixels": re.compile(r"grounding\.decoder\.language_part\.heads\.no_target\."),
}
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
HPZ = "ZeRO-3 in nodes of two"  # each holds a copy of the weights, of which its processes have a half
EVERYWHERE = list(ENGINES)
ENGINES[HPZ] = PARTS | {"zero_hpz_partition_size": 2}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with data, a text tokenizer and language models, and this process set as the program that the processes run."""
    folder = tmp_path_factory.mktemp("stage")
    threads, lines = torch.get_num_threads(), run.CORPUS_LINES
    run.CORPUS_LINES = CORPUS_LINES
    torch.set_num_threads(1)
    export(SyntheticConfig(image_size=64), "train", SCENES, folder / "data", expressions_per_image=3)
    train_text_tokenizer(WORDS, 300).save(folder / "text")
    write_language_models({name: folder / name for name in (*LANGUAGE_MODELS, *MULTIMODAL_MODELS)})
    torch.manual_seed(1)
    teacher, text = exact("gres_rela_r50", folder, "DDP", "fp32"), load_text_tokenizer(folder / "text")
    teacher.model.text.vocab_size = text.vocab_size
    GrexModel(teacher, text).save_pretrained(folder / "teacher")
    yield folder
    run.CORPUS_LINES = lines
    torch.set_num_threads(threads)


def exact(name: str, stage: Path, engine: str, precision: str) -> Config:
    """Return a shipped configuration after the rule above."""
    config = load_config(FILES[name])
    accumulation = min(config.train.accumulation, 2)
    config = shrink_run(config)
    model, generator, train, optim = config.model, config.model.generator, config.train, config.train.optim
    name_no_parts(config)
    train.pretraining = None
    model.text.tokenizer, model.text.dropout, model.vision.drop_path = str(stage / "text"), 0.0, 0.0
    if hasattr(model.decoder, "masked_words"):
        model.decoder.masked_words = "none"
    if generator is not None:
        generator.lora_dropout = generator.distractor_dropout = 0.0
        if hasattr(generator, "box_share"):
            generator.box_share = 0.0
        generator.dtype = "auto"
        if generator.lm != "tiny":
            generator.lm = str(stage / Path(generator.lm).name)
    if train.teacher is not None:
        train.teacher = str(stage / "teacher")
    if config.data.train not in ("synthetic", "dialogue"):
        config.data.train = str(stage / "data")
    train.steps, train.save_every, train.log_every, train.batch_images, train.accumulation = STEPS, STEPS, 1, 4, accumulation
    train.precision, train.num_threads = precision, 1
    optim.lr, optim.eps, optim.clip, optim.weight_decay, optim.adapter_decay = 2e-6, 1e-2, 1.0, 0.0, 0.0
    if model.vision.patches:
        model.vision.patches, config.data.image_size = 2, 128
    if hasattr(model.decoder.loss, "least_iou"):
        model.decoder.loss.least_iou = -1.0
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
            counts: list[dict[str, int]] = []

            def after(*_: Any) -> None:
                counts.append(dict(close))
                close.update(dict.fromkeys(close, 0))

            train_from_config(config, on_step=after)
        (out / "close.json").write_text(json.dumps(counts))
    return out


@contextmanager
def counting_close_decisions() -> Iterator[dict[str, int]]:
    """Yield the numbers of decisions that lie near their threshold: of masked attention, and of ReLUs that are modules."""
    attend, relu, leaky, close = LanguagePart._allowed, nn.ReLU.forward, nn.LeakyReLU.forward, dict.fromkeys(NEAR, 0)

    def attending(self: Any, x: Tensor, mask_level: Tensor) -> Tensor:
        with torch.no_grad():
            prob = (self.heads.mask(self.norm(x)) @ mask_level).sigmoid()
        close["attention"] += int(((prob - 0.5).abs() < NEAR["attention"]).sum())
        return attend(self, x, mask_level)

    def rectified(self: Any, x: Tensor) -> Tensor:
        close["relu"] += int(((x.detach().abs() < NEAR["relu"]) & (x.detach() != 0)).sum())
        return relu(self, x) if isinstance(self, nn.ReLU) else leaky(self, x)

    LanguagePart._allowed = attending  # type: ignore[method-assign]
    nn.ReLU.forward = nn.LeakyReLU.forward = rectified  # type: ignore[method-assign]
    try:
        yield close
    finally:
        LanguagePart._allowed, nn.ReLU.forward, nn.LeakyReLU.forward = attend, relu, leaky  # type: ignore[method-assign]


def several(cases: list[tuple[str, str]], stage: Path, folder: Path, precision: str, processes: int) -> dict[tuple[str, str], Path]:
    """Train (configuration, engine) as several processes, one after the other in one launch, and return their folders.

    Plain data parallelism comes first: Accelerate forgets no DeepSpeed.
    """
    outs = {case: folder / f"{case[0]} {case[1]}" for case in cases}
    for (name, engine), out in outs.items():
        config, zero = exact(name, stage, engine, precision), ENGINES[engine]
        config.train.out = str(out)
        config.train.deepspeed = write_json(folder, f"{engine}.json", **zero) if zero is not None else None
        save_config(config, Path(f"{out}.yaml"))
    program = [str(Path(__file__)), *(f"{out}.yaml" for out in outs.values())]
    status, shown = launch_program(folder, program, limit_s=3000, processes=processes)
    assert status == 0, shown[-6000:]
    return outs


def worst_differences(ours: Path, theirs: Path) -> dict[str, float]:
    """Return the largest relative differences: of a loss term, of the gradient's norm, and of both in steps that rounding decides."""
    found, expected = losses(ours), losses(theirs)
    assert [sorted(line) for line in found] == [sorted(line) for line in expected] and len(found) == STEPS
    counts = json.loads((theirs / "close.json").read_text())
    worst = dict.fromkeys(("loss", "norm", "decided loss", "decided norm"), 0.0)
    clean = any(not count["attention"] for count in counts)  # else every step must agree as if rounding decided nothing
    for line, other, count in zip(found, expected, counts, strict=True):
        for key in line:
            norm = key == "grad_norm"
            decided = (clean and count["attention"]) or (norm and count["relu"])
            kind = ("decided " if decided else "") + ("norm" if norm else "loss")
            worst[kind] = max(worst[kind], abs(line[key] - other[key]) / max(abs(other[key]), 1e-6))
    return worst


def bounds_of(name: str) -> dict[str, float]:
    """Return what the differences of a configuration may be at most in float32."""
    model = load_config(FILES[name]).model
    most = FUSED if model.vision.fusion != "none" or model.map_norm == "batch" else EXACT
    return {"loss": most, "norm": NORM * most, "decided loss": max(most, DECIDED_BY_ROUNDING), "decided norm": max(NORM * most, KINK)}


def unreached(name: str, out: Path) -> list[str]:
    """Return the trained weights that no gradient but zero has reached; the first moments tell."""
    moments = load_file(out / "checkpoints" / f"step_{STEPS:08d}" / "optimizer.safetensors")
    states = [(*key.split("/"), value) for key, value in moments.items()]
    reached = {name for kind, name, value in states if kind in MOMENTS and bool(value.any())}
    missed = set(json.loads((out / "trained.json").read_text())) - reached
    unasked = {key for key in missed if name in UNASKED and UNASKED[name].match(key)}
    assert unasked or name not in UNASKED, f"every weight of {name} is reached"
    return sorted(key for key in missed - unasked if not DEAD.fullmatch(key))


def rounded_differences(ours: Path, theirs: Path) -> dict[str, float]:
    """Return the largest differences in bfloat16: of a loss term, relative to the sum of all, and of the gradient's norm."""
    found, expected = losses(ours), losses(theirs)
    assert [sorted(line) for line in found] == [sorted(line) for line in expected] and len(found) == STEPS
    worst = {"loss": 0.0, "norm": 0.0}
    for line, other in zip(found, expected, strict=True):
        for key in line:
            kind, of = ("norm", "grad_norm") if key == "grad_norm" else ("loss", "loss/total")
            worst[kind] = max(worst[kind], abs(line[key] - other[key]) / other[of])
    return worst


def compare(cases: list[tuple[str, str]], stage: Path, folder: Path, precision: str = "fp32", processes: int = 2) -> None:
    """Require of several processes the losses of one, nearly its gradient norm, and a gradient for every trained weight."""
    far, still = dict[tuple[str, str], dict[str, float]](), {}
    differences = rounded_differences if precision == "bf16" else worst_differences
    for (name, engine), out in several(cases, stage, folder, precision, processes).items():
        gaps = differences(out, one(name, stage, engine, precision))
        print(f"{precision} {engine}: {name}", *(f"{kind} {gap:.1e}" for kind, gap in gaps.items()))
        if any(gaps[kind] > most for kind, most in (IN_BF16 if precision == "bf16" else bounds_of(name)).items()):
            far[name, engine] = gaps
        if names := unreached(name, out):
            still[name, engine] = names
    assert far == {}
    assert still == {}


@pytest.mark.long
def test_two_processes_equal_one(stage: Path, tmp_path: Path) -> None:
    """Our own decoder with Muon; ReLA with a named language model, whole, in partitions, and in partitions within a node."""
    joint = "joint_rela_r50_qwen2.5_0.5b"
    compare([("demo", "DDP"), (joint, "DDP"), (joint, "ZeRO-3"), (joint, HPZ)], stage, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("engine", EVERYWHERE)
def test_every_configuration(engine: str, stage: Path, tmp_path: Path) -> None:
    """Losses within 1e-5 over ten steps, and a gradient for every weight; what ZeRO-3 cannot hold is refused."""
    cases, seen = [], set()
    for name in FILES:
        config = exact(name, stage, engine, "fp32")
        if "ZeRO-3" in engine and "qlora" in name:
            config.train.deepspeed = write_json(tmp_path, "refused.json", **PARTS)
            with pytest.raises(GrexError, match="quantisation nf4 with ZeRO-3"):
                train_from_config(config)
        elif repr(config) not in seen:
            cases.append((name, engine))
        seen.add(repr(config))
    compare(cases, stage, tmp_path)


@pytest.mark.long
def test_two_nodes_with_a_copy_of_the_weights_each(stage: Path, tmp_path: Path) -> None:
    """Four processes in two groups, as `zero_hpz_partition_size` has it: our decoder, ReLA, and ReLA with a named language model."""
    names = ["demo", "gres_rela_r50", "joint_rela_r50_qwen2.5_0.5b"]
    compare([(name, HPZ) for name in names], stage, tmp_path, processes=4)


@pytest.mark.long
def test_bfloat16(stage: Path, tmp_path: Path) -> None:
    """Autocast rounds each process's gradients to 8 bits, and their sums differently."""
    names = ["demo", "gres_rela_swin_base", "joint_rela_swin_base_qwen2.5_7b"]
    compare([(name, engine) for engine in ("DDP", "ZeRO-2", "ZeRO-3") for name in names], stage, tmp_path, "bf16")


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
