"""Unions in a search: how an expression is divided, and that an image must hold every part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_search import scenes
from tiny import tiny_model

from grex_mllm.models.grex import GrexModel
from grex_mllm.search import index as index_module
from grex_mllm.search import open_index
from grex_mllm.search.parts import parts_of


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return scenes(tmp_path / "images", 7)


UNIONS = {
    "the dog and two cats": ["the dog", "two cats"],
    "The red circles and stars": ["The red circles", "The red stars"],
    "two people and a dog on the left": ["two people", "a dog on the left"],
    "the dog, the cat, and two birds": ["the dog", "the cat", "two birds"],
    "a dog, a cat and birds": ["a dog", "a cat", "birds"],
    "the dog on the bench and cats": ["the dog on the bench", "cats"],
    "every small ring and circle": ["every small ring", "every small circle"],
}
WHOLE = ("green", "black and white dog", "the man between the dog and the cat", "everyone except the kid and the dog", "the dog and", "and",
         "the a and b and c and d and e", "bread and butter", "the star, left", " ")  # fmt: skip


def test_unions_are_divided() -> None:
    for expression, parts in UNIONS.items():
        assert parts_of(expression) == parts
    for expression in WHOLE:
        assert parts_of(expression) == [expression]


def test_a_union_is_as_good_as_its_worst_part(images: Path) -> None:
    opened = open_index(tiny_model(), images)
    union, *parts = "the red circle and two blue squares", "the red circle", "two blue squares"
    found = opened.scores([union, *parts, "green"])
    assert found.score.shape == found.no_target.shape == (4, 7)
    np.testing.assert_array_equal(found.score[0], found.score[1:3].min(axis=0))
    np.testing.assert_array_equal(found.region_score[0], found.region_score[1:3].min(axis=0))
    np.testing.assert_array_equal(found.no_target_prob[0], found.no_target_prob[1:3].max(axis=0))
    np.testing.assert_array_equal(found.no_target[0], found.no_target[1] | found.no_target[2])
    assert (found.score[0] < found.score[1]).any() or (found.score[0] < found.score[2]).any()
    np.testing.assert_allclose(opened.scores(union).score[0], found.score[0], rtol=1e-4)
    assert (np.abs(opened.scores(union, divide=False).score[0] / found.score[0] - 1) > 1e-3).any()
    assert [hit.score for hit in opened.rank(union)] == pytest.approx(sorted(found.score[0].tolist(), reverse=True), rel=1e-4)


def test_parts_of_a_union_are_asked_where_those_before_are(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found is what the ranking of all has; the model is made to be in doubt about some images of each part."""
    model, union = tiny_model(), "the red circle, two blue squares and a green star"
    with torch.no_grad():
        model.grounding.decoder.language_part.no_target[2].weight.mul_(30)
        opened = open_index(model, images)
        missing = np.median([opened.scores(part).no_target_prob[0] for part in parts_of(union)[:2]])
    model.config.predict.no_target_threshold = float(missing)
    asked: list[int] = []
    score = index_module.score_images

    def counted(model: GrexModel, text: object, kept: dict[str, torch.Tensor]) -> object:
        asked.append(len(next(iter(kept.values()))))
        return score(model, text, kept)

    monkeypatch.setattr(index_module, "score_images", counted)
    found = opened.found(union)
    assert asked[0] == 7 and 7 > asked[1] > 0
    wanted = [hit for hit in opened.rank(union) if not hit.no_target]
    assert [hit.file for hit in found] == [hit.file for hit in wanted] and 0 < len(found) < 7
    for hit, other in zip(found, wanted, strict=True):
        assert (hit.score, hit.region_score, hit.no_target) == pytest.approx((other.score, other.region_score, False), rel=1e-3)
