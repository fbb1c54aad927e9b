"""An image asked twice, as it is and mirrored: what must hold of the mean of both answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model

from grex_mllm.config import PredictConfig
from grex_mllm.data.augment.words import mirrored_words
from grex_mllm.errors import GrexError
from grex_mllm.models.answer import check_rules
from grex_mllm.models.decoders.instance_selection.network import union_probability
from grex_mllm.models.describe import rerank_by_grounding
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.views import _unmirrored, mean_of_views
from grex_mllm.types import Geometry, GroundingOutput

TEXTS = ["the red circle on the left", "two blue squares", "the person at the top right"]
ONE = torch.ones(1, dtype=torch.bool)


def seeing_twice(**changes: object) -> GrexModel:
    model = tiny_model(**changes)
    model.config.predict = replace(model.config.predict, mirror=True)
    return model


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)


def output(boxes: list[list[float]], chances: list[float], masks: torch.Tensor | None = None) -> GroundingOutput:
    logits = torch.tensor([chances]).logit()
    masks = torch.zeros(1, 2, 4, 4) if masks is None else masks
    return GroundingOutput(masks, boxes_norm=torch.tensor([boxes]), box_logits=logits, count_logits=torch.zeros(1, 7))


@pytest.mark.parametrize("resize", ["squash", "pad", "letterbox"])
@pytest.mark.parametrize("size", [(64, 64), (48, 64), (64, 40)])
@pytest.mark.parametrize("answer", ["overlap", "count"])
def test_the_mirror_image_gets_the_mirrored_answer(size: tuple[int, int], answer: str, resize: str) -> None:
    """The mean over both is of no side: mirrored pixels and words give the mirrored mask and boxes, the same count and "no target"."""
    model, image = seeing_twice(model__decoder__answer=answer, data__resize=resize), picture(*size)
    there = model.ground(image, TEXTS)
    back = model.ground(np.ascontiguousarray(image[:, ::-1]), [mirrored_words(text) for text in TEXTS])
    assert any(result.mask.any() for result in there) and any(len(result.boxes_xyxy) for result in there)
    for one, other in zip(there, back, strict=True):
        assert (one.mask != other.mask[:, ::-1]).mean() < 0.005  # a pixel at the very threshold may fall to either side
        assert (one.count, one.no_target) == (other.count, other.no_target)
        np.testing.assert_allclose(one.no_target_prob, other.no_target_prob, atol=1e-5)
        np.testing.assert_allclose(one.box_scores, other.box_scores, atol=1e-5)
        turned = np.stack(
            [size[1] - other.boxes_xyxy[:, 2], other.boxes_xyxy[:, 1], size[1] - other.boxes_xyxy[:, 0], other.boxes_xyxy[:, 3]], 1
        )
        order = [np.lexsort(boxes.round(2).T) for boxes in (one.boxes_xyxy, turned)]
        np.testing.assert_allclose(one.boxes_xyxy[order[0]], turned[order[1]], atol=1e-3)


def test_a_model_without_target_probabilities_is_mirrored_too() -> None:
    torch.manual_seed(0)
    from tiny import tiny_config

    from grex_mllm.models.text import train_text_tokenizer

    config = tiny_config(model__decoder__name="rela")
    tokenizer = train_text_tokenizer(TEXTS, config.model.text.vocab_size)
    config.model.text.vocab_size, config.predict.mirror = tokenizer.vocab_size, True
    model, image = GrexModel(config, tokenizer).eval(), picture(48, 64)
    with torch.inference_mode():
        there = model.look(model.encode(image), TEXTS)
        back = model.look(model.encode(np.ascontiguousarray(image[:, ::-1])), [mirrored_words(text) for text in TEXTS])
        plain = model._look(model.encode(image).features, TEXTS)
    assert there.target_prob is None
    torch.testing.assert_close(there.mask_logits[:, 1], back.mask_logits[:, 1].flip(-1), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(there.mask_logits[:, 1], plain.mask_logits[:, 1] - plain.mask_logits[:, 0], atol=1e-2)


@pytest.mark.parametrize("text", ["the sign that says left", "the player 23", "right behind the car"])
def test_uncertain_words_keep_the_plain_answer(text: str) -> None:
    assert mirrored_words(text) is None
    model, image = seeing_twice(model__decoder__answer="overlap"), picture(48, 64)
    twice = model.ground(image, [text, TEXTS[0]])[0]
    model.config.predict = replace(model.config.predict, mirror=False)
    once = model.ground(image, [text, TEXTS[0]])[0]
    np.testing.assert_array_equal(twice.mask, once.mask)
    np.testing.assert_allclose(twice.boxes_xyxy, once.boxes_xyxy, atol=1e-4)
    assert twice.count == once.count
    np.testing.assert_allclose(twice.no_target_prob, once.no_target_prob, atol=1e-6)


def test_both_images_are_encoded_once_for_all_expressions() -> None:
    model, calls = seeing_twice(), []
    model.grounding.vision.register_forward_hook(lambda *_: calls.append(1))
    encoded = model.encode(picture(64, 64))
    assert len(calls) == 1, "whoever does not ask it pays for no mirror image"
    model.ground(encoded, TEXTS * 30)
    model.ground(encoded, TEXTS[0])
    assert len(calls) == 2


def test_masks_come_from_the_mean_probability() -> None:
    """`decide` is asked about the mean of both maps, not about either answer."""
    model, image = seeing_twice(model__decoder__answer="overlap"), picture(64, 64)
    with torch.inference_mode():
        encoded = model.encode(image)
        found = model.look(encoded, TEXTS)
        plain, other = model._look(encoded.features, TEXTS), model._look(encoded.mirrored, [mirrored_words(text) for text in TEXTS])
        mean = (plain.target_prob + other.target_prob.flip(-1)) / 2
        none = (plain.no_target_logits.log_softmax(-1) + other.no_target_logits.log_softmax(-1)) / 2
        wanted = model.grounding.decoder.decide(mean, none)
    torch.testing.assert_close(found.target_prob, mean, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.mask_logits, wanted, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(model.grounding.decoder.decide(plain.target_prob, plain.no_target_logits), plain.mask_logits)


@pytest.mark.parametrize("among", [False, True])
@pytest.mark.parametrize(("resize", "size"), [("squash", (64, 64)), ("pad", (64, 40)), ("letterbox", (64, 40))])
def test_the_listener_hears_both(among: bool, resize: str, size: tuple[int, int]) -> None:
    """Of a mirrored image mirrored candidates for mirrored sets score the same; of one image alone they do not."""
    model, image = seeing_twice(model__decoder__answer="overlap", data__resize=resize), picture(*size)
    sets, options = [[0], [0, 1]], [TEXTS, TEXTS[:2]]
    swapped = [[mirrored_words(text) for text in some] for some in options]

    def scores(pixels: np.ndarray, turned: bool, texts: Any) -> list[float]:
        encoded = model.encode(pixels)
        inner = torch.zeros(2, encoded.geometry.input_height, encoded.geometry.input_width, dtype=torch.bool)
        inner[0, 10:40, 2:18], inner[1, 20:60, 20:36] = True, True
        masks = torch.zeros(2, *encoded.features.input_size, dtype=torch.bool)
        masks[(slice(None), *encoded.geometry.inner)] = inner.flip(-1) if turned else inner
        with torch.inference_mode():
            found = [dict(answer.candidates) for answer in rerank_by_grounding(model, encoded, masks, sets, texts, among)]
        return [values[text] for values, some in zip(found, texts, strict=True) for text in some]

    one, other = scores(image, False, options), scores(np.ascontiguousarray(image[:, ::-1]), True, swapped)
    assert len(one) == 5 and min(one) > 0
    np.testing.assert_allclose(one, other, rtol=2e-3)
    model.config.predict = replace(model.config.predict, mirror=False)
    assert not np.allclose(scores(image, False, options), one, rtol=5e-3)


def test_maps_are_laid_back_by_hand() -> None:
    """Eight columns of four pixels; the image takes 20 pixels from pixel 4 on: columns 1 to 5 swap, and margins; padding keeps its own."""
    plain, mirrored = torch.full((1, 1, 8), -1.0), torch.arange(8.0)[None, None]
    found = _unmirrored(plain, mirrored, Geometry(10, 20, 4, 20, left=4, right=4), (4, 32))
    assert found.flatten().tolist() == [6, 5, 4, 3, 2, 1, 0, -1]
    half = _unmirrored(plain, mirrored, Geometry(10, 18, 4, 18), (4, 32))  # 18 pixels: half a column off
    assert half.flatten().tolist() == [3.5, 2.5, 1.5, 0.5, 0, -1, -1, -1]


def test_boxes_of_both_answers() -> None:
    """The first of each is one object (mean place and score), the second of each is seen once and keeps half of its score."""
    size = Geometry(100, 100, 100, 100)
    plain = output([[0.30, 0.5, 0.20, 0.4], [0.8, 0.2, 0.1, 0.1]], [0.9, 0.6])
    mirrored = output([[0.66, 0.5, 0.24, 0.4], [0.5, 0.8, 0.2, 0.2]], [0.7, 0.4])
    found = mean_of_views(plain, mirrored, ONE, size, (100, 100))
    torch.testing.assert_close(found.boxes_norm[0, 0], torch.tensor([0.32, 0.5, 0.22, 0.4]))
    torch.testing.assert_close(found.boxes_norm[0, 3], torch.tensor([0.5, 0.8, 0.2, 0.2]))
    torch.testing.assert_close(found.box_logits.sigmoid(), torch.tensor([[0.8, 0.3, 0.0, 0.2]]), atol=1e-5, rtol=1e-5)


def test_numbers_and_no_target_are_geometric_means() -> None:
    size, chances = Geometry(100, 100, 100, 100), torch.tensor([[0.8, 0.2]])
    plain = output([[0.5] * 4], [0.5])._replace(no_target_logits=chances.log() + 3)
    mirrored = output([[0.5] * 4], [0.5])._replace(no_target_logits=chances.flip(-1).log())
    found = mean_of_views(plain, mirrored, ONE, size, (100, 100))
    torch.testing.assert_close(found.no_target_logits.softmax(-1), torch.tensor([[0.5, 0.5]]))


@pytest.mark.parametrize(("plain_none", "other_none", "answered"), [(0.6, 0.1, True), (0.1, 0.6, True), (0.4, 0.9, False)])
def test_masks_follow_what_both_say_of_no_target(plain_none: float, other_none: float, answered: bool) -> None:
    """Of uncertain pixels a mask is made where both answers together say that there is a target, whichever of them doubts it."""
    size, likely = Geometry(4, 4, 4, 4), torch.full((1, 4, 4), 0.1).index_fill(1, torch.tensor([1]), 0.4)

    def said(none: float) -> GroundingOutput:
        return output([[0.5] * 4], [0.5])._replace(no_target_logits=torch.tensor([[1 - none, none]]).log(), target_prob=likely)

    decide = tiny_model(model__decoder__answer="overlap").grounding.decoder.decide
    found = mean_of_views(said(plain_none), said(other_none), ONE, size, (4, 4), decide)
    assert bool((found.mask_logits[:, 1] > found.mask_logits[:, 0]).any()) == answered
    assert bool(found.no_target_logits[0, 0] > found.no_target_logits[0, 1]) == answered


def test_answers_of_a_letter_mirrored_on_itself_stay() -> None:
    """Two answers that are each other's mirror image have that answer as their mean."""
    masks = torch.randn(1, 2, 4, 4)
    plain = output([[0.3, 0.5, 0.2, 0.4]], [0.9], masks)
    mirrored = output([[0.7, 0.5, 0.2, 0.4]], [0.9], masks.flip(-1))
    found = mean_of_views(plain, mirrored, ONE, Geometry(8, 8, 8, 8), (8, 8))
    torch.testing.assert_close(found.mask_logits[:, 1] - found.mask_logits[:, 0], masks[:, 1] - masks[:, 0])
    torch.testing.assert_close(found.boxes_norm[:, :1], plain.boxes_norm)
    torch.testing.assert_close(found.box_logits[:, :1], plain.box_logits)


def test_truth_and_mirror_do_not_go_together() -> None:
    with pytest.raises(GrexError, match=r"predict.mirror with predict.oracle mask; expected answers of the model alone"):
        check_rules(PredictConfig(mirror=True, oracle="mask"))


@pytest.mark.parametrize("bias", [0.0, 1.5])
def test_the_bias_enters_the_weighing_alone(bias: float) -> None:
    model, image = tiny_model(model__decoder__answer="overlap", model__decoder__overlap_bias=bias), picture(64, 64)
    with torch.inference_mode():
        found: Any = model._look(model.encode(image).features, TEXTS)
        masks = found.extra.regions.masks()[0].sigmoid()
        wanted = torch.stack([union_probability(masks, (logits + bias).sigmoid()) for logits in found.box_logits])
    torch.testing.assert_close(found.target_prob, wanted)
    plain = tiny_model(model__decoder__answer="overlap")
    with torch.inference_mode():
        torch.testing.assert_close(plain._look(plain.encode(image).features, TEXTS).box_logits, found.box_logits)


def test_an_exported_model_says_that_it_sees_the_image_once() -> None:
    from grex_mllm.export.folder import facts_of

    assert facts_of(tiny_model(), "onnx")["left_out"] == []
    assert facts_of(seeing_twice(), "onnx")["left_out"] == ["predict.mirror: the graphs see the image as it is alone"]
