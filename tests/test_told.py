"""Scenes that are told in words and places: the same tokens as from an image, and training on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_config, tiny_model

from grex_mllm.data.synthetic import SyntheticDataset, corpus
from grex_mllm.data.synthetic.plain import plain_expression
from grex_mllm.errors import GrexError
from grex_mllm.models.decoders.image_regions import told_regions
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.lm_tokenizer import train_sentencepiece
from grex_mllm.models.region_tokens import RegionTokens
from grex_mllm.models.text import train_text_tokenizer
from grex_mllm.training.run import spoken_text, told_batches
from grex_mllm.training.told import train_on_told_scenes

CLASSES = "{shape: 7, colour: 6, size: 2, texture: 3}"


def knowing_model(work: Path, **changes: object) -> GrexModel:
    """A tiny model whose decoder and generator know the attributes of synthetic scenes."""
    given: dict[str, object] = dict(
        model__generator__lm="tiny", model__generator__hidden_size=32, model__generator__num_heads=2, model__generator__num_layers=1,
        model__generator__intermediate_size=32, model__generator__projector_width=32, model__generator__lora_rank=2,
        model__generator__attribute_classes=CLASSES, model__decoder__attribute_classes=CLASSES,
        train__batch_images=2, train__text__scenes=30, train__text__lr=5e-3, train__optim__muon="true", train__optim__muon_lr=1e-2,
        data__expressions_per_image=6,
    )  # fmt: skip
    config = tiny_config(**(given | changes))
    text = train_text_tokenizer(list(corpus(config.data.synthetic, 100)), 300)
    config.model.text.vocab_size = text.vocab_size
    torch.manual_seed(0)
    return GrexModel(config, text, train_sentencepiece(list(corpus(config.data.synthetic, 400)), work, 300))


def test_a_told_object_has_the_token_of_a_seen_one() -> None:
    """With heads that are sure of the true attributes, and nothing learned yet from the look, pixels and words make equal tokens."""
    torch.manual_seed(0)
    tokens = RegionTokens([4], 8, hidden=8, image_grid=0, attribute_classes={"colour": 2, "shape": 3}).eval()
    with torch.no_grad():
        tokens.attribute_head.weight.zero_()
        tokens.attribute_head.bias.copy_(torch.tensor([0.0, 40.0, 40.0, 0.0, 0.0]))
    mask = torch.zeros(2, 16, 20, dtype=torch.bool)
    mask[0, 2:9, 3:6] = mask[1, 4:15, 10:19] = True
    seen = tokens([torch.randn(1, 4, 8, 10)], [mask])
    told = tokens.told([mask], {"colour": [torch.tensor([1, 1])], "shape": [torch.tensor([0, 0])], "age": [torch.tensor([0, 0])]})
    for name in ("tokens", "present", "order", "area"):
        torch.testing.assert_close(getattr(told, name), getattr(seen, name))
    other = tokens.told([mask], {"colour": [torch.tensor([0, -1])], "shape": [torch.tensor([0, 0])]})
    assert not torch.allclose(other.tokens[0, 0], told.tokens[0, 0]) and not torch.allclose(other.tokens[0, 1], told.tokens[0, 1])
    with pytest.raises(GrexError, match="shape"):
        tokens.told([mask], {"colour": [torch.tensor([1, 1])]})


def test_told_regions_are_the_objects_and_nothing_else() -> None:
    boxes = [torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.1, 0.2, 0.1, 0.1]]), torch.tensor([[0.3, 0.3, 0.2, 0.4]])]
    regions = told_regions(boxes, {"colour": [torch.tensor([2, 0]), torch.tensor([1])]}, {"colour": 3}, 5)
    assert (regions.objectness[-1] > 0).tolist() == [[True, True], [True, False]]
    assert regions.attribute_logits["colour"].argmax(-1)[0].tolist() == [2, 0] and not regions.features.any()
    assert regions.features.shape == (2, 2, 5) and regions.geometry.shape[:3] == (2, 2, 2)
    with pytest.raises(GrexError, match="shape"):
        told_regions(boxes, {"colour": []}, {"shape": 3}, 5)


def test_hearing_of_scenes_teaches_language_and_leaves_the_eyes_alone(tmp_path: Path) -> None:
    model = knowing_model(tmp_path)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batches = told_batches(model.config, model)
    losses: list[float] = []
    running = train_on_told_scenes(model, batches, model.config, lambda done, loss: losses.append(loss))
    assert set(running) == {"target", "no_target", "count", "lm"} and len(losses) == 30
    assert losses[-1] < 0.9 * losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("generator.lm.") for name in moved) and not any("lora_" in name for name in moved)
    assert any("decoder.words" in name for name in moved) and any(".text." in name for name in moved)
    assert not any(".vision." in name or "pixel_decoder" in name or "image_regions" in name for name in moved)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all(name.startswith("generator.lm.") and "lora_" not in name for name in frozen)


def test_told_batches_are_a_function_of_their_number(tmp_path: Path) -> None:
    model = knowing_model(tmp_path)
    batches = told_batches(model.config, model)
    first, again, second = batches(0), batches(0), batches(1)
    assert first.expression_ids == again.expression_ids and torch.equal(first.text_ids, again.text_ids)
    assert first.image_ids != second.image_ids


def test_told_scenes_need_a_part_that_knows_attributes(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.train.text.scenes = 1
    with pytest.raises(GrexError, match="attribute_classes"):
        train_on_told_scenes(model, lambda index: None, model.config)  # type: ignore[arg-type, return-value]


def test_lines_for_the_language_model_are_mostly_plain() -> None:
    config = tiny_config(data__expressions_per_image=4)
    lines = spoken_text(config)
    assert len(lines) >= 30_000 and sum(line.startswith("the small") or line.startswith("all small") for line in lines) > 5_000


def test_plain_speech_is_exact_and_says_what_the_objects_share() -> None:
    from grex_mllm.data.synthetic import check_expression

    data = SyntheticDataset(tiny_config().data.synthetic, "val", 200, 6)
    said, words = 0, 0
    for i in range(60):
        sample = data[i]
        for record in sample.expressions:
            if not record.targets:
                assert plain_expression(sample, []) is None
                continue
            text = plain_expression(sample, record.targets)
            if text is not None:
                assert check_expression(text, sample, record.targets) == "exact"
                assert text == plain_expression(sample, list(reversed(record.targets)))
                said, words = said + 1, words + len(text.split())
    assert said > 240 and 5 < words / said < 9
