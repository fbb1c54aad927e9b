"""A generator beside an image encoder that fuses language: trained, it describes, is re-ranked and predicts; and what cannot be trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_config

from grex_mllm import GrexModel
from grex_mllm.config import Config
from grex_mllm.data.dataset import FolderDataset
from grex_mllm.data.synthetic.export import export
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.errors import GrexError
from grex_mllm.models.generators.region_tokens.tokens import RegionTokens
from grex_mllm.predict import predict_split
from grex_mllm.training.combinations import check_combinations
from grex_mllm.training.pretraining import stages
from grex_mllm.training.run import batch_stream, train_from_config
from grex_mllm.training.step import Step

GENERATOR = {
    "model__generator__lm": "tiny", "model__generator__vocab_size": 300, "model__generator__hidden_size": 16,
    "model__generator__num_heads": 2, "model__generator__num_layers": 1, "model__generator__intermediate_size": 32,
    "model__generator__projector_width": 16, "model__generator__max_new_tokens": 6,
}  # fmt: skip
ENCODER = {
    "model__vision__name": "swin", "model__vision__embed_width": 8, "model__vision__swin_depths": "[1, 1, 1, 1]",
    "model__vision__swin_heads": "[1, 1, 2, 2]", "model__vision__window": 4, "model__vision__fusion": "pwam",
}  # fmt: skip
FUSED = ENCODER | {"model__decoder__name": "rela", "model__decoder__num_layers": 2}


def fused(out: Path, data: Path, **changes: object) -> Config:
    training: dict[str, object] = {"data__train": data, "data__train_split": "test", "data__expressions_per_image": 3, "train__out": out}
    training |= {"train__steps": 3, "train__batch_images": 2, "train__precision": "fp32", "train__num_threads": 1}
    return tiny_config(**{**GENERATOR, **FUSED, **training, **changes})


@pytest.mark.parametrize(
    "changes",
    [{}, {"train__tasks": "generate"}, {"model__decoder__ria": "pooled", "model__vision__patches": 10}],
    ids=["both tasks", "generation alone", "hard split"],
)
def test_a_fused_encoder_trains_describes_and_predicts(tmp_path: Path, changes: dict[str, object]) -> None:
    export(SyntheticConfig(image_size=64), "test", 3, tmp_path / "d", 4)
    result = train_from_config(fused(tmp_path / "m", tmp_path / "d", **changes))
    terms = {name for line in result.lines for name in line if name.startswith("loss/")}
    assert any(name.endswith("/lm") for name in terms)
    model = GrexModel.from_pretrained(tmp_path / "m")
    assert model.grounding.fuses_language
    image = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    boxes = [[2, 2, 20, 20], [30, 20, 60, 45]]
    assert isinstance(model.describe(image, boxes_xyxy=boxes), str)
    shown = model.describe(image, boxes_xyxy=boxes, candidates=3, rerank="listener", details=True)
    assert shown.score is None or 0 <= shown.score <= 1
    lines = [
        json.loads(line)
        for line in predict_split(
            str(tmp_path / "m"), str(tmp_path / "d"), tmp_path / "p.jsonl", "test", ["ground", "generate"], listener=2, device="cpu"
        ).read_text().splitlines()
    ]  # fmt: skip
    assert sum("expression_id" in line for line in lines) == 12
    generated = [line for line in lines if "targets" in line]
    assert generated and all({"expression", "listener", "candidates"} <= line.keys() for line in generated)


def test_the_generator_reads_the_maps_that_it_was_trained_on(tmp_path: Path) -> None:
    export(SyntheticConfig(image_size=64), "test", 2, tmp_path / "d", 4)
    train_from_config(fused(tmp_path / "m", tmp_path / "d", train__steps=1))
    model = GrexModel.from_pretrained(tmp_path / "m")
    image = np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    encoded = model.encode(image)
    with torch.inference_mode():
        grounding = model.grounding
        trained_on = grounding.language_free(grounding.normalised(encoded_pixels(image), [(64, 64)]))
        model.ground(encoded, "the red circle")  # language in between leaves no trace
        described_from = grounding.language_free(encoded.features)
    assert len(trained_on) == len(described_from) == 4
    for first, second in zip(trained_on, described_from, strict=True):
        torch.testing.assert_close(first, second)


def test_training_describing_and_predicting_read_one_language_free_pass(tmp_path: Path) -> None:
    """With gates that let language in, the generator's tokens are made from the same maps in every kind of step, `describe`, `predict`."""
    export(SyntheticConfig(image_size=64), "test", 1, tmp_path / "d", 4)
    train_from_config(fused(tmp_path / "m", tmp_path / "d", train__steps=1))
    model = GrexModel.from_pretrained(tmp_path / "m")
    gates = [p for name, p in model.grounding.vision.named_parameters() if "gate" in name.split(".")]
    assert gates
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in gates:
            parameter.copy_(torch.randn_like(parameter))
    model.config.predict.precision = "fp32"
    model.save_pretrained(tmp_path / "open")
    samples, model.config.train.batch_images = FolderDataset(tmp_path / "d", "test", 4), 1
    stream = batch_stream(model.config, samples, model.text_tokenizer, model.generator.tokenizer)
    batch, image = stream.at(0), samples[0].image
    seen: list[list[torch.Tensor]] = []

    def keep(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, RegionTokens):
            seen.append([level[:1].detach().clone() for level in inputs[0]])

    with torch.nn.modules.module.register_module_forward_pre_hook(keep):
        for tasks in ("all", "generate", "align"):
            model.config.train.tasks = tasks
            Step(model, model.config).eval()(batch)
        model.describe(image, boxes_xyxy=[[2, 2, 20, 20], [30, 20, 60, 45]])
        predict_split(str(tmp_path / "open"), str(tmp_path / "d"), tmp_path / "p.jsonl", "test", ["ground", "generate"], device="cpu")
    assert len(seen) >= 5
    for maps in seen[1:]:
        for level, expected in zip(maps, seen[0], strict=True):
            torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        encoded = model.encode(image)
        texts = [model.grounding.encode_text(*model.encode_text([text])) for text in ("the red circle", "two stars")]
        index = torch.zeros(1, dtype=torch.int64)
        told = [model.grounding.vision.finish(encoded.features.prefix, index, text)[-1] for text in texts]
        silent = model.grounding.vision(encoded.features.image, None)[-1]
    assert all((maps - silent).abs().max() > 1e-3 for maps in told) and (told[0] - told[1]).abs().max() > 1e-4


def encoded_pixels(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None]


IMPOSSIBLE: list[tuple[dict[str, object], list[str]]] = [
    ({"train__tasks": "generate"}, ["train.tasks is generate", "model.generator is null", "lm: tiny"]),
    ({"train__tasks": "align"}, ["train.tasks is align", "model.generator is null", "lm: tiny"]),
    ({"train__tasks": "both"}, ['train.tasks is "both"', "all, ground, generate, align, words"]),
    ({"train__pretraining__steps": 3}, ["train.pretraining tiny_lm", "set model.generator"]),
    (GENERATOR | {"train__pretraining__steps": 3, "train__tasks": "ground"}, ["train.pretraining tiny_lm", "leave train.pretraining out"]),
    (GENERATOR | {"data__num_generation_targets": 0}, ["data.num_generation_targets is 0", "at least 1"]),
    (GENERATOR | {"loss__generate_start": 1.0}, ["loss.generate_start is 1", "below 1"]),
    ({"model__vision__fusion": "pwam"}, ["model.vision.fusion is pwam", "name resnet", "swin"]),
    (ENCODER, ["fusion is pwam", "instance_selection", "once in an image", "name to rela"]),
    ({"train__optim__muon": "true", "train__deepspeed": "deepspeed_configs/zero2.json"}, ["muon", "zero2.json", "false"]),
    ({"train__steps": 0}, ["train.steps is 0", "from 1"]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "parts"), IMPOSSIBLE, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_impossible_combinations_are_refused_before_anything_is_done(tmp_path: Path, changes: dict[str, object], parts: list[str]) -> None:
    config = tiny_config(**{"train__out": tmp_path / "run", "data__train": tmp_path / "nowhere", **changes})
    with pytest.raises(GrexError) as caught:
        train_from_config(config)
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)
    assert str(caught.value).count("; ") >= 2 and not list(tmp_path.iterdir())


def test_possible_combinations_pass() -> None:
    check_combinations(Config())
    check_combinations(tiny_config(**GENERATOR))
    check_combinations(tiny_config(**GENERATOR, **FUSED))
    check_combinations(tiny_config(**GENERATOR, train__tasks="generate"))
    check_combinations(tiny_config(model__decoder__name="rela", model__decoder__loss__deep_supervision=0.5))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"train__pretraining__scenes": 3}, ["train.pretraining.scenes is 3", "attribute_classes"]),
        (
            {"train__pretraining__scenes": 3, "model__generator__words": 20, "model__generator__ranks": "true"},
            ["train.pretraining.scenes with model.generator.ranks", "what is seen", "ranks to false"],
        ),
        (
            {"model__generator__lm": "some/model", "train__pretraining__steps": 3},
            ["tiny_lm", "lm some/model", "leave train.pretraining out"],
        ),
    ],
    ids=["no attributes", "ranks", "another language model"],
)
def test_a_pretraining_that_does_not_fit_the_model_is_refused(changes: dict[str, object], parts: list[str]) -> None:
    config = tiny_config(**(GENERATOR | changes))
    with pytest.raises(GrexError) as caught:
        stages(config, lambda expressions, number: None)  # type: ignore[arg-type, return-value]
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)
