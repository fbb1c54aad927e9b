"""`train.tasks: align` and `words`: the projector learns alone, resumes exactly, and the joint training goes on from it with everything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_family_training import eight_sets
from test_fused_generator import FUSED, GENERATOR
from test_generator import TEXTS
from tiny import tiny_config
from tiny_llms import write_llm

from grex_mllm.config import Config
from grex_mllm.errors import GrexError
from grex_mllm.models.lm_framing import INSTRUCTION
from grex_mllm.training.run import train_from_config

STEPS = 6


class Stopped(BaseException):
    """Ends a run after a step."""


def stop_after(last: int) -> object:
    def after(step: int, _: dict[str, float]) -> None:
        if step == last:
            raise Stopped

    return after


def settings(work: Path, out: str, **changes: object) -> Config:
    """A fused Swin with a named language model."""
    lm = work / "lm"
    if not lm.exists():
        write_llm("qwen3", lm, [*TEXTS, INSTRUCTION] * 2)
        eight_sets(work / "data")
    training: dict[str, object] = {
        "data__train": work / "data", "train__out": work / out, "train__steps": STEPS, "train__batch_images": 2, "train__precision": "fp32",
        "train__num_threads": 1, "train__save_every": 3, "train__log_every": 1, "train__tasks": "align", "train__optim__lr": 1e-2,
        "train__optim__weight_decay": 0.1, "train__optim__adapter_decay": 0.1, "model__generator__lm": lm,
    }  # fmt: skip
    return tiny_config(**{**GENERATOR, **FUSED, **training, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the parts of which some tensor is another."""
    names = {name for name, value in before.items() if not torch.equal(value, after[name])}
    return {".".join(name.split(".")[:2]) for name in names}


def test_the_projector_learns_alone_and_the_joint_training_goes_on(tmp_path: Path) -> None:
    train_from_config(settings(tmp_path, "start", train__steps=1, train__optim__lr=0))
    result = train_from_config(settings(tmp_path, "aligned"))
    first = weights(tmp_path / "start")
    aligned = weights(tmp_path / "aligned")
    assert changed(first, aligned) == {"generator.region_tokens"}
    assert all(not torch.equal(value, aligned[name]) for name, value in first.items() if "region_tokens.project" in name)
    rows = [line["loss/generate/lm"] for line in result.lines]
    assert rows[-1] < 0.9 * rows[0] and not any("ground/" in name for name in result.lines[0])
    joint = settings(tmp_path, "joint", train__tasks="all", train__start=tmp_path / "aligned", train__optim__lr=1e-3)
    lines = train_from_config(joint).lines
    assert lines[0]["loss/generate/lm"] == pytest.approx(rows[-1], rel=0.3)
    parts = {"generator.region_tokens", "generator.lm", *(f"grounding.{part}" for part in ("vision", "text", "decoder", "pixel_decoder"))}
    assert changed(aligned, weights(tmp_path / "joint")) == parts


def test_words_are_learned_before_the_language_model_is_read(tmp_path: Path) -> None:
    """By the same part, at lower cost: no term of the language model; what leads to its words and to its ranks learns, and stays there."""
    known = {"train__tasks": "words", "model__generator__words": 150, "model__generator__ranks": "true"}
    train_from_config(settings(tmp_path, "start", train__steps=1, train__optim__lr=0, **known))
    result = train_from_config(settings(tmp_path, "worded", **known, train__steps=40))
    first, worded = weights(tmp_path / "start"), weights(tmp_path / "worded")
    assert changed(first, worded) == {"generator.region_tokens"}
    moved = {name for name, value in first.items() if not torch.equal(value, worded[name])}
    for part in ("word_query.weight", "ranked.query.weight", "ranked.set_query.1.weight", "ranked.objects.0.weight", "ranked.sets.0.weight",
                 "kinds.query.0.weight", "kinds.often", "kinds.limit", "project.0.weight", "count.weight"):  # fmt: skip
        assert f"generator.region_tokens.{part}" in moved, part
    losses = [line["loss/generate/words"] for line in result.lines]
    assert losses[-1] < 0.85 * losses[0] and not any("generate/lm" in name for line in result.lines for name in line)
    aligned = settings(tmp_path, "aligned", train__start=tmp_path / "worded", **{**known, "train__tasks": "align"})
    assert train_from_config(aligned).lines[0]["loss/generate/words"] < 0.9 * losses[0]


def test_words_want_some(tmp_path: Path) -> None:
    with pytest.raises(GrexError, match=r"train.tasks is words with a generator that learns none"):
        train_from_config(settings(tmp_path, "out", train__tasks="words"))


def test_an_interrupted_alignment_goes_on_exactly(tmp_path: Path) -> None:
    train_from_config(settings(tmp_path, "whole"))
    with pytest.raises(Stopped):
        train_from_config(settings(tmp_path, "cut"), on_step=stop_after(4))  # type: ignore[arg-type]
    result = train_from_config(settings(tmp_path, "cut", train__resume=True))
    assert result.resumed_from == 3 and changed(weights(tmp_path / "whole"), weights(tmp_path / "cut")) == set()


def test_named_parts_are_frozen(tmp_path: Path) -> None:
    """A stage of the image encoder and the text encoder; an unknown name is refused."""
    train_from_config(settings(tmp_path, "start", train__steps=1, train__optim__lr=0))
    frozen = ["grounding.vision.stages.0", "grounding.text"]
    train_from_config(settings(tmp_path, "partly", train__tasks="ground", train__steps=2, train__optim__frozen=frozen))
    first, after = weights(tmp_path / "start"), weights(tmp_path / "partly")
    moved = {name for name, value in first.items() if not torch.equal(value, after[name])}
    assert not any(name.startswith(tuple(frozen)) for name in moved)
    assert any(name.startswith("grounding.vision.stages.1") for name in moved)
    with pytest.raises(GrexError, match=r"frozen names grounding.wision; expected the start of a parameter's name"):
        train_from_config(settings(tmp_path, "none", train__tasks="ground", train__steps=1, train__optim__frozen=["grounding.wision"]))


def test_a_generator_without_a_projector_cannot_be_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent / "examples")
    config = tiny_config(model__generator__name="generator_example", data__train=eight_sets(tmp_path / "data"), train__tasks="align",
                         train__out=tmp_path / "run", train__steps=1, train__batch_images=1)  # fmt: skip
    with pytest.raises(GrexError, match=r"align with model.generator.name generator_example; expected a generator with a `projector`"):
        train_from_config(config)
