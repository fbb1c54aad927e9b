"""Choosing among candidates by grounding: agreement by hand, order of the candidates, and what the generator is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.mask import decode
from tiny import tiny_speaker

from grex_mllm.data.synthetic import SyntheticDataset
from grex_mllm.data.synthetic.settings import SyntheticConfig
from grex_mllm.models.describe import (
    LISTENER_TEMPERATURE,
    Description,
    agreements,
    describe,
    describe_among_found,
    describe_encoded,
    rerank_by_grounding,
)
from grex_mllm.models.grex import EncodedImage, GrexModel
from grex_mllm.predictors import grex as predictor
from grex_mllm.predictors.grex import describe_sets
from grex_mllm.predictors.lines import answer_fields
from grex_mllm.predictors.protocol import Item, object_sets
from grex_mllm.types import Geometry, GroundingOutput

SIDE = 16
TARGETED = 0.9
RARITY = 0.15


def objects() -> torch.Tensor:
    """bool [3, 16, 16]: squares of 4, 16 and 36 pixels that do not touch."""
    masks = torch.zeros(3, SIDE, SIDE, dtype=torch.bool)
    masks[0, 1:3, 1:3] = masks[1, 1:5, 8:12] = masks[2, 8:14, 2:8] = True
    return masks


AREAS = [4, 16, 36]


def by_hand(probs: Sequence[float], chosen: Sequence[int], targeted: float = TARGETED) -> float:
    """Agreement of an answer with these mean probabilities on the objects, and none elsewhere, with the set `chosen`."""
    exact = math.prod(p if n in chosen else 1 - p for n, p in enumerate(probs))
    total, union = (sum(a * w for a, w in zip(AREAS, weights, strict=True)) for weights in (probs, [n in chosen for n in range(3)]))
    overlap = sum(AREAS[n] * probs[n] for n in chosen)
    return float((exact * overlap / (total + union - overlap) * targeted) ** (1 / 3))


def answer_of(answers: Sequence[Sequence[float]], targeted: float = TARGETED) -> GroundingOutput:
    """A grounding answer for each row: the given probability on every object's pixels, none elsewhere."""
    margin = torch.full((len(answers), SIDE, SIDE), -40.0)
    for e, probs in enumerate(answers):
        for mask, p in zip(objects(), probs, strict=True):
            margin[e][mask] = torch.tensor(p, dtype=torch.float64).logit(eps=1e-9).float()
    none = torch.tensor([[targeted, 1 - targeted]]).log().expand(len(answers), 2)
    # a shift of both channels must not matter
    return GroundingOutput(torch.stack([torch.full_like(margin, 3.0), margin + 3.0], 1), torch.zeros(len(answers), 1, 2), none)


def encoded(canvas: tuple[int, int] = (SIDE, SIDE)) -> EncodedImage:
    features: Any = SimpleNamespace(input_size=(SIDE, SIDE))
    return EncodedImage(features, Geometry(SIDE, SIDE, SIDE, SIDE), canvas)


class Listener:
    """Stands for a model: every text has its answer; `asked` notes what was grounded."""

    device = torch.device("cpu")

    def __init__(self, answers: dict[str, Sequence[float]]) -> None:
        self.answers, self.texts, self.asked, self.grounding = answers, list(answers), [], self

    def encode_text(self, expressions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        self.asked += expressions
        ids = torch.tensor([[self.texts.index(text)] for text in expressions])
        return ids, torch.ones_like(ids)

    def ground(self, features: Any, index: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> GroundingOutput:
        assert len(index) == len(ids) == len(mask) and not index.any()
        return answer_of([self.answers[self.texts[int(row)]] for row in ids[:, 0]])

    def look(self, image: EncodedImage, expressions: Sequence[str]) -> GroundingOutput:
        ids, mask = self.encode_text(expressions)
        return self.ground(image.features, torch.zeros(len(ids), dtype=torch.int64), ids, mask)


def chosen(answers: dict[str, Sequence[float]], sets: list[list[int]], texts: list[list[str]]) -> list[Any]:
    model: Any = Listener(answers)
    return rerank_by_grounding(model, encoded(), objects(), sets, texts)


def test_agreement_by_hand() -> None:
    """Objects of unlike size with unlike probabilities: selected, other and no-target each have their own place in the score."""
    answers, sets = [(0.8, 0.3, 0.1), (0.2, 0.6, 0.95)], [[0], [1], [2], [0, 1], [1, 2], [0, 1, 2]]
    got = agreements(answer_of(answers), objects(), sets, (SIDE, SIDE), (SIDE, SIDE))
    assert got.shape == (2, 6)
    np.testing.assert_allclose(got, [[by_hand(probs, s) for s in sets] for probs in answers], rtol=1e-4)
    assert got[0].argmax() == 0 and got[1].argmax() == 4
    doubtful = agreements(answer_of(answers, targeted=0.2), objects(), sets, (SIDE, SIDE), (SIDE, SIDE))
    np.testing.assert_allclose(doubtful / got, (0.2 / 0.9) ** (1 / 3), rtol=1e-4)


def test_sure_answers_are_bounded_and_ranked() -> None:
    """Probability one on the set alone scores highest; one object too many or too few scores nearly nothing, but not nothing."""
    answers = answer_of([(1.0, 1.0, 0.0), (1.0, 1.0, 1.0), (1.0, 0.0, 0.0)], 1.0)
    right, more, fewer = agreements(answers, objects(), [[0, 1]], (SIDE, SIDE), (SIDE, SIDE))[:, 0]
    assert right == pytest.approx((1 - 1e-3) ** (3 / 3), rel=1e-3) and right > 0.99
    assert 0 < more < 0.12 and 0 < fewer < 0.12
    assert more == pytest.approx((1e-3 * 20 / 56) ** (1 / 3), rel=0.01) and fewer == pytest.approx((1e-3 * 4 / 20) ** (1 / 3), rel=0.01)


def test_what_lies_in_the_padding_is_not_read() -> None:
    answer, wide = answer_of([(0.8, 0.3, 0.1)]), answer_of([(0.8, 0.3, 0.1)])
    padding = torch.tensor([-20.0, 20.0]).view(1, 2, 1, 1).expand(1, 2, SIDE, 8)
    wide = wide._replace(mask_logits=torch.cat([wide.mask_logits, padding], dim=3))
    sets = [[0], [1, 2]]
    got = agreements(wide, objects(), sets, (SIDE, SIDE + 8), (SIDE, SIDE))
    np.testing.assert_allclose(got, agreements(answer, objects(), sets, (SIDE, SIDE), (SIDE, SIDE)), rtol=1e-6)


def test_small_logits_are_brought_to_the_canvas() -> None:
    small = torch.tensor([0.0, math.log(0.6 / 0.4)]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    answer = answer_of([(0.5, 0.0, 0.0)])._replace(mask_logits=small)
    overlap, total = 0.6 * 4, 0.6 * SIDE**2
    expected = (0.6 * 0.4 * 0.4 * overlap / (total + 4 - overlap) * TARGETED) ** (1 / 3)
    assert agreements(answer, objects(), [[0]], (SIDE, SIDE), (SIDE, SIDE))[0, 0] == pytest.approx(expected, rel=1e-5)


def test_candidates_are_ordered_by_agreement_times_the_share_that_says_the_same() -> None:
    answers = {"a": (0.6, 0.3, 0.1), "b": (0.7, 0.2, 0.1), "c": (0.9, 0.9, 0.1), "d": (0.1, 0.9, 0.9)}
    [result] = chosen(answers, [[0]], [["d", "a", "b", "c", "a"]])
    scores = {t: by_hand(answers[t], [0]) * (n / 5) ** RARITY for t, n in {"a": 2, "b": 1, "c": 1, "d": 1}.items()}
    assert [text for text, _ in result.candidates] == sorted(scores, key=lambda t: -scores[t]) == ["b", "a", "c", "d"]
    assert [score for _, score in result.candidates] == pytest.approx([scores[t] for t in ("b", "a", "c", "d")], rel=1e-4)
    assert result.expression == "b" and result.score == pytest.approx(scores["b"], rel=1e-4)


def test_of_candidates_that_ground_alike_the_likelier_one_is_chosen() -> None:
    same = (0.8, 0.1, 0.1)
    [result] = chosen({"rare": same, "often": same}, [[0]], [["rare", "often", "often", "often"]])
    assert [text for text, _ in result.candidates] == ["often", "rare"]
    assert result.candidates[1][1] / result.candidates[0][1] == pytest.approx((1 / 3) ** RARITY, rel=1e-5)


def test_the_share_is_a_tie_break_and_no_vote() -> None:
    """A wrong expression that is said five times as often does not win against one that is understood."""
    [result] = chosen({"right": (0.9, 0.1, 0.1), "wrong": (0.1, 0.9, 0.1)}, [[0]], [["wrong"] * 5 + ["right"]])
    assert result.expression == "right"


def test_full_ties_go_to_the_earlier_candidate() -> None:
    same = (0.8, 0.1, 0.1)
    for texts in (["x", "y"], ["y", "x"]):
        [result] = chosen({"x": same, "y": same}, [[0]], [texts])
        assert [text for text, _ in result.candidates] == texts and result.expression == texts[0]


def test_every_set_is_judged_for_itself() -> None:
    answers = {"first": (0.9, 0.1, 0.1), "last": (0.1, 0.1, 0.9), "pair": (0.9, 0.1, 0.9)}
    results = chosen(answers, [[2], [0, 2], [0]], [["first", "last", "pair"]] * 2 + [["last", "pair"]])
    assert [r.expression for r in results] == ["last", "pair", "pair"]
    assert [r.score for r in results] == pytest.approx(
        [by_hand(answers[t], s) * share**RARITY for t, s, share in (("last", [2], 1 / 3), ("pair", [0, 2], 1 / 3), ("pair", [0], 1 / 2))],
        rel=1e-4,
    )


def test_more_candidates_than_one_chunk_each_grounded_once() -> None:
    answers: dict[str, Sequence[float]] = {f"{n:03}": (0.5 + n / 400, 0.1, 0.1) for n in range(150)}
    texts = list(answers)
    model: Any = Listener(answers)
    results = rerank_by_grounding(model, encoded(), objects(), [[0], [0]], [texts, texts[:100]])
    assert [r.expression for r in results] == ["149", "099"]
    assert [t for t, _ in results[0].candidates] == texts[::-1]
    assert sorted(model.asked) == texts
    assert results[1].candidates[40][1] == pytest.approx(by_hand(answers["059"], [0]) * 0.01**RARITY, rel=1e-4)


def test_blank_candidates_are_never_chosen_but_count_as_drawn() -> None:
    model: Any = Listener({"a": (0.2, 0.8, 0.8)})
    blank, some = rerank_by_grounding(model, encoded(), objects(), [[0], [0]], [["", "  "], ["", "a", " "]])
    assert (blank.expression, blank.score, blank.candidates) == ("", 0.0, [])
    assert some.expression == "a" and [t for t, _ in some.candidates] == ["a"]
    assert some.score == pytest.approx(by_hand((0.2, 0.8, 0.8), [0]) * (1 / 3) ** RARITY, rel=1e-4)
    assert model.asked == ["a"]


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> GrexModel:
    return tiny_speaker(tmp_path_factory.mktemp("speaker"))


class Speech:
    """Takes the place of the generator's decoding and notes what it was asked for; `num_candidates` says how many it gives."""

    def __init__(self, drawn: list[str], greedy: str) -> None:
        self.drawn, self.greedy, self.calls = drawn, greedy, []

    def __call__(
        self, features: Any, encoded: Any, masks: Any, sets: list[list[int]], *, mode: str, num_candidates: int = 1, **options: Any
    ) -> list[list[str]]:
        self.calls.append({"mode": mode, "num": num_candidates, "sets": sets, **options})
        num_sets = len(sets)
        return [[self.greedy]] * num_sets if mode == "greedy" else [self.drawn[:num_candidates]] * num_sets


@pytest.fixture
def ask(speaker: GrexModel, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make the tiny model say what it is given and hear what `Listener` says; return its model, its image and the generator's stand-in."""

    def prepare(answers: dict[str, Sequence[float]], drawn: list[str], greedy: str) -> tuple[GrexModel, EncodedImage, Speech]:
        listener, speech = Listener(answers), Speech(drawn, greedy)
        image = speaker.encode(np.full((64, 64, 3), 90, np.uint8))
        image.features.decoded = None  # no objects but the given ones
        monkeypatch.setattr(speaker, "encode_text", listener.encode_text)
        monkeypatch.setattr(speaker.grounding, "ground", listener.ground)
        monkeypatch.setattr(speaker.generator, "generate", speech)
        return speaker, image, speech

    return prepare


def large(masks: torch.Tensor) -> np.ndarray:
    return masks.repeat_interleave(4, 1).repeat_interleave(4, 2).numpy()


ANSWERS = {"greedy": (0.6, 0.2, 0.2), "s0": (0.2, 0.2, 0.2), "s1": (0.3, 0.2, 0.2), "s2": (0.4, 0.2, 0.2), "s3": (0.9, 0.1, 0.1)}
DRAWN = ["s0", "s1", "s2", "s3"]


@pytest.mark.parametrize(("num", "best"), [(1, "greedy"), (3, "greedy"), (4, "s3")])
@pytest.mark.parametrize("mode", ["greedy", "sample"])
def test_the_listener_hears_the_greedy_answer_and_as_many_samples_as_asked(ask: Any, mode: str, num: int, best: str) -> None:
    model, image, speech = ask(ANSWERS, DRAWN, "greedy")
    result = describe(
        model, image, large(objects()), object_sets=[[0]], mode=mode, candidates=num, rerank="listener", seed=5, details=True
    )[0]
    assert [(c["mode"], c["num"]) for c in speech.calls] == [("sample", num), ("greedy", 1)]
    assert speech.calls[0]["temperature"] == LISTENER_TEMPERATURE == 0.7 and speech.calls[0]["seed"] == 5
    assert sorted(t for t, _ in result.candidates) == sorted(["greedy", *DRAWN[:num]])
    assert result.expression == best and result.score == result.candidates[0][1]


def test_beams_are_judged_without_a_greedy_answer(ask: Any) -> None:
    model, image, speech = ask(ANSWERS, DRAWN, "greedy")
    best = describe(model, image, large(objects()), object_sets=[[0], [1, 2]], mode="beam", candidates=4, num_beams=2, rerank="listener")
    assert [(c["mode"], c["num"], c["num_beams"]) for c in speech.calls] == [("beam", 4, 4)]
    assert best[0] == "s3" and speech.calls[0]["sets"] == [[0], [1, 2]]
    describe(model, image, large(objects()), mode="beam", candidates=2, num_beams=3, rerank="listener")
    assert speech.calls[1]["num_beams"] == 3 and speech.calls[1]["sets"] == [[0, 1, 2]]


def test_without_reranking_the_first_answer_is_taken_and_nothing_is_grounded(ask: Any) -> None:
    model, image, speech = ask({}, DRAWN, "greedy")
    one = describe_encoded(model, image, large(objects()), [[0]], mode="greedy", candidates=1, rerank=None)[0]
    assert (one.expression, one.score, one.candidates) == ("greedy", None, [])
    many = describe_encoded(model, image, large(objects()), [[0]], mode="sample", candidates=3, rerank=None, seed=2)[0]
    assert many.expression == "s0" and [t for t, _ in many.candidates] == DRAWN[:3]
    assert [(c["mode"], c["num"], c["temperature"]) for c in speech.calls] == [("greedy", 1, 1.0), ("sample", 3, 1.0)]


def test_predicted_lines_hold_the_greedy_answer_and_the_chosen_one(ask: Any) -> None:
    """`grex predict --listener 3`: the annotation ids of a set become positions, and each set gets the candidate that it grounds best."""
    sample = SyntheticDataset(SyntheticConfig(image_size=64), "train", 3, 6)[0]
    item = Item(sample.record, Path(sample.record.file), lambda: sample.image, sample.expressions)
    masks = torch.from_numpy(item.masks)
    texts = {
        "greedy": torch.zeros(64, 64),
        "s0": masks[0].float(),
        "s1": masks[1].float(),
        "s2": masks[2].float(),
        "s3": masks.any(0).float(),
    }
    model, image, speech = ask({}, DRAWN, "greedy")

    def ground(features: Any, index: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> GroundingOutput:
        margin = torch.stack([list(texts.values())[int(row)] for row in ids[:, 0]]) * 10 - 5
        zeros = torch.zeros(len(ids), 2)
        return GroundingOutput(torch.stack([torch.zeros_like(margin), margin], 1), zeros[:, None], zeros + torch.tensor([2.0, -2.0]))

    asked: list[list[str]] = []

    def encode_text(said: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append(list(said))
        return torch.tensor([[list(texts).index(t)] for t in said]), torch.ones(len(said), 1)

    model.grounding.ground = ground
    model.encode_text = encode_text
    names = [i.annotation_id for i in sample.record.instances]
    sets = [(names[2],), (names[0],), (names[1],)]
    assert len(object_sets(sample.expressions)) > 1
    lines = [answer_fields(answer) for answer in describe_sets(model, item, image, sets, 3)]
    assert [(c["mode"], c["num"]) for c in speech.calls] == [("greedy", 1), ("sample", 3)]  # greedy once
    assert speech.calls[1]["sets"] == [[2], [0], [1]]
    assert [line["expression"] for line in lines] == ["greedy"] * 3
    assert [line["listener"]["expression"] for line in lines] == ["s2", "s0", "s1"]
    assert asked[-1] == ["greedy", "s2", "s0", "s1"]  # what was written is grounded together, each text once
    for line, place in zip(lines, (2, 0, 1), strict=True):
        assert decode(line["listener"]["round_trip"]["mask_rle"]).sum() == item.masks[place].sum() > 0
        assert decode(line["round_trip"]["mask_rle"]).sum() == 0
    for line in lines:
        assert line["listener"]["score"] > 0.5 and len(line["candidates"]) == 4
        assert line["candidates"][0] == line["listener"]["expression"] and sorted(line["candidates"]) == ["greedy", *DRAWN[:3]]


def test_each_answer_is_grounded_as_its_own_text(speaker: GrexModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of blanks says nothing, a text that never ends is cut, and what was written among found objects stands by itself."""
    sample = SyntheticDataset(SyntheticConfig(image_size=64), "train", 3, 6)[0]
    item = Item(sample.record, Path(sample.record.file), lambda: sample.image, sample.expressions)
    sets = [(instance.annotation_id,) for instance in sample.record.instances[:3]]
    long = "red star " * 200
    monkeypatch.setattr(predictor, "describe_encoded", lambda *args, **options: [Description(t) for t in ("   ", long, "a star")])
    monkeypatch.setattr(predictor, "describe_among_found", lambda *args: ["a box", "   ", long])
    asked: list[str] = []
    ground = speaker.ground

    def grounded(image: Any, texts: Sequence[str], chunk: int) -> Any:
        asked.extend(texts)
        return ground(image, texts, chunk)

    monkeypatch.setattr(speaker, "ground", grounded)
    lines = [answer_fields(answer) for answer in describe_sets(speaker, item, speaker.encode(sample.image), sets, 0)]
    assert asked == [long[:1000], "a star", "a box"]
    assert [(line["expression"], line["among_found"]["expression"]) for line in lines] == [
        ("   ", "a box"),
        (long, "   "),
        ("a star", long),
    ]
    for said in [said for line in lines for said in (line, line["among_found"])]:
        blank = said["expression"] == "   "
        assert said["status"] == ("unparsable" if blank else "ok") and ("round_trip" in said) != blank


def test_sets_are_described_among_what_the_model_finds(speaker: GrexModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found: the objects 0 and 2 themselves, inexactly, 2 twice, and something that the data do not know. Object 1 is not found."""
    masks = large(objects())
    unknown = np.zeros((64, 64), bool)
    unknown[50:60, 50:60] = True
    found = [np.roll(masks[0], 1, 0), unknown, masks[2], np.roll(masks[2], 2, 1)]
    image = speaker.encode(np.full((64, 64, 3), 90, np.uint8))
    monkeypatch.setattr("grex_mllm.models.describe.found_objects", lambda model, encoded, least: found)
    asked: dict[str, Any] = {}
    write = speaker.generator.generate

    def generate(features: Any, encoded: Any, known: np.ndarray, sets: list[list[int]], **options: Any) -> Any:
        asked.update(known=known, sets=sets, texts=write(features, encoded, known, sets, **options), **options)
        return asked["texts"]

    monkeypatch.setattr(speaker.generator, "generate", generate)
    texts = describe_among_found(speaker, image, masks, [[0], [1], [0, 2]])
    assert texts == [text for [text] in asked["texts"]]
    assert np.array_equal(asked["known"], np.concatenate([masks, found]))
    assert asked["sets"] == [[0], [1], [0, 2]] and asked["beside"] == [[4, 5], [3, 4, 5], [4]]
    for chosen, others, text in zip(asked["sets"], asked["beside"], texts, strict=True):  # as if nothing else were known
        known = asked["known"][[*chosen, *others]]
        [[alone]] = write(speaker.grounding.language_free(image.features), image, known, [list(range(len(chosen)))], mode="greedy")
        assert alone == text
    image.features.decoded = None
    assert describe_among_found(speaker, image, masks, [[0]]) is None
