"""Attribute pre-training: the same tokens as from an image, and training on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_config

from grex_mllm.data.sources import training_samples, training_text
from grex_mllm.data.synthetic import SyntheticDataset, corpus
from grex_mllm.data.synthetic.canonical import canonical_expression
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.errors import GrexError
from grex_mllm.models.generators.region_tokens.tokens import RegionTokens
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.lm_tokenizer import train_sentencepiece
from grex_mllm.models.text import train_text_tokenizer
from grex_mllm.training.pretraining import attribute_tokens, stages
from grex_mllm.training.run import batch_stream, pretraining_stages
from grex_mllm.training.stages import Stage
from grex_mllm.training.step import Step

CLASSES = "{shape: 7, colour: 6, size: 2, texture: 3}"


def knowing_model(work: Path, **changes: object) -> GrexModel:
    """A tiny model whose decoder and generator know the attributes of synthetic scenes."""
    given: dict[str, object] = dict(
        model__generator__lm="tiny", model__generator__hidden_size=32, model__generator__num_heads=2, model__generator__num_layers=1,
        model__generator__intermediate_size=32, model__generator__projector_width=32, model__generator__lora_rank=2,
        model__generator__attribute_classes=CLASSES, model__generator__vocab_size=400, model__decoder__attribute_classes=CLASSES,
        train__batch_images=2, train__pretraining__scenes=30, train__pretraining__lr=5e-3,
        train__optim__muon="true", train__optim__muon_lr=1e-2,
        data__expressions_per_image=6,
    )  # fmt: skip
    config = tiny_config(**(given | changes))
    text = train_text_tokenizer(list(corpus(SyntheticConfig(), 100)), 300)
    config.model.text.vocab_size = text.vocab_size
    torch.manual_seed(0)
    return GrexModel(config, text, train_sentencepiece(list(corpus(SyntheticConfig(), 1000)), work, 400))


def stages_of(model: GrexModel) -> list[Stage]:
    return pretraining_stages(model.config, (model.text_tokenizer, model.generator.tokenizer))


def test_an_object_of_known_attributes_has_the_token_of_a_seen_one() -> None:
    """With heads that are sure of the true attributes, and nothing learned yet from the look, pixels and words make equal tokens."""
    torch.manual_seed(0)
    tokens = RegionTokens([4], 8, hidden=8, image_grid=0, attribute_classes={"colour": 2, "shape": 3}).eval()
    with torch.no_grad():
        tokens.attribute_head.weight.zero_()
        tokens.attribute_head.bias.copy_(torch.tensor([0.0, 40.0, 40.0, 0.0, 0.0]))
    mask = torch.zeros(2, 16, 20, dtype=torch.bool)
    mask[0, 2:9, 3:6] = mask[1, 4:15, 10:19] = True
    seen = tokens([torch.randn(1, 4, 8, 10)], [mask])
    given = attribute_tokens(
        tokens, [mask], {"colour": [torch.tensor([1, 1])], "shape": [torch.tensor([0, 0])], "age": [torch.tensor([0, 0])]}
    )
    for name in ("tokens", "present", "order", "area"):
        torch.testing.assert_close(getattr(given, name), getattr(seen, name))
    other = attribute_tokens(tokens, [mask], {"colour": [torch.tensor([0, -1])], "shape": [torch.tensor([0, 0])]})
    assert not torch.allclose(other.tokens[0, 0], given.tokens[0, 0]) and not torch.allclose(other.tokens[0, 1], given.tokens[0, 1])
    with pytest.raises(GrexError, match="shape"):
        attribute_tokens(tokens, [mask], {"colour": [torch.tensor([1, 1])]})


def test_attributes_teach_the_language_model_and_nothing_that_sees(tmp_path: Path) -> None:
    model = knowing_model(tmp_path)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses: list[float] = []
    [stage] = stages_of(model)
    running = stage.run(model, stage.steps, lambda done, loss: losses.append(loss))
    assert running == losses[-1] and len(losses) == 30
    assert losses[-1] < 0.9 * losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("generator.lm.") for name in moved) and not any("lora_" in name for name in moved)
    assert "generator.region_tokens.attribute_embedding.weight" in moved and not any(name.startswith("grounding.") for name in moved)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all(name.startswith("generator.lm.") and "lora_" not in name for name in frozen)


def test_its_batches_are_a_function_of_their_number(tmp_path: Path) -> None:
    [stage] = stages_of(knowing_model(tmp_path))
    batches = stage.run.args[1]  # type: ignore[attr-defined]
    first, again, second = batches.at(0), batches.at(0), batches.at(1)
    assert first.expression_ids == again.expression_ids and torch.equal(first.text_ids, again.text_ids)
    assert first.image_ids != second.image_ids


def test_it_is_the_same_whichever_process_draws_the_batches(tmp_path: Path) -> None:
    """Also where the generator drops objects at random: its numbers come from the seed and the step, not from what was drawn before."""
    learned = []
    for workers, before in ((0, 0), (1, 5)):
        model = knowing_model(tmp_path, data__num_workers=workers, model__generator__distractor_dropout=0.5)
        [stage] = stages_of(model)
        torch.rand(before)  # what a process did earlier does not matter
        learned.append((stage.run(model, 4, None), model.generator.lm.state_dict()))
    assert learned[0][0] == learned[1][0]
    assert all(torch.equal(value, learned[1][1][name]) for name, value in learned[0][1].items())


def test_it_needs_a_part_that_knows_attributes() -> None:
    config = tiny_config(model__generator__lm="tiny", train__pretraining__scenes=1)
    with pytest.raises(GrexError, match="attribute_classes"):
        stages(config, lambda expressions, number: None)  # type: ignore[arg-type, return-value]


def test_lines_for_the_language_model_are_mostly_canonical() -> None:
    config = tiny_config(data__expressions_per_image=4)
    lines = training_text(config.data, 20_000, generation=True)
    assert len(lines) >= 20_000 and sum(line.startswith("the small") or line.startswith("all small") for line in lines) > 3_000


def test_canonical_expressions_are_exact_and_say_what_the_objects_share() -> None:
    from grex_mllm.data.synthetic import check_expression

    data = SyntheticDataset(SyntheticConfig(), "val", 200, 6)
    said, words = 0, 0
    for i in range(60):
        sample = data[i]
        for record in sample.expressions:
            if not record.targets:
                assert canonical_expression(sample, []) is None
                continue
            text = canonical_expression(sample, record.targets)
            if text is not None:
                assert check_expression(text, sample, record.targets) == "exact"
                assert text == canonical_expression(sample, list(reversed(record.targets)))
                said, words = said + 1, words + len(text.split())
    assert said > 240 and 5 < words / said < 9


def test_the_generators_loss_may_begin_later(tmp_path: Path) -> None:
    """Before `loss.generate_start` only the attributes of the objects are learned; from there on the expressions are, too."""
    model = knowing_model(tmp_path, loss__generate_start=0.5, data__num_generation_targets=2)
    samples = training_samples(model.config.data, 0, 100, generates=True)
    batch = batch_stream(model.config, samples, model.text_tokenizer, model.generator.tokenizer).at(0)
    step = Step(model, model.config).train()
    early, late = (step(batch, progress) for progress in (0.49, 0.5))
    attributes = {f"generate/object_{name}" for name in ("shape", "colour", "size", "texture")}
    assert attributes <= early.keys() and "generate/lm" not in early
    assert late.keys() - early.keys() == {"generate/lm"} and late["total"] > early["total"]
    early["total"].backward()
    assert model.generator.region_tokens.attribute_head.weight.grad.abs().sum() > 0
    own = [p.grad for p in model.generator.lm.parameters() if p.requires_grad]
    assert own and all(grad is not None and not grad.any() for grad in own)  # it took part in the step, for nothing
