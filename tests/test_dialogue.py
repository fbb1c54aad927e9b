"""Conversations about an image: follow-ups are read, sets composed exactly on drawn scenes, and served without users mixing."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model

import grex_mllm
from grex_mllm.config import DataConfig, load_config
from grex_mllm.data.history import SEPARATOR, has_history, joined
from grex_mllm.data.sources import TRAINING, training_samples, training_text
from grex_mllm.data.synthetic import check_expression, parse
from grex_mllm.data.synthetic.dialogues import OPERATIONS, draw_dialogue, nearest
from grex_mllm.data.synthetic.meaning import denoted
from grex_mllm.data.synthetic.scenes import Scene, SceneObject, bits, draw_scene
from grex_mllm.data.synthetic.settings import DialogueConfig, SyntheticConfig
from grex_mllm.dialogue import Dialogue, session
from grex_mllm.dialogue.composition import chosen_by, neighbours
from grex_mllm.dialogue.follow_ups import COMPLEMENT, DIFFERENCE, NEIGHBOUR, NEW, RESTRICTION, UNION, FollowUp, parse_follow_up
from grex_mllm.dialogue.objects import overlaps, pieces
from grex_mllm.dialogue.phrases import Phrase, addressed, kind_of, plural_of, read_phrase, singular_of
from grex_mllm.errors import GrexError
from grex_mllm.models.grex import GrexModel
from grex_mllm.types import Grounding

FOLLOW_UPS = {
    UNION: "and the dog too|and the dog|also the dog|the dog as well|add the red circle|add the red circle to them|plus the two stars"
    "|and also the kid in white|include the largest star|together with the cat|And the dog, please!|the one on the left too",
    DIFFERENCE: "not the red one|Not the red ones!|no, not the red one|without the star|except the big one|but not the one on the left"
    "|remove the dog|drop the two small ones|leave out the kid in white|leave the red one out|take the blue one away|all but the red one"
    "|those except the striped one|them without the dog|exclude the person on the left|and not the red one",
    RESTRICTION: "only the big ones|just the red one|only the circles|the red ones|the two big ones|the ones on the left|the left one"
    "|the biggest of them|the second one from the left|which of them are red?|which ones are striped?|of those, the red ones"
    "|the red ones among them|keep the striped ones|narrow it down to the circles|those that are red|those with stripes|without stripes"
    "|not red|the ones that are not red|the red ones only|show me only the large ones",
    NEIGHBOUR: "the one next to them|the ones next to it|the dog next to them|The person beside him.|what is next to it|what's near them?"
    "|the nearest one|the nearest dog to it|the closest one to them|its neighbour|their neighbours|the two nearest ones"
    "|the circle to the left of it|the one above them|the red one below it|the one on its left|everything next to them"
    "|the square that is next to it|the two circles next to these",
    COMPLEMENT: "the others|the other ones|all the others|everything else|the rest|the rest of them|the other circles|all other dogs"
    "|the other dog|everyone else|the remaining ones|invert the selection|everything but them|now the others",
    NEW: "the two red circles|the dog and the cat|a green star|the circle next to the square|people in white"
    "|all circles except the red ones|everything except the largest one|everything that is red|everyone but the kid in white"
    "|one of the dogs|one red circle|the second star from the left|the circles that are not red|all squares but the small one"
    "|the left circle|the person holding it|every shape without stripes|the man with the red shirt and the woman",
}


@pytest.mark.parametrize(("operation", "text"), [(name, text) for name, texts in FOLLOW_UPS.items() for text in texts.split("|")])
def test_a_text_is_read_as_the_operation_that_it_asks_for(operation: str, text: str) -> None:
    found = parse_follow_up(text)
    assert found.operation == operation
    assert operation != NEW or found.rest == text, "an expression of its own is left as it is"


def test_what_is_left_over_is_read() -> None:
    assert parse_follow_up("and the dog too") == FollowUp(UNION, "the dog")
    assert parse_follow_up("And the one next to them!") == FollowUp(UNION, inner=FollowUp(NEIGHBOUR, "the one"))
    assert parse_follow_up("and the others") == FollowUp(UNION, inner=FollowUp(COMPLEMENT))
    assert parse_follow_up("the red circle above it") == FollowUp(NEIGHBOUR, "the red circle", "top")
    assert parse_follow_up("without stripes") == FollowUp(RESTRICTION, "the ones without stripes")
    assert parse_follow_up("all other dogs") == FollowUp(COMPLEMENT, "dogs")
    assert sum(len(texts.split("|")) for name, texts in FOLLOW_UPS.items() if name != NEW) >= 60


def test_expressions_of_the_grammar_start_anew_and_drawn_follow_ups_do_not() -> None:
    config, read = SyntheticConfig(), 0
    for index in range(30):
        scene = draw_scene(config, "test", index).scene
        for operation in OPERATIONS:
            drawn = draw_dialogue(scene, random.Random(index), operation)
            if drawn is not None:
                assert parse_follow_up(drawn.follow_up).operation == operation, drawn
                assert parse_follow_up(drawn.first).operation == NEW, drawn
                read += 1
    assert read > 100


def test_one_and_ones_stand_for_what_was_spoken_of() -> None:
    assert read_phrase("the red one", "circles").texts == ("all red circles", "the red circles", "all red objects", "the red objects")
    assert read_phrase("the red one", None) == Phrase(("all red objects", "the red objects"), 1)
    assert read_phrase("the two small dogs", None) == Phrase(("all small dogs", "the small dogs"), 2)
    assert read_phrase("the circle that is red", None).texts == ("all circles that are red", "the circles that are red")
    assert read_phrase("the biggest red one", None) == Phrase(("all red objects", "the red objects"), 1, ("largest", 1))
    assert read_phrase("the second one from the left", None) == Phrase((), 1, ("left", 2))
    assert read_phrase("the one on the left", "dogs") == Phrase((), 1, ("left", 1))
    assert read_phrase("the ones on the left", None).texts[0] == "all objects on the left"
    assert read_phrase("the biggest ones", None).texts[0] == "all large objects"
    assert read_phrase("the ones", "dogs") == Phrase(())
    assert addressed("the red one", "people") == "the red person" and addressed("the blue ones", None) == "the blue objects"
    assert [kind_of(text) for text in ("two people on a bench", "the left dog", "the cat and the dog", "everything that is red")] == [
        "people", "dogs", None, None,
    ]  # fmt: skip
    for word in ("circle", "box", "cross", "city", "person", "knife", "sheep", "ring"):
        assert singular_of(plural_of(word)) == word


def test_orders_and_neighbours_by_hand() -> None:
    """Four squares in a row, 10 pixels wide, at x = 0, 14, 40 and 80 of 100; the third is the largest."""
    boxes = np.array([[0, 0, 10, 10], [14, 0, 24, 10], [40, 0, 52, 12], [80, 30, 90, 40]], float)
    areas = np.array([100, 100, 144, 100.0])
    sure = np.ones(4)
    assert chosen_by(Phrase((), 1, ("largest", 1)), sure, [0, 1, 2], boxes, areas) == [2]
    assert chosen_by(Phrase((), 1, ("right", 2)), sure, [0, 1, 2, 3], boxes, areas) == [2]
    assert chosen_by(Phrase((), 2, ("left", 1)), sure, [1, 2, 3], boxes, areas) == [1, 2]
    assert chosen_by(Phrase((), 1), np.array([0.3, 0.9, 0.8, 0.1]), [0, 2, 3], boxes, areas) == [2]
    assert chosen_by(Phrase(()), np.array([0.3, 0.9, 0.8, 0.1]), [0, 2, 3], boxes, areas) == [2]
    assert chosen_by(Phrase((), 1), np.full(4, 0.01), [0, 1], boxes, areas) == []
    assert neighbours(boxes, [1], [0, 2, 3], "", 1, 100) == [0]
    assert neighbours(boxes, [1], [0, 2, 3], "", 2, 100) == [0, 2]
    assert neighbours(boxes, [1], [0, 2, 3], "", None, 100) == [0], "gaps 4, 16 and 60; near is up to 12"
    assert neighbours(boxes, [3], [0, 1, 2], "", None, 100) == [2], "at least the nearest"
    assert neighbours(boxes, [1], [0, 2, 3], "right", 1, 100) == [2]
    assert neighbours(boxes, [1, 2], [0, 3], "right", None, 100) == [3]
    assert neighbours(boxes, [0], [1, 2, 3], "left", 1, 100) == [] and neighbours(boxes, [], [1], "", 1, 100) == []


def _scene(*objects: tuple[int, int, int, int, int]) -> Scene:
    """Squares of 10 pixels in a picture of 100: (shape, colour, x, y, scale)."""
    return Scene(100, 100, [SceneObject((s, c, 0, 0), k, (x, y, x + 10, y + 10)) for s, c, x, y, k in objects])


def test_the_truth_of_a_neighbour_by_hand() -> None:
    scene = _scene((0, 0, 0, 0, 0), (0, 1, 14, 0, 0), (1, 0, 40, 0, 0), (1, 1, 14, 29, 0))
    others = scene.everything & ~2
    assert nearest(scene, 2, others, 1) == 1
    assert nearest(scene, 2, others, 2) is None, "gaps of 16 and 19 lie within the margin of 4"
    assert nearest(scene, 2, others, None) == 1, "near is a gap of up to 12"
    assert nearest(scene, 2, others, 1, "right") is None, "one stands straight below it, hardly farther"
    apart = _scene((0, 0, 0, 0, 0), (0, 1, 14, 0, 0), (1, 0, 40, 0, 0), (1, 1, 14, 60, 0))
    assert nearest(apart, 2, others, 1, "right") == 4
    assert nearest(apart, 2, others, 1, "bottom") is None, "two stand level with it, and nearer"
    assert nearest(_scene((0, 0, 0, 50, 0), (0, 1, 40, 50, 0)), 2, 1, 1, "right") == 0


class Told(GrexModel):
    """A model that answers expressions of the grammar as the scene has it; its proposals are the scene's objects."""

    def __init__(self, scene: Scene, masks: np.ndarray, model: GrexModel) -> None:
        torch.nn.Module.__init__(self)
        self.scene, self.masks = scene, masks
        self.config, self.grounding, self.text_tokenizer = model.config, model.grounding, model.text_tokenizer

    def answer(self, text: str) -> np.ndarray:
        """Return bool [H, W]: the union of what a text denotes; where it is undetermined, of all that fit."""
        tree = parse(text)
        if tree is None:
            return np.zeros(self.masks.shape[1:], bool)
        return np.any(self.masks[bits(denoted(tree, self.scene) or 0)], axis=0)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes a session about a drawn scene with a model that knows the scene. proposes: whether it knows objects."""

    def ask(model: Told, encoded: Any, texts: list[str], objects: np.ndarray, threshold: float | None) -> Any:
        masks = [model.answer(text) for text in texts]
        found = [Grounding(t, m, None, None, None, None, not m.any(), float(not m.any())) for t, m in zip(texts, masks, strict=True)]
        pixels = objects.reshape(len(objects), model.masks[0].size)
        inside = np.stack([(pixels & mask.ravel()).sum(1) / np.maximum(1, pixels.sum(1)) for mask in masks])
        return found, inside

    model = tiny_model()
    monkeypatch.setattr(session, "ask", ask)

    def make(scene: Scene, masks: np.ndarray, image: np.ndarray, proposes: bool = True) -> Dialogue:
        monkeypatch.setattr(session, "proposed", lambda net, encoded: masks if proposes else None)
        return Dialogue(Told(scene, masks, model), model.encode(image))

    return make


def test_a_perfect_model_gives_the_exact_sets_of_drawn_dialogues(told: Any) -> None:
    """Composition adds no fault of its own, but where the grammar lacks a plural wording of what is left."""
    config, right = SyntheticConfig(), dict.fromkeys(OPERATIONS, 0)
    count = dict.fromkeys(OPERATIONS, 0)
    for index in range(25):
        drawn = draw_scene(config, "val", index)
        for operation in OPERATIONS:
            dialogue = draw_dialogue(drawn.scene, random.Random(index), operation)
            if dialogue is None:
                continue
            asked = told(drawn.scene, drawn.masks, drawn.image)
            asked.say(dialogue.first)
            assert len(asked.selected) == len(bits(dialogue.targets)), dialogue
            answer = asked.say(dialogue.follow_up)
            wanted = drawn.masks[bits(dialogue.result)]
            exact = len(asked.selected) == len(wanted) and bool((overlaps(asked.selected, wanted).max(0, initial=0) == 1).all())
            assert asked.operation == operation and answer.count == min(6, len(asked.selected))
            right[operation] += exact
            count[operation] += 1
    shares = {operation: right[operation] / count[operation] for operation in OPERATIONS}
    assert min(count.values()) > 18 and all(share >= 0.95 for share in shares.values()), (shares, count)


def test_several_turns_and_two_that_are_one(told: Any) -> None:
    scene = _scene((0, 0, 0, 0, 0), (0, 1, 20, 0, 0), (1, 0, 60, 0, 0), (1, 1, 60, 60, 3))
    masks = np.zeros((4, 100, 100), bool)
    for mask, item in zip(masks, scene.objects, strict=True):
        x1, y1, x2, y2 = item.box
        mask[y1:y2, x1:x2] = True
    asked = told(scene, masks, np.zeros((100, 100, 3), np.uint8))

    def said(text: str) -> list[int]:
        asked.say(text)
        return sorted(int(overlaps(mask[None], masks)[0].argmax()) for mask in asked.selected)

    assert said("the circles") == [0, 1]
    assert said("not the red one") == [1]
    assert said("and the red square too") == [1, 2]
    assert said("the others") == [0, 3]
    assert said("and the one next to them") == [0, 1, 3]
    assert said("only the orange ones") == [1, 3]
    assert said("the leftmost one") == [1]
    assert said("the square to the right of it") == [2]
    assert said("only the stars") == [] and asked.say("the others").count == 4, "nothing was selected: all are others"
    assert asked.history[0] == "the circles" and len(asked.history) == 10
    other = asked.fork()
    assert said("all squares") == [2, 3] and asked.operation == NEW and asked.history == ["all squares"]
    assert len(other.selected) == 4 and len(other.history) == 10
    asked.clear()
    assert len(asked.selected) == 0 and asked.history == []
    asked.say("the others")
    assert asked.operation == NEW, "with nothing said before it is an expression of its own"
    asked.select([masks[3]], kind="squares")
    assert said("the other square") == [2] and said("the one next to it") == [1]
    asked.select(boxes_xyxy=[[0, 0, 10, 10], [20, 0, 30, 10]])
    assert said("without the one on the right") == [0]


def test_without_proposals_sets_are_cut_pixel_by_pixel(told: Any) -> None:
    """A red and an orange square touch, so that their answer is one piece; a circle stands apart."""
    scene = _scene((1, 0, 10, 10, 0), (1, 1, 20, 10, 0), (0, 0, 60, 60, 0))
    masks = np.zeros((3, 100, 100), bool)
    for mask, item in zip(masks, scene.objects, strict=True):
        x1, y1, x2, y2 = item.box
        mask[y1:y2, x1:x2] = True
    asked = told(scene, masks, np.zeros((100, 100, 3), np.uint8), proposes=False)
    assert not asked.proposes and (asked.say("the squares").mask == masks[:2].any(0)).all() and len(asked.selected) == 1
    assert (asked.say("not the red one").mask == masks[1]).all()
    assert (asked.say("the others").mask == masks[[0, 2]].any(0)).all()
    assert (asked.say("only the squares").mask == masks[0]).all()
    assert (asked.say("the one next to it").mask == masks[1]).all()
    assert (asked.say("and the circle too").mask == masks[1:].any(0)).all() and asked.say("the largest one").count == 1
    assert [len(pieces(mask)) for mask in (masks.any(0), masks[0] & False)] == [2, 0]


def test_the_face_of_a_session() -> None:
    """With a real tiny model: a new expression is answered as the model does, follow-ups run, and wrong settings are told."""
    model, image = tiny_model(), np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    asked = grex_mllm.Dialogue(model, image)
    first, alone = asked.say("the red circle"), model.ground(image, "the red circle")
    assert (first.mask == alone.mask).all() and first.count == alone.count and first.no_target_prob == pytest.approx(alone.no_target_prob)
    for text in ("and the star too", "not the biggest one", "the one next to them", "the others", "only the red ones"):
        answer = asked.say(text)
        assert answer.mask.shape == (40, 56) and (answer.mask == np.any(asked.selected, axis=0)).all()
        assert answer.no_target == (not len(asked.selected)) and len(answer.boxes_xyxy) == len(asked.selected)
    assert Dialogue(model, image, threshold=0.0).say("the red circle").no_target
    wrong = (({"resolve": "guess"}, "compose, model"), ({"resolve": "model"}, "data.train: dialogue"), ({"threshold": 2.0}, "2.0"))
    for options, told_what in wrong:
        with pytest.raises(GrexError, match=told_what):
            Dialogue(model, image, **options)  # type: ignore[arg-type]
    with pytest.raises(GrexError, match="empty"):
        asked.say("  ")


def test_a_picture_in_which_no_object_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is selected then is what the answers show."""
    monkeypatch.setattr(session, "proposed", lambda net, encoded: np.zeros((0, 40, 56), bool))
    asked = Dialogue(tiny_model(), np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8), threshold=1.0)
    assert asked.say("the red circle").mask.any() and len(asked.selected) > 0
    for text in ("and the star too", "not the biggest one", "the one next to them", "the others", "only the red ones"):
        answer = asked.say(text)
        assert (answer.mask == np.any(asked.selected, axis=0)).all() and len(answer.boxes_xyxy) == len(asked.selected), text


def test_a_model_that_was_trained_so_reads_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = tiny_model(), np.zeros((40, 56, 3), np.uint8)
    model.config.data.train = "dialogue"
    asked, texts = Dialogue(model, image, resolve="model"), []
    plain = session.ask
    monkeypatch.setattr(session, "ask", lambda net, encoded, said, *more: texts.append(said[0]) or plain(net, encoded, said, *more))
    answer = [asked.say(text) for text in ("the red circle", "not the big one", "a green star")][1]
    assert texts == ["the red circle", "the red circle | not the big one", "a green star"] and answer.expression == "not the big one"
    assert joined(["a b", "c", "d"], lambda text: len(text) > 6) == "c | d" and joined(["too long"], lambda text: True) == "too long"
    assert has_history(DataConfig(train="dialogue")) and not has_history(DataConfig(train="synthetic"))


def test_a_source_of_dialogues_trains_with_exact_truth() -> None:
    """Every follow-up's targets are those of its scene; the share is the knob's; a generator gets a plain expression for them."""
    data = load_config(None, ["--data.train=dialogue", "--data.sources.dialogue.image_size=64", "--data.expressions_per_image=8"]).data
    assert data.sources["dialogue"] == DialogueConfig(image_size=64)
    samples, spoken, total = training_samples(data, 0, 100, TRAINING, generates=True), [], 0
    for position in range(12):
        sample, again = samples[position], samples[position]
        assert [(e.raw, e.targets) for e in sample.expressions] == [(e.raw, e.targets) for e in again.expressions]
        total += len(sample.expressions)
        for record in (e for e in sample.expressions if SEPARATOR in e.raw):
            spoken.append(record)
            assert record.tags[0] in OPERATIONS and parse_follow_up(record.raw.split(SEPARATOR)[1]).operation == record.tags[0]
            if record.targets:
                assert check_expression(record.expression, sample, record.targets) == "exact"
    assert 0.3 < len(spoken) / total < 0.6 and any(not record.targets for record in spoken)
    assert {record.tags[0] for record in spoken} == set(OPERATIONS)
    data.sources["dialogue"].follow_up_share = 0.0
    assert all(SEPARATOR not in e.raw for e in training_samples(data, 0, 100)[0].expressions)
    data.sources["dialogue"].follow_up_share = 1.5
    with pytest.raises(GrexError, match="follow_up_share"):
        training_samples(data, 0, 100)
    data.sources["dialogue"].follow_up_share = 0.5
    assert sum(SEPARATOR in line for line in training_text(data, 40)) == 20
