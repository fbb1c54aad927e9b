"""The listener that knows the same objects as the speaker: its regions are these objects, whatever the decoder would find by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_model, tiny_speaker

from grex_mllm.errors import GrexError
from grex_mllm.models import describe
from grex_mllm.models.decoders.instance_selection.regions import SURE, cells_at, pair_geometry
from grex_mllm.models.describe import KNOWN_RARITY, agreements_among, check_reranker, rerank_by_grounding
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.text import train_text_tokenizer
from grex_mllm.ops.boxes import xyxy_to_cxcywh
from grex_mllm.types import GroundingOutput

TEXTS = ["the red circle on the left", "two blue squares and a star", "all shapes except the largest one"]


def picture(height: int = 48, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


def boxes_of(*boxes: tuple[int, int, int, int]) -> torch.Tensor:
    """Of a picture of 64 x 64."""
    return xyxy_to_cxcywh(torch.tensor(boxes).float() / 64)[None]


@torch.inference_mode()
def heard(model: GrexModel, boxes: torch.Tensor) -> tuple[torch.Tensor, GroundingOutput]:
    encoded = model.encode(picture(64, 64))
    known = model.grounding.decoder.known(encoded.features, boxes)
    ids, mask = model.encode_text(TEXTS)
    output = model.grounding.decoder.language_part(
        known, torch.zeros(len(TEXTS), dtype=torch.int64), model.grounding.encode_text(ids, mask)
    )
    return model.grounding.decoder.likely_targets(output), output


def test_regions_are_the_known_objects() -> None:
    """More of them than the decoder keeps, as given, surely objects, and without masks that nobody asks for."""
    model, boxes = tiny_model(), boxes_of(*[(4 * n, 10, 4 * n + 9, 40) for n in range(11)])
    with torch.inference_mode():
        encoded = model.encode(picture(64, 64))
        known = model.grounding.decoder.known(encoded.features, boxes)
    assert known.features.shape[1] == 11 > encoded.features.decoded.features.shape[1]
    assert all(torch.equal(layer, boxes) for layer in known.boxes_norm) and bool((known.objectness[-1] == SURE).all())
    assert torch.equal(known.geometry, pair_geometry(boxes))
    logits, output = heard(model, boxes)
    assert logits.shape == (len(TEXTS), 11) and output.mask_logits.numel() == 0
    rows, columns = 16, 16
    cells = cells_at(boxes_of((0, 0, 8, 4), (60, 56, 68, 72)), (rows, columns))[0].tolist()
    assert cells == [0 * columns + 1, 15 * columns + 15]  # centres (4, 2) and (64, 64), the last on the border


def test_objects_are_judged_alike_in_any_order_and_where_they_cover_each_other() -> None:
    model = tiny_model(model__decoder__answer="count")
    boxes = boxes_of((2, 2, 30, 30), (40, 10, 60, 50), (5, 35, 20, 60), (3, 3, 31, 30))  # the last covers the first
    there, output = heard(model, boxes)
    back, _ = heard(model, boxes[:, [3, 1, 0, 2]])
    torch.testing.assert_close(back, there[:, [3, 1, 0, 2]], atol=1e-4, rtol=1e-4)
    assert bool(there.abs().lt(20).all()), "none is left out as another region of the same object"
    assert bool((output.box_logits <= -20).any()), "as an answer would leave it out"


def test_agreement_is_the_chance_of_just_these_targets() -> None:
    torch.manual_seed(0)
    logits, nothing, count = torch.randn(2, 4) * 3, torch.randn(2, 2), torch.randn(2, 7)
    logits[1, 2] = 40.0  # as sure as 0.999 at the most
    sets = [[0], [1, 3], [0, 1, 2, 3]]
    empty = {"mask_logits": torch.zeros(0), "minimap_logits": torch.zeros(0)}
    got = agreements_among(logits, GroundingOutput(no_target_logits=nothing, count_logits=count, **empty), sets)
    alone = agreements_among(logits, GroundingOutput(no_target_logits=None, **empty), sets)
    for e in range(2):
        for s, chosen in enumerate(sets):
            chance = 1.0
            for n in range(4):
                sure = min(max(1 / (1 + np.exp(-float(logits[e, n]))), 1e-3), 1 - 1e-3)
                chance *= sure if n in chosen else 1 - sure
            assert alone[e, s] == pytest.approx(chance ** (1 / 3), rel=1e-4)
            chance *= float(nothing[e].softmax(0)[0]) * float(count[e].softmax(0)[len(chosen)])
            assert got[e, s] == pytest.approx(chance ** (1 / 3), rel=1e-4)
    many = agreements_among(torch.zeros(1, 9), GroundingOutput(no_target_logits=None, count_logits=count[:1], **empty), [list(range(9))])
    assert many[0, 0] == pytest.approx((0.5**9 * float(count[0].softmax(0)[6])) ** (1 / 3), rel=1e-4)  # more than five


@torch.inference_mode()
def test_candidates_are_ranked_among_the_known_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide picture is padded: boxes are shares of the padded canvas. The rarely said pays with its own power."""
    model = tiny_model(data__resize="pad")
    encoded = model.encode(picture(36, 64))
    height, width = encoded.features.input_size
    masks = torch.zeros(3, height, width, dtype=torch.bool)
    masks[0, 5:20, 4:20] = masks[1, 8:30, 30:50] = masks[2, 1:9, 50:60] = True
    told: list[torch.Tensor] = []
    known = model.grounding.decoder.known
    monkeypatch.setattr(model.grounding.decoder, "known", lambda features, boxes: told.append(boxes) or known(features, boxes))
    monkeypatch.setattr(model.grounding, "ground", None)  # nobody asks for pixels
    options = [TEXTS[0], TEXTS[1], TEXTS[1], "  "]
    (found,) = rerank_by_grounding(model, encoded, masks, [[0, 2]], [options], among=True)
    side = encoded.canvas[1]
    corner = torch.tensor([[4, 5, 20, 20], [30, 8, 50, 30], [50, 1, 60, 9]]).float()
    torch.testing.assert_close(told[0][0], xyxy_to_cxcywh(corner / torch.tensor([side, encoded.canvas[0]] * 2)))
    ids, mask = model.encode_text(TEXTS[:2])
    output = model.grounding.decoder.language_part(
        known(encoded.features, told[0]), torch.zeros(2, dtype=torch.int64), model.grounding.encode_text(ids, mask)
    )
    values = agreements_among(model.grounding.decoder.likely_targets(output), output, [[0, 2]])[:, 0]
    expected = {text: float(value) * (number / 4) ** KNOWN_RARITY for text, value, number in zip(TEXTS[:2], values, (1, 2), strict=True)}
    assert dict(found.candidates) == pytest.approx(expected, rel=1e-5)
    assert found.expression == max(expected, key=lambda text: expected[text])


def test_objects_are_a_way_of_re_ranking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From `describe` and from the configuration of a model folder; refused where a decoder reads no regions."""
    model, asked = tiny_speaker(tmp_path), list[bool]()
    own = describe.rerank_by_grounding
    monkeypatch.setattr(describe, "rerank_by_grounding", lambda *given, among: asked.append(among) or own(*given, among=among))
    masks = np.zeros((2, 48, 64), bool)
    masks[0, 5:30, 8:20] = masks[1, 20:40, 30:60] = True
    for way in ("objects", "listener"):
        found = model.describe(picture(), masks=list(masks), candidates=3, rerank=way, details=True)
        assert 0 <= found.score <= 1 and found.expression == found.candidates[0][0]
    assert asked == [True, False]
    check_reranker(model, "objects")
    config = tiny_config(model__decoder__name="rela", model__decoder__minimap_side=4)
    text = train_text_tokenizer(TEXTS * 3, 300)
    config.model.text.vocab_size = text.vocab_size
    with pytest.raises(GrexError, match=r'rerank "objects" with a decoder that reads no regions'):
        check_reranker(GrexModel(config, text), "objects")
