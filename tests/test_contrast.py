"""Object sets and expressions in one space: the loss by hand, its weight in the step, and model folders without it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_step import built
from tiny import tiny_config

from grex_mllm.errors import GrexError
from grex_mllm.models.contrast import SetContrast
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.text import train_text_tokenizer
from grex_mllm.training.step import Step


def test_the_loss_by_hand() -> None:
    """Two images. In the first: set {0} twice, set {1}, and nothing; the same set is no rival, and nothing is a rival of sets alone."""
    module = SetContrast(2, 2)
    module.sets = module.sentences = torch.nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        module.scale.fill_(0.0)
    right, up = [1.0, 0.0], [0.0, 1.0]
    sets, sentences = torch.tensor([right, right, up, right, up]), torch.tensor([right, up, up, right, right])
    targets = [torch.tensor([0]), torch.tensor([0]), torch.tensor([1]), torch.tensor([], dtype=torch.int64), torch.tensor([0])]
    got = module(sets, sentences, torch.tensor([0, 0, 0, 0, 1]), targets)
    e = math.e
    rows = [e / (e + 1 + e), 1 / (1 + 1 + e), e / (e + 1 + e + 1)]  # each set: its own expression, those of other sets, and nothing's
    columns = [e / (e + 1), 1 / (1 + e), e / (e + 1 + 1)]
    assert got.item() == pytest.approx(-sum(math.log(value) for value in [*rows, *columns, 1.0, 1.0]) / 8, rel=1e-5)


def test_a_batch_without_any_target_gives_zero_with_gradients() -> None:
    module = SetContrast(2, 3)
    loss = module(torch.zeros(2, 2), torch.randn(2, 3), torch.tensor([0, 1]), [torch.zeros(0, dtype=torch.int64)] * 2)
    loss.backward()
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_sets_are_the_mean_of_their_tokens_and_the_weight_arrives(tmp_path: Path) -> None:
    model, batches = built("contrast", tmp_path)
    batch, step = batches.at(0), Step(model, model.config).eval()
    maps = model.grounding.language_free(model.grounding.encode_image(batch.image, batch.input_sizes))
    sets = model.generator.set_features(maps, batch)
    sizes = torch.tensor(batch.input_sizes)
    tokens = model.generator.region_tokens(maps, batch.instance_masks, sizes, batch.instance_boxes_norm).tokens
    for row, image, targets in zip(sets, batch.image_index, batch.target_index, strict=True):
        torch.testing.assert_close(row, tokens[image, targets].mean(0) if len(targets) else torch.zeros_like(row))
    terms = step(batch)
    step.loss = replace(step.loss, contrast=2.5)
    torch.testing.assert_close(step(batch)["total"] - terms["total"], 2.0 * terms["contrast"])


def test_no_model_folder_holds_it_and_it_needs_a_generator(tmp_path: Path) -> None:
    model, _ = built("contrast", tmp_path / "lm")
    model.save_pretrained(tmp_path / "model")
    again = GrexModel.from_pretrained(tmp_path / "model")
    assert again.config.loss.contrast == 0.5 and not any("contrast" in name for name in again.saved_state())
    config = tiny_config(loss__contrast=0.5, model__generator="null")
    with pytest.raises(GrexError, match=r"loss\.contrast is 0\.5 with a generator that gives no features of object sets"):
        GrexModel(config, train_text_tokenizer(["a"], 300))
