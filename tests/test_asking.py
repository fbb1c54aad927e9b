"""Conversations with scripted answers: targets, counts, expressions, rejection in every way, examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from score_case import make_dataset

from grex_mllm.data.dataset import FolderDataset
from grex_mllm.errors import GrexError
from grex_mllm.predict import _items  # type: ignore[attr-defined]
from grex_mllm.predictors.lines import answer_fields
from grex_mllm.predictors.protocol import Answer, Item, set_key
from grex_mllm.zeroshot.asking import Asking
from grex_mllm.zeroshot.base import Conversation, Picture, RawAnswer, Request, View
from grex_mllm.zeroshot.families import find_family
from grex_mllm.zeroshot.prompts import Prompt, Sampling
from grex_mllm.zeroshot.rejection import Rejection, parse_rejection
from grex_mllm.zeroshot.segmenters import Boxes, Polygons, box_mask
from grex_mllm.zeroshot.shots import choose_shots, shot_turns

QWEN3 = find_family("qwen3-vl")
QWEN25 = find_family("qwen2.5-vl")
Reply = Callable[[Request], RawAnswer | str]


def prompt(task: str, user: str, **changes: Any) -> Prompt:
    given: dict[str, Any] = {"family": "any", "track": "uniform", "version": 1, "frame": "k1000", "order": "xyxy", "sha256": f"{task:0>64}"}
    given |= {"answer": "boxes"} if task in ("grec", "gres") else {}
    given |= {"empty_answer": "unparsable", "marking": "numbers" if task == "greg" else ""}
    return Prompt(f"test_{task}", task, user=user, **(given | changes))


GREC = prompt("grec", 'Locate "{expression}" in this picture of {width} x {height}.', system="Answer in JSON.")
EXISTS = prompt("exists", 'Is there "{expression}"?', max_tokens=5)
COUNT = prompt("count", 'How many "{expression}"?')
GREG = prompt("greg", "Name the {count} objects marked {numbers} ({colours}) at {objects}.", marking="numbers+coordinates")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("asking"))


@pytest.fixture(scope="module")
def items(data: Path) -> list[Item]:
    source = FolderDataset(data, "val", 10**9)
    return list(_items(source, list(range(len(source))), ["ground", "generate"], frozenset(), None))


def hold(conversation: Conversation, reply: Reply) -> tuple[Answer, list[list[Request]]]:
    """Hold one conversation; return its answer and the requests of each round."""
    rounds: list[list[Request]] = []
    try:
        requests = next(conversation)
        while True:
            rounds.append(requests)
            answers = [reply(request) for request in requests]
            requests = conversation.send([RawAnswer(a) if isinstance(a, str) else a for a in answers])
    except StopIteration as end:
        answer: Answer = end.value
        return answer, rounds


def asked(request: Request) -> str:
    return "".join(part for part in request.turns[-1].parts if isinstance(part, str))


def first(items: list[Item]) -> tuple[Item, Any]:
    return items[0], items[0].expressions[0]


def box_text(*boxes: tuple[int, int, int, int]) -> str:
    return json.dumps([{"bbox_2d": list(box), "label": "x"} for box in boxes])


def test_targets_come_as_boxes_and_masks_at_the_original_size(items: list[Item]) -> None:
    item, record = first(items)
    height, width = item.image.shape[:2]
    answer, rounds = hold(
        Asking(QWEN3, GREC, segmenter=Boxes()).ground(item, record), lambda _: box_text((0, 0, 500, 1000), (500, 0, 1000, 500))
    )
    ((request,),) = rounds
    assert request.key == f"{record.expression_id}#locate" and request.temperature == 0 and request.max_tokens == 512
    assert [turn.role for turn in request.turns] == ["system", "user"] and isinstance(request.turns[1].parts[0], Picture)
    assert asked(request) == f'Locate "{record.raw}" in this picture of {width} x {height}.'
    found = answer.grounding
    assert found is not None and answer.status == "ok" and answer.masks and answer.key == record.expression_id
    assert found.boxes_xyxy is not None and found.box_scores is not None
    np.testing.assert_allclose(found.boxes_xyxy, [[0, 0, width / 2, height], [width / 2, 0, width, height / 2]])
    assert found.box_scores.tolist() == [1.0, 1.0] and found.count == 2 and (found.mask == box_mask(found.boxes_xyxy, height, width)).all()
    assert not found.no_target and found.no_target_prob == 0.0
    (raw,) = answer.fields["raw"]
    assert (
        raw["step"] == "locate"
        and raw["prompt"] == GREC.sha256
        and raw["text"].startswith("[{")
        and raw["sent"] == list(QWEN3.sent(width, height, QWEN3.limits))
    )
    assert "flags" not in answer.fields
    json.dumps(answer_fields(answer))


def test_no_target_and_boxes_alone(items: list[Item]) -> None:
    item, record = first(items)
    for segmenter in (None, Boxes()):
        answer, _ = hold(Asking(QWEN3, GREC, segmenter=segmenter).ground(item, record), lambda _: "[]")
        found = answer.grounding
        assert found is not None and found.no_target and found.head_no_target and found.no_target_prob == 1.0 and found.count == 0
        assert found.boxes_xyxy is not None and found.boxes_xyxy.shape == (0, 4) and not found.mask.any()
        assert answer.masks == (segmenter is not None) and ("mask_rle" in answer_fields(answer)) == answer.masks


def test_statuses_are_the_parsers_and_raw_answers_stay(items: list[Item]) -> None:
    item, record = first(items)
    for raw, status in (
        (RawAnswer("I like dogs."), "unparsable"),
        (RawAnswer(None, "refusal", refusal="no"), "refused"),
        (RawAnswer(None, "error", error="HTTP 500"), "error"),
        (RawAnswer(""), "unparsable"),
    ):
        answer, _ = hold(Asking(QWEN3, GREC, segmenter=Boxes()).ground(item, record), lambda _, raw=raw: raw)
        assert answer.status == status and answer.reason and answer.grounding is None
        assert len(answer.fields["raw"]) == 1 and answer_fields(answer)["status"] == status


def test_the_size_that_the_model_saw_is_asked_of_the_backend_or_told_in_the_answer(items: list[Item]) -> None:
    item, record = first(items)
    height, width = item.image.shape[:2]
    pixels = prompt("grec", "{expression}: {sent_width} x {sent_height}", frame="px_sent")
    box = box_text((0, 0, 50, 20))
    for backend, sent, (w, h) in ((None, None, (100, 200)), ((100, 200), None, (100, 200)), ((7, 7), (100, 200), (100, 200))):
        asking = Asking(QWEN25, pixels, view=lambda *_, backend=backend: backend)
        answer, rounds = hold(asking.ground(item, record), lambda _, sent=sent: RawAnswer(box, sent=sent))
        assert answer.grounding is not None and answer.grounding.boxes_xyxy is not None
        view = asking.view_of(width, height)
        if backend is None and sent is None:
            w, h = view.sent_width, view.sent_height
        np.testing.assert_allclose(answer.grounding.boxes_xyxy[0], [0, 0, 50 * width / w, 20 * height / h], atol=1e-3)
        assert asked(rounds[0][0]).endswith(f"{view.sent_width} x {view.sent_height}")
        assert answer.fields["raw"][0]["sent"] == [w, h]


def test_counts(items: list[Item]) -> None:
    item, record = first(items)
    for text, count, absent in (("There are 3.", 3, False), ("0", 0, True), ("12", 6, False)):
        answer, rounds = hold(Asking(QWEN3, COUNT).ground(item, record), lambda _, text=text: text)
        fields = answer_fields(answer)
        assert (fields["count"], fields["no_target"], fields["no_target_prob"]) == (count, absent, float(absent))
        assert "boxes_xyxy" not in fields and "mask_rle" not in fields and rounds[0][0].key.endswith("#count")
    answer, _ = hold(Asking(QWEN3, COUNT).ground(item, record), lambda _: "many, many")
    assert answer.status == "unparsable" and answer.grounding is None


def test_an_expression_is_asked_for_the_whole_set(items: list[Item]) -> None:
    item = next(item for item in items if any(len(targets) > 1 for targets in item.object_sets))
    targets = next(targets for targets in item.object_sets if len(targets) == 2)
    answer, rounds = hold(Asking(QWEN3, describe=GREG).describe_set(item, targets), lambda _: 'The expression is: "The two squares."')
    assert answer.expression == "The two squares" and answer.status == "ok" and answer.key == set_key(item.record.image_id, targets)
    ((request,),) = rounds
    boxes = np.array([next(i.box_xyxy for i in item.instances if i.annotation_id == target) for target in targets])
    told = QWEN3.mention(boxes, QWEN3.view(item.record.width, item.record.height))
    assert asked(request) == f"Name the 2 objects marked 1 and 2 (red and green) at {told}."
    picture = request.turns[-1].parts[0]
    assert isinstance(picture, Picture) and picture.pixels.shape == item.image.shape and (picture.pixels != item.image).any()
    cut = Asking(QWEN3, describe=prompt("greg", "Name them.", marking="crops"))
    _, rounds = hold(cut.describe_set(item, targets), lambda _: "two squares")
    pictures = [part for part in rounds[0][0].turns[-1].parts if isinstance(part, Picture)]
    assert len(pictures) == 3 and (pictures[0].pixels == item.image).all()
    for text, status in (("", "unparsable"), ("I cannot identify people in images.", "refused")):
        answer, _ = hold(Asking(QWEN3, describe=GREG).describe_set(item, targets), lambda _, text=text: text)
        assert answer.status == status and answer.expression == "" and answer.reason


def test_names_of_rejections() -> None:
    for name in ("none", "twice", "consistency:5@0.7", "probability:0.5", "consistency:3@1.2", "probability:0"):
        assert parse_rejection(name).name == name
    assert parse_rejection("consistency") == Rejection("consistency", 5, 0.7) and parse_rejection("probability").threshold == 0.5
    assert parse_rejection("consistency:9").samples == 9
    assert [parse_rejection(n).calls for n in ("none", "twice", "consistency:4", "probability")] == [(1, 1), (1, 2), (4, 4), (1, 2)]
    for wrong in ("never", "twice:2", "consistency:1", "consistency:x", "consistency:3@0", "probability:2", "probability:nan", ""):
        with pytest.raises(GrexError, match="rejection"):
            parse_rejection(wrong)


def test_asked_twice(items: list[Item]) -> None:
    item, record = first(items)
    asking = Asking(QWEN3, GREC, exists=EXISTS, segmenter=Boxes(), rejection=Rejection("twice"))

    def run(exists: str, locate: str = "[]") -> Answer:
        answer, rounds = hold(asking.ground(item, record), lambda r: exists if r.key.endswith("#exists") else locate)
        assert [raw["step"] for raw in answer.fields["raw"]] == ["exists", "locate"][: len(rounds)]
        return answer

    yes, no, both = run("Yes.", box_text((0, 0, 500, 500))), run("No, there is none."), run("yes", "[]")
    assert yes.grounding is not None and yes.grounding.count == 1 and len(yes.fields["raw"]) == 2
    assert no.grounding is not None and no.grounding.no_target and no.grounding.no_target_prob == 1.0 and len(no.fields["raw"]) == 1
    assert both.grounding is not None and both.grounding.no_target and len(both.fields["raw"]) == 2
    assert run("a photograph of a street").status == "unparsable"
    assert hold(asking.ground(item, record), lambda _: RawAnswer(None, "error", error="gone"))[0].status == "error"
    with pytest.raises(GrexError, match="exists"):
        Asking(QWEN3, GREC, segmenter=Boxes(), rejection=Rejection("twice"))


def test_probability_of_no(items: list[Item]) -> None:
    item, record = first(items)
    asking = Asking(QWEN3, GREC, exists=EXISTS, segmenter=Boxes(), rejection=Rejection("probability", threshold=0.6))

    def run(probs: dict[str, float] | None, **raw: Any) -> tuple[Answer, list[list[Request]]]:
        box = box_text((0, 0, 500, 500))
        return hold(asking.ground(item, record), lambda r: RawAnswer("no", choice_probs=probs, **raw) if r.choices else box)

    answer, rounds = run({"yes": 0.3, "no": 0.1})
    assert rounds[0][0].choices == ("yes", "no") and answer.grounding is not None and not answer.grounding.no_target
    assert answer.grounding.no_target_prob == pytest.approx(0.25) and len(rounds) == 2
    answer, rounds = run({"yes": 0.1, "no": 0.3})
    assert answer.grounding is not None and answer.grounding.no_target and answer.grounding.no_target_prob == pytest.approx(0.75)
    assert len(rounds) == 1
    for probs in (None, {}, {"yes": 0.0, "no": 0.0}):
        assert run(probs)[0].status == "error"
    assert run(None, finish="error", error="gone")[0].status == "error"


def test_votes_of_samples(items: list[Item]) -> None:
    item, record = first(items)
    asking = Asking(QWEN3, GREC, segmenter=Boxes(), rejection=Rejection("consistency", 5, 0.8))
    texts = [box_text((0, 0, 500, 500)), "[]", box_text((10, 0, 510, 500), (800, 800, 900, 900)), "hm", box_text((0, 0, 490, 500))]
    answer, rounds = hold(asking.ground(item, record), lambda r: texts[r.sample])
    assert [r.sample for r in rounds[0]] == [0, 1, 2, 3, 4] and {r.temperature for r in rounds[0]} == {0.8}
    assert len({r.key for r in rounds[0]}) == 5 and len({r.digest for r in rounds[0]}) == 5
    assert answer.grounding is not None and answer.grounding.boxes_xyxy is not None and answer.grounding.count == 1
    height, width = item.image.shape[:2]
    np.testing.assert_allclose(answer.grounding.boxes_xyxy, [[0, 0, width / 2, height / 2]], atol=1e-3)
    assert [raw["text"] for raw in answer.fields["raw"]] == texts
    with pytest.raises(GrexError, match="count"):
        Asking(QWEN3, COUNT, exists=EXISTS, rejection=Rejection("twice"))


def test_polygons_become_masks(items: list[Item]) -> None:
    item, record = first(items)
    height, width = item.image.shape[:2]
    asking = Asking(QWEN3, prompt("gres", "{expression}", answer="polygons"), segmenter=Polygons())
    text = json.dumps([{"polygon": [[0, 0], [500, 0], [500, 500], [0, 500]]}])
    answer, _ = hold(asking.ground(item, record), lambda _: text)
    assert answer.grounding is not None and answer.grounding.count == 1
    assert abs(int(answer.grounding.mask.sum()) - height * width // 4) <= height + width


def test_examples_are_earlier_turns_in_the_familys_own_format(data: Path, items: list[Item]) -> None:
    shots = choose_shots(data, 3, seed=1, split="val")
    assert sorted(min(len(s.record.targets), 2) for s in shots) == [0, 1, 2] and len({s.record.image_id for s in shots}) == 3
    again = choose_shots(data, 3, seed=1, split="val")
    assert [s.record.expression_id for s in shots] == [s.record.expression_id for s in again]
    assert any(
        [s.record.expression_id for s in choose_shots(data, 3, seed=n, split="val")] != [s.record.expression_id for s in shots]
        for n in (2, 3)
    )
    avoided = shots[0].record.image_id
    assert avoided not in {s.record.image_id for s in choose_shots(data, 3, seed=1, split="val", avoid={avoided})}
    view_of = Asking(QWEN3, GREC).view_of
    turns = shot_turns(shots, GREC, QWEN3, view_of)
    assert [turn.role for turn in turns] == ["user", "assistant"] * 3
    for shot, user, assistant in zip(shots, turns[::2], turns[1::2]):
        assert user.parts[-1] == GREC.render(view_of(shot.item.record.width, shot.item.record.height), expression=shot.record.raw)[1]
        answer, _ = hold(
            Asking(QWEN3, GREC, segmenter=Boxes()).ground(shot.item, shot.record), lambda _, said=assistant: str(said.parts[0])
        )
        assert answer.grounding is not None and answer.grounding.count == len(shot.record.targets)
        assert answer.grounding.no_target == (not shot.record.targets)
    asking = Asking(QWEN3, GREC, exists=EXISTS, segmenter=Boxes(), shots={f"grec/{GREC.name}": turns})
    assert asking.name.endswith("3-shot") and asking.fingerprint() != Asking(QWEN3, GREC, exists=EXISTS, segmenter=Boxes()).fingerprint()
    item, record = first(items)
    _, rounds = hold(asking.ground(item, record), lambda _: "[]")
    assert [turn.role for turn in rounds[0][0].turns] == ["system", *["user", "assistant"] * 3, "user"]
    asking.shown.add(item.record.image_id)
    for talk in (asking.ground(item, record), Asking(QWEN3, describe=GREG, shown=asking.shown).describe_set(item, item.object_sets[0])):
        with pytest.raises(GrexError, match="one of the examples"):
            next(talk)
    said = [turn.parts[0] for turn in shot_turns(shots, EXISTS, QWEN3, view_of)[1::2]]
    assert sorted(said) == ["No", "Yes", "Yes"]
    assert sorted(t.parts[0] for t in shot_turns(shots, COUNT, QWEN3, view_of)[1::2]) == sorted(str(len(s.record.targets)) for s in shots)
    named = choose_shots(data, 2, seed=1, split="val", targeted=True)
    assert sorted(len(s.record.targets) > 1 for s in named) == [False, True]
    told = shot_turns(named, GREG, QWEN3, view_of)
    assert [t.parts[0] for t in told[1::2]] == [s.record.raw for s in named] and all(isinstance(t.parts[0], Picture) for t in told[::2])


def test_examples_that_cannot_be(data: Path) -> None:
    with pytest.raises(GrexError, match="examples of split"):
        choose_shots(data, 1000, seed=0, split="val")
    with pytest.raises(GrexError, match="split"):
        choose_shots(data, 1, seed=0, split="nowhere")
    with pytest.raises(GrexError, match="examples for prompt"):
        shot_turns([], prompt("grec", "x", frame="unit"), QWEN3, lambda w, h: View(w, h, w, h))


def test_points_and_polygons_of_examples(data: Path, items: list[Item]) -> None:
    molmo = find_family("molmo")
    shots = choose_shots(data, 3, seed=1, split="val")
    view_of = Asking(molmo).view_of
    points = prompt("gres", "{expression}", frame=molmo.frame, order=molmo.order, answer="points")
    for shot, turn in zip(shots, shot_turns(shots, points, molmo, view_of)[1::2]):
        assert ("<point" in str(turn.parts[0])) == bool(shot.record.targets)
    if QWEN3.write_polygons is None:
        with pytest.raises(GrexError, match="examples with polygons"):
            shot_turns([s for s in shots if s.record.targets], prompt("gres", "{expression}", answer="polygons"), QWEN3, view_of)


def test_the_way_of_asking_names_a_result() -> None:
    plain = Asking(QWEN3, GREC, describe=GREG, segmenter=Boxes())
    assert plain.name == "grec/test_grec+greg/test_greg+box"
    voted = Asking(QWEN3, GREC, segmenter=Boxes(), rejection=Rejection("consistency", 3, 1.0), structured=True)
    assert voted.name == "grec/test_grec+box+consistency:3@1+structured"
    others = [plain, voted, Asking(QWEN25, GREC), Asking(QWEN3, GREC), Asking(QWEN3, GREC, seed=1)]
    assert len({asking.fingerprint() for asking in others}) == len(others)
    with pytest.raises(GrexError, match="points"):
        Asking(QWEN3, prompt("gres", "x", answer="points"), segmenter=Boxes())


def test_schemas_and_sampling_stand_in_the_requests(items: list[Item]) -> None:
    item, record = first(items)
    warm = prompt("grec", "{expression}", sampling=Sampling(0.7, 0.8))

    def requests(asking: Asking) -> Iterator[Request]:
        yield from hold(asking.ground(item, record), lambda _: "[]")[1][0]

    (request,) = requests(Asking(QWEN3, warm, structured=True, seed=5))
    assert (request.temperature, request.top_p, request.seed) == (0.7, 0.8, 5) and request.schema == warm.schema is not None
    (request,) = requests(Asking(QWEN3, warm))
    assert request.schema is None
