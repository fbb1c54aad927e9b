"""What every entry of GENERATORS must give, and the worked example of one: training, generation, saving, batches without a target."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import WORDS, tiny_config
from tiny_mllms import write_mllm

from grex_mllm.config import load_config
from grex_mllm.data.collate import collate
from grex_mllm.data.synthetic import SyntheticDataset
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.entries import CONTRACTS, GENERATORS, entry
from grex_mllm.errors import GrexError
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.text import train_text_tokenizer
from grex_mllm.training.run import train_from_config
from grex_mllm.training.step import Step
from grex_mllm.types import Batch

EXAMPLE = "examples.generator_example"
SMALL: dict[str, dict[str, object]] = {
    "region_tokens": {
        "lm": "tiny", "vocab_size": 300, "hidden_size": 16, "num_heads": 2, "num_layers": 1, "intermediate_size": 32,
        "projector_width": 16, "lora_rank": 2, "max_new_tokens": 6,
    },
    "mllm": {"projector_width": 16, "lora_rank": 2, "max_new_tokens": 6},
}  # fmt: skip


FOLDERS: dict[str, Path] = {}  # of models that an entry reads


@pytest.fixture(params=[*GENERATORS, EXAMPLE])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    if request.param == "mllm" and not FOLDERS:
        FOLDERS["mllm"] = write_mllm("qwen2.5-vl", tmp_path_factory.mktemp("mllm"), WORDS * 3)
    return request.param


def changes_of(name: str) -> dict[str, object]:
    fields = SMALL.get(name, {}) | ({"lm": FOLDERS[name]} if name in FOLDERS else {})
    return {"model__generator__name": name} | {f"model__generator__{field}": value for field, value in fields.items()}


def model_of(name: str, folder: Path) -> GrexModel:
    config = tiny_config(**changes_of(name))
    text = train_text_tokenizer(WORDS, 300)
    config.model.text.vocab_size = text.vocab_size
    module = entry("model.generator", name)
    folder.mkdir()
    module.make_tokenizer(config.model.generator, lambda: WORDS * 5, folder)
    torch.manual_seed(0)
    return GrexModel(config, text, module.load_tokenizer(config.model.generator, folder))


def batch_of(model: GrexModel, no_target: float) -> Batch:
    chosen = partial(entry("model.generator", model.config.model.generator.name).collate, model.config.model.generator)
    data = SyntheticDataset(SyntheticConfig(image_size=64, no_target_share=no_target), "train", 100, 4)
    samples = [data[i] for i in range(2)]
    if no_target:
        for sample in samples:
            sample.expressions[:] = [e for e in sample.expressions if not e.targets]
    return collate(samples, model.encode_text, partial(chosen, model.generator.tokenizer), image_size=64)


def test_the_entry_has_the_names_of_the_contract(name: str) -> None:
    module = entry("model.generator", name)
    assert all(hasattr(module, part) for part in CONTRACTS["model.generator"][1])
    assert module.Config().name == name.rpartition(".")[2]


@pytest.mark.parametrize("no_target", [0.0, 0.9], ids=["targets", "no target at all"])
@pytest.mark.parametrize("early", [False, True])
def test_every_weight_takes_part_in_every_step(name: str, no_target: float, early: bool, tmp_path: Path) -> None:
    model = model_of(name, tmp_path / "lm").train()
    model.config.loss.generate_start = 0.5
    terms = Step(model, model.config)(batch_of(model, no_target), 0.0 if early else 1.0)
    terms["total"].backward()
    assert bool(terms["total"].isfinite())
    trained = {n: p for n, p in model.generator.named_parameters() if p.requires_grad}
    assert trained and [n for n, p in trained.items() if p.grad is None or not bool(p.grad.isfinite().all())] == []
    if no_target == 0.0 and not early:
        assert any(p.grad.any() for p in trained.values() if p.grad is not None)


def test_sets_are_described_one_by_one_or_together_and_after_saving(name: str, tmp_path: Path) -> None:
    model = model_of(name, tmp_path / "lm").eval()
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    boxes, sets = [[2, 2, 12, 12], [30, 10, 50, 30], [20, 25, 28, 38]], [[0], [1, 2], [0, 1, 2]]
    together = model.describe(image, boxes_xyxy=boxes, object_sets=sets)
    assert len(together) == 3 and all(isinstance(text, str) for text in together)
    assert together == [model.describe(image, boxes_xyxy=boxes, object_sets=[one])[0] for one in sets]
    details = model.describe(image, boxes_xyxy=boxes[:1], candidates=3, rerank="listener", details=True)
    assert details.score is not None or details.expression == ""
    model.save_pretrained(tmp_path / "m")
    assert GrexModel.from_pretrained(tmp_path / "m").describe(image, boxes_xyxy=boxes, object_sets=sets) == together


def test_it_trains_from_a_configuration(name: str, tmp_path: Path) -> None:
    config = tiny_config(**changes_of(name), data__sources__synthetic__image_size=64, data__expressions_per_image=3, train__steps=2,
                         train__batch_images=2, train__precision="fp32", train__out=tmp_path / "run")  # fmt: skip
    result = train_from_config(config)
    assert result.steps == 2 and any(key.startswith("loss/generate/") for key in result.lines[-1])
    assert GrexModel.from_pretrained(tmp_path / "run").config.model.generator.name == name


def test_the_example_answers_from_its_template(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    model = model_of(EXAMPLE, tmp_path / "lm").eval()
    image = np.zeros((40, 60, 3), np.uint8)
    assert model.describe(image, boxes_xyxy=[[2, 2, 12, 12]]) == "the one object on the left"
    assert model.describe(image, boxes_xyxy=[[45, 2, 55, 12], [50, 20, 59, 30]]) == "the two objects on the right"


def test_a_generator_that_is_none() -> None:
    assert load_config(None, []).model.generator is None
    with pytest.raises(GrexError, match=r"model\.generator is 3; expected a mapping"):
        load_config(None, ["--model.generator=3"])
    assert load_config(None, ["--model.generator.lm=tiny"]).model.generator.name == "region_tokens"
