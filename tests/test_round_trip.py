"""The round trip as a loss: rewards are those of re-ranking, the better expression becomes likelier, and nothing else moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_step import built
from tiny import tiny_config

from grex_mllm.errors import GrexError
from grex_mllm.models import round_trip as module
from grex_mllm.models.describe import agreements
from grex_mllm.models.grex import GrexModel
from grex_mllm.training.combinations import check_combinations
from grex_mllm.training.step import Step


def maps_of(model: GrexModel, batch: Any) -> list[torch.Tensor]:
    return model.grounding.language_free(model.grounding.encode_image(batch.image, batch.input_sizes))


def test_the_loss_is_the_gain_over_greedy_times_the_likelihood(tmp_path: Path) -> None:
    """The expressions are drawn anew here with the seed that the loss draws, and rewarded one by one with the model in evaluation mode."""
    model, batches = built("round trip", tmp_path)
    batch, model = batches.at(0), model.train()
    part, sizes = batch.generation, torch.tensor(batch.input_sizes)
    torch.manual_seed(3)
    got = module.round_trip(model, maps_of(model, batch), batch)
    assert all(each.training for each in model.modules())
    model.eval()
    torch.manual_seed(3)
    seed = int(torch.randint(module.SEEDS, ()))
    shown = (maps_of(model, batch), batch.instance_masks, part.image_index, part.target_index)
    drawn = {"valid_sizes": sizes, "instance_boxes_norm": batch.instance_boxes_norm}
    sampled = [one[0] for one in model.generator.generate_batch(*shown, mode="sample", seed=seed, **drawn)]
    greedy = [one[0] for one in model.generator.generate_batch(*shown, **drawn)]
    assert sampled != greedy
    features = model.grounding.encode_image(batch.image, batch.input_sizes)
    gains = []
    for row, (image, targets) in enumerate(zip(part.image_index, part.target_index, strict=True)):
        pair = []
        for text in (sampled[row], greedy[row]):
            with torch.no_grad():
                output = model.grounding.ground(features, image[None], *model.encode_text([text]))
            masks = batch.instance_masks[image]
            found = agreements(output, masks, [targets.tolist()], features.padded_size, features.input_size)
            pair.append(float(found[0, 0]) if text.strip() else 0.0)
        gains.append(pair[0] - pair[1])
    assert max(map(abs, gains)) > 1e-4
    model.train()
    ids, mask = model.generator.tokenizer.encode(sampled)
    out = model.generator.likelihood(*shown, lm_ids=ids, lm_mask=mask, **drawn)
    wanted = -(torch.tensor(gains) * out.log_likelihood / out.num_tokens).mean()
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("better", ["sample", "greedy"])
def test_the_better_expression_becomes_likelier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, better: str) -> None:
    model, batches = built("round trip", tmp_path)
    batch = batches.at(0)
    part, written = batch.generation, list[str]()

    def heard(model: Any, batch: Any, texts: list[str], image_index: torch.Tensor, targets: Any) -> torch.Tensor:
        half = len(texts) // 2
        written.extend(texts[:half])
        return torch.cat([torch.full((half,), float(better == "sample")), torch.full((half,), float(better == "greedy"))])

    monkeypatch.setattr(module, "heard", heard)
    loss = module.round_trip(model, maps_of(model, batch), batch)
    loss.backward()
    grounding = [name for name, p in model.grounding.named_parameters() if p.grad is not None and p.grad.any()]
    assert grounding and not [name for name in grounding if name.startswith(("text.", "decoder."))]

    def likelihood() -> float:
        ids, mask = model.generator.tokenizer.encode(written)
        options = {"valid_sizes": torch.tensor(batch.input_sizes), "instance_boxes_norm": batch.instance_boxes_norm}
        shown = (maps_of(model, batch), batch.instance_masks, part.image_index, part.target_index)
        with torch.no_grad():
            out = model.generator.likelihood(*shown, lm_ids=ids, lm_mask=mask, **options)
        return float((out.log_likelihood / out.num_tokens).mean())

    before = likelihood()
    with torch.no_grad():
        for parameter in model.generator.parameters():
            if parameter.grad is not None:
                parameter -= 1e-2 * parameter.grad
    assert (likelihood() > before) is (better == "sample") and likelihood() != before


def test_blank_expressions_earn_nothing_and_images_are_not_mixed(tmp_path: Path) -> None:
    model, batches = built("round trip", tmp_path)
    batch, model = batches.at(0), model.eval()
    index, targets = torch.tensor([2, 0, 0]), [torch.tensor([0])] * 3
    with torch.no_grad():
        found = module.heard(model, batch, ["red circle", " ", "red circle"], index, targets)
        alone = [module.heard(model, batch, ["red circle"], index[i : i + 1], targets[:1]) for i in (0, 2)]
    assert found[1] == 0 and found[0] > 0
    torch.testing.assert_close(found[[0, 2]], torch.cat(alone), rtol=1e-4, atol=1e-6)


def test_a_text_without_a_word_ends_at_once(tmp_path: Path) -> None:
    tokenizer = built("round trip", tmp_path)[0].generator.tokenizer
    ids, mask = module.written(tokenizer, ["", "red circle", "  "])
    alone, _ = tokenizer.encode(["red circle"])
    for row in (0, 2):
        assert ids[row, :2].tolist() == [tokenizer.bos_id, tokenizer.eos_id] and mask[row].tolist() == [1, 1] + [0] * (ids.shape[1] - 2)
    assert torch.equal(ids[1], alone[0]) and mask[1].all()


def test_it_starts_late_and_its_weight_arrives(tmp_path: Path) -> None:
    model, batches = built("round trip", tmp_path)
    batch, step = batches.at(0), Step(model, model.config).eval()
    assert "round_trip" not in step(batch, 0.5)  # a validation draws nothing
    assert "round_trip" not in step.train()(batch, 0.49)
    totals = []
    for weight in (2.0, 5.0):
        step.loss = replace(step.loss, round_trip=weight)
        torch.manual_seed(0)
        terms = step(batch, 0.5)
        totals.append(terms["total"])
    torch.testing.assert_close(totals[1] - totals[0], 3.0 * terms["round_trip"], rtol=1e-3, atol=1e-5)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GrexError, match=r"loss\.round_trip is -1"):
        check_combinations(tiny_config(loss__round_trip=-1.0))
    writing = {"loss__round_trip": 1.0, "model__generator__lm": "tiny"}
    with pytest.raises(GrexError, match=r"train\.tasks: all"):
        check_combinations(tiny_config(**writing, train__tasks="generate"))
    with pytest.raises(GrexError, match="does not score texts"):
        check_combinations(tiny_config(loss__round_trip=1.0, model__generator__name="mllm"))
    stage = tmp_path / "zero3.json"
    stage.write_text('{"zero_optimization": {"stage": 3}}')
    with pytest.raises(GrexError, match=r"with ZeRO-3"):
        check_combinations(tiny_config(**writing, train__deepspeed=str(stage)))
