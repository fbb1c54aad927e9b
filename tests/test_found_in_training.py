"""`found_share`: in training, too, the objects beside a set are those that the decoder finds, chosen as `describe` chooses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_step import built
from tiny import tiny_config

from grex_mllm.errors import GrexError
from grex_mllm.models.describe import _others
from grex_mllm.models.generators.region_tokens.found import among_found, found_masks, others
from grex_mllm.models.generators.region_tokens.parts import GenerationPart
from grex_mllm.training.combinations import check_combinations
from grex_mllm.training.step import Step
from grex_mllm.types import Proposals

SIDE = 12


def squares(*corners: tuple[int, int]) -> torch.Tensor:
    """Squares of 4 x 4 at corners (row, column), bool [N, 12, 12]."""
    masks = torch.zeros(len(corners), SIDE, SIDE, dtype=torch.bool)
    for mask, (row, column) in zip(masks, corners, strict=True):
        mask[row : row + 4, column : column + 4] = True
    return masks


def proposed(masks: torch.Tensor, scores: list[float]) -> Proposals:
    logits = torch.where(masks, 5.0, -5.0)[None]
    return Proposals(logits, torch.zeros(1, len(masks), 4), torch.tensor([scores]))


def test_what_is_found_is_chosen_as_describe_does() -> None:
    """The surest of two proposals of one object, nothing unsure, nothing empty, and not the selected object itself."""
    found = squares((0, 0), (0, 6), (1, 6), (6, 0), (6, 6), (6, 6))
    found[5] = False
    masks = found_masks(proposed(found, [0.9, 0.6, 0.8, 0.4, 0.7, 0.95]), 0, (SIDE, SIDE))
    assert torch.equal(masks, found[[0, 2, 4, 1]])  # by score
    selected = squares((0, 1))
    kept = others(masks, selected)
    assert kept.tolist() == _others(list(masks.numpy()), selected.numpy()) == [1, 2]
    generator = np.random.default_rng(0)
    for _ in range(50):
        some = squares(*(tuple(generator.integers(0, 8, 2).tolist()) for _ in range(6)))  # type: ignore[arg-type]
        assert others(some[2:], some[:2]).tolist() == _others(list(some[2:].numpy()), some[:2].numpy())


def test_of_the_chosen_images_the_found_stand_beside_and_of_the_others_the_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [squares((0, 0), (6, 6)), squares((0, 6))]
    batch: Any = type("Batch", (), {})()
    batch.instance_masks, batch.instance_boxes_norm = known, [torch.rand(2, 4), torch.rand(1, 4)]
    batch.image = torch.zeros(2, 3, SIDE, SIDE)
    ids = torch.zeros(2, 2, dtype=torch.int64)
    part = GenerationPart(ids, ids, torch.tensor([0, 1]), [torch.tensor([1]), torch.tensor([0])], torch.ones(2))
    found = squares((0, 0), (6, 6), (6, 0))
    one = proposed(found, [0.9, 0.8, 0.7])
    both = Proposals(*(torch.cat([value, value]) for value in one))
    monkeypatch.setattr(torch, "rand", lambda *size: torch.tensor([0.2, 0.6]))
    masks, boxes, beside = among_found(both, batch, part, 0.5)
    assert torch.equal(masks[0], torch.cat([known[0], found])) and torch.equal(masks[1], known[1])
    assert [len(each) for each in boxes] == [5, 1]
    # the labelled object 0 stands there as it was found (2), what was found of the target itself (3) does not
    assert [each.tolist() for each in beside] == [[2, 4], [0]]


def test_validation_has_the_labelled_objects_beside_a_set(tmp_path: Path) -> None:
    model, batches = built("found", tmp_path)
    step = Step(model, model.config)
    with torch.no_grad():
        wanted = step.eval()(batches.at(0), 1.0)["generate/lm"]
        model.generator.reads_proposals = False
        assert step.eval()(batches.at(0), 1.0)["generate/lm"] == wanted


def test_what_cannot_be_is_refused() -> None:
    writing = {"model__generator__lm": "tiny", "model__generator__found_share": 0.5}
    check_combinations(tiny_config(**writing))
    with pytest.raises(GrexError, match=r"found_share is 0\.5 with model\.decoder\.name rela"):
        check_combinations(tiny_config(**writing, model__decoder__name="rela"))
    with pytest.raises(GrexError, match=r"found_share is 1\.5; expected a share from 0 to 1"):
        check_combinations(tiny_config(**{**writing, "model__generator__found_share": 1.5}))


def test_a_step_among_found_objects_reaches_every_weight(tmp_path: Path) -> None:
    model, batches = built("found", tmp_path)
    terms = Step(model, model.config).train()(batches.at(0), 1.0)
    terms["total"].backward()
    assert torch.isfinite(terms["generate/lm"]) and all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.generator.reads_proposals
