"""Maps of a frozen image encoder are computed once for each view, and change the losses by float16's rounding alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import WORDS, tiny_config
from tiny_folder import tiny_folder

from grex_mllm.data.sources import training_samples
from grex_mllm.errors import GrexError
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.lm_tokenizer import train_sentencepiece
from grex_mllm.models.text import train_text_tokenizer
from grex_mllm.training.batches import BatchStream
from grex_mllm.training.run import batch_stream
from grex_mllm.training.step import Step

Build = Callable[..., tuple[GrexModel, BatchStream]]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Make a tiny model with a generator, and batches of two mirrored or plain images of a folder; the image encoder is frozen."""
    folder = tiny_folder(tmp_path / "d")

    def made(**changes: object) -> tuple[GrexModel, BatchStream]:
        config = tiny_config(model__generator__lm="tiny", model__generator__hidden_size=16, model__generator__num_heads=2,
                             model__generator__num_layers=1, model__generator__intermediate_size=32, model__generator__projector_width=16,
                             model__generator__lora_rank=2, data__expressions_per_image=1, data__train=folder, data__resize="pad",
                             train__batch_images=2, **changes)  # fmt: skip
        text = train_text_tokenizer(WORDS, 300)
        config.model.text.vocab_size = text.vocab_size
        torch.manual_seed(0)
        model = GrexModel(config, text, train_sentencepiece(WORDS * 5, tmp_path, 300))
        model.grounding.vision.requires_grad_(False)
        samples = training_samples(config.data, 0, 100, generates=True)
        return model, batch_stream(config, samples, text, model.generator.tokenizer)

    return made


@pytest.mark.parametrize("tasks", ["all", "ground", "generate"])
@pytest.mark.parametrize("flip", [0.0, 0.5])
def test_kept_maps_give_the_same_losses_and_gradients(build: Build, tasks: str, flip: float) -> None:
    changes = {"data__augment__flip": flip, "train__tasks": tasks}
    model, batches = build(**changes)
    plain = Step(model, model.config)
    model.config.data.feature_cache = 0.5
    kept = Step(model, model.config)
    assert kept.kept_maps is not None and plain.kept_maps is None
    for number in range(6):  # of three expressions in an epoch, on one image of the training split
        found = []
        for step in (plain, kept):
            model.zero_grad()
            terms = step(batches.at(number))
            terms["total"].backward()
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            found.append((terms, torch.cat(gradients)))
        for name, value in found[0][0].items():
            assert torch.allclose(found[1][0][name], value, rtol=5e-3, atol=1e-4), name
        difference = float((found[0][1] - found[1][1]).norm() / found[0][1].norm())
        assert 0 < difference < 2e-2, "rounded to float16, also the first time"
    views = {"plain", "flip"} if flip else {"plain"}
    assert {"flip" if str(view).endswith("/flip") else "plain" for view in kept.kept_maps.kept} == views
    assert kept.kept_maps.num_computed == len(views)


def test_what_finds_no_room_is_computed_each_time_with_the_same_result(build: Build) -> None:
    model, batches = build(data__feature_cache=1e-9)
    crowded = Step(model, model.config).eval()
    model.config.data.feature_cache = 0.5
    roomy = Step(model, model.config).eval()
    for number in range(3):
        first, second = crowded(batches.at(number)), roomy(batches.at(number))
        assert all(torch.allclose(second[name], value, rtol=1e-5) for name, value in first.items())
    assert crowded.kept_maps is not None and crowded.kept_maps.num_computed == 3 and not crowded.kept_maps.kept
    assert roomy.kept_maps is not None and roomy.kept_maps.num_computed == 1


def test_views_that_never_come_again_are_not_kept(build: Build) -> None:
    model, batches = build(data__feature_cache=0.5, data__augment__colour=1.0)
    step = Step(model, model.config)
    step(batches.at(0))
    assert step.kept_maps is not None and not step.kept_maps.kept and step.kept_maps.num_computed == 2


def test_an_encoder_whose_maps_change_is_refused(build: Build) -> None:
    model, batches = build(data__feature_cache=0.5)
    step = Step(model, model.config)
    next(model.grounding.vision.parameters()).requires_grad_(True)
    with pytest.raises(GrexError, match=r"the image encoder trains; expected a frozen one; set train\.optim\.frozen"):
        step(batches.at(0))
    model.grounding.vision.requires_grad_(False)
    dropped = torch.nn.Dropout(0.5)
    hook = model.grounding.vision.register_forward_hook(lambda module, inputs, maps: [dropped(level) for level in maps])
    with pytest.raises(GrexError, match="gives an image other maps each time"):
        step(batches.at(0))
    hook.remove()
    step(batches.at(0))
