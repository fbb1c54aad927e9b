"""Re-ranking by a model's own grounding: scores by hand, scripted answers that decide, and tiny real models."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from score_case import make_dataset
from test_asking import GREC, GREG, QWEN3, asked, box_text, hold
from test_mllm_generator import TEXTS, build, scenes
from tiny import tiny_speaker
from tiny_mllms import write_mllm

from grex_mllm.config import load_config
from grex_mllm.data.dataset import FolderDataset
from grex_mllm.data.transforms import selectable_instances
from grex_mllm.errors import GrexError
from grex_mllm.marks import Shown
from grex_mllm.models.describe import check_reranker, describe, describe_encoded
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.multimodal.chat import Message
from grex_mllm.predict import _items  # type: ignore[attr-defined]
from grex_mllm.predictors.grex import describe_sets
from grex_mllm.predictors.protocol import Item
from grex_mllm.zeroshot import listening
from grex_mllm.zeroshot.asking import Asking
from grex_mllm.zeroshot.base import Picture, RawAnswer, Request
from grex_mllm.zeroshot.families import family_of_type
from grex_mllm.zeroshot.listening import Reranking, agreement, best_of, parse_reranking
from grex_mllm.zeroshot.local import Local
from grex_mllm.zeroshot.marks import shown_objects
from grex_mllm.zeroshot.own_grounding import OwnGrounding
from grex_mllm.zeroshot.parsing import Parsed
from grex_mllm.zeroshot.recorded import Recorded


def shown(*boxes: tuple[float, float, float, float]) -> list[Shown]:
    found = []
    for box in boxes:
        mask = np.zeros((100, 200), bool)
        mask[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = True
        found.append(Shown(mask, box))
    return found


def test_agreement_by_hand() -> None:
    one, two = (0.0, 0.0, 10.0, 10.0), (50.0, 0.0, 60.0, 20.0)
    objects = shown(one, two)

    def some(*boxes: tuple[float, ...]) -> Parsed:
        return Parsed("ok", boxes_xyxy=np.array(boxes, float).reshape(-1, 4))

    assert agreement(some(two, one), objects) == 1
    assert agreement(some(one), objects) == pytest.approx(2 / 3)  # one of two
    assert agreement(some(one, two, (80, 80, 90, 90)), objects) == pytest.approx(4 / 5)  # one too many
    assert agreement(some((0, 0, 10, 5), two), objects) == pytest.approx(2 * 1.5 / 4)  # half of an object
    assert agreement(some((0, 0, 60, 20)), objects) == pytest.approx(2 * (200 / 1200) / 3)  # one box around both
    assert agreement(some(one, one), shown(one)) == pytest.approx(2 / 3)  # an object is matched once
    for nothing in (Parsed("ok", no_target=True), Parsed("unparsable", "x"), Parsed("refused", "x"), Parsed("error", "x")):
        assert agreement(nothing, objects) == 0
    points = Parsed("ok", points=np.array([[5.0, 5.0], [55.0, 10.0], [150.0, 50.0], [200.0, 100.0]]))
    assert agreement(points, objects) == pytest.approx(4 / 6)
    assert best_of(["a", "b", "b", "c"], {"a": 0.5, "b": 0.5, "c": 0.7}) == [("c", 0.7), ("b", 0.5), ("a", 0.5)]


def test_names_of_rerankings() -> None:
    assert parse_reranking("none") is None and parse_reranking("own_grounding") == Reranking(4, 0.7)
    made = parse_reranking("own_grounding:8@1.2")
    assert made == Reranking(8, 1.2) and made.name == "own_grounding:8@1.2" and made.calls == (10, 18)
    for wrong in ("listener", "own_grounding:0", "own_grounding:x", "own_grounding:2@0", "own_grounding:65", "own_grounding:2@3", ""):
        with pytest.raises(GrexError, match=r"ask\.rerank"):
            parse_reranking(wrong)


@pytest.fixture(scope="module")
def item(tmp_path_factory: pytest.TempPathFactory) -> Item:
    source = FolderDataset(make_dataset(tmp_path_factory.mktemp("listen")), "val", 10**9)
    items = _items(source, list(range(len(source))), ["ground", "generate"], frozenset(), None)
    return next(item for item in items if len(item.instances) > 1)


def test_the_candidate_that_leads_back_to_the_objects_wins(item: Item, tmp_path: Path) -> None:
    """The model finds what an expression says: "thing 0" is the first object. Asked about another object, another candidate wins."""
    height, width = item.image.shape[:2]
    names = [instance.annotation_id for instance in item.instances]
    boxes = {name: shown_objects(item, (name,))[0].box_xyxy for name in names}

    def reply(request: Request) -> RawAnswer | str:
        text = asked(request)
        if "#listen." in request.key:
            named = re.search(r"thing (\d)", text)
            assert request.turns[-1].parts[0].digest == pixels and request.temperature == 0  # type: ignore[union-attr]
            if named is None:
                return "[]"
            box = np.array(boxes[names[int(named[1])]]) / [width, height, width, height] * 1000
            return box_text(tuple(round(v) for v in box.tolist()))  # type: ignore[arg-type]
        return ["nonsense", "thing 0", "thing 1", "thing 0", ""][request.sample] if "#candidates" in request.key else "nonsense"

    asking = Asking(QWEN3, GREC, GREG, rerank=Reranking(5, 0.9))
    pixels = Picture(item.image).digest
    for n in (0, 1):
        answer, rounds = hold(asking.describe_set(item, (names[n],)), reply)
        assert answer.expression == f"thing {n}" and answer.status == "ok"
        assert answer.fields["candidates"][0] == f"thing {n}" and set(answer.fields["candidates"]) == {"nonsense", "thing 0", "thing 1"}
        assert answer.fields["scores"][0] > 0.9 > answer.fields["scores"][1] and answer.fields["scores"][-1] == 0
        assert [len(made) for made in rounds] == [1, 5, 3] and len({r.key for made in rounds for r in made}) == 9
        assert {r.temperature for r in rounds[1]} == {0.9}
        assert [raw["step"] for raw in answer.fields["raw"]] == ["describe"] + ["candidates"] * 5 + ["locate"] * 3
        least, most = asking.rerank.calls if asking.rerank else (0, 0)
        assert least <= len(answer.fields["raw"]) <= most
        line = {"image_id": item.record.image_id, "targets": [names[n]], "by": "m, x", "raw": answer.fields["raw"]}
        (tmp_path / f"{n}.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
        (again,) = Recorded(tmp_path / f"{n}.jsonl").hold(iter([asking.describe_set(item, (names[n],))]))
        assert (again.expression, again.fields) == (answer.expression, answer.fields)  # read again without asking
    plain = Asking(QWEN3, GREC, GREG)
    assert hold(plain.describe_set(item, (names[0],)), reply)[0].expression == "nonsense"
    assert asking.name == plain.name + "+own_grounding:5@0.9" and asking.fingerprint() != plain.fingerprint()
    silent, _ = hold(asking.describe_set(item, (names[0],)), lambda r: "I'm sorry, I can't help with that.")
    assert silent.status == "refused" and silent.expression == "" and len(silent.fields["raw"]) == 6
    both, _ = hold(asking.describe_set(item, tuple(names[:2])), reply)
    assert 0.5 < both.fields["scores"][0] < 0.8  # either thing alone is half of the set


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GrexModel:
    folder = write_mllm("qwen3-vl", tmp_path_factory.mktemp("qwen3-vl"), TEXTS * 2)
    return build(folder, tmp_path_factory.mktemp("lm"), objects="marks", max_new_tokens=6, lora_rank=2).eval()


def set_masks() -> tuple[Any, np.ndarray]:
    sample = scenes()[0]
    return sample, np.stack([instance.mask for instance in selectable_instances(sample.record)])


def test_a_generator_listens_to_itself(model: GrexModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of the model's grounding are scripted: the text that leads to the set wins, and with another set another text."""
    sample, masks = set_masks()
    height, width = masks.shape[1:]
    boxes = [Shown(mask, tuple(np.array([np.nonzero(mask)[1].min(), np.nonzero(mask)[0].min(), np.nonzero(mask)[1].max() + 1,
                                         np.nonzero(mask)[0].max() + 1], float))).box_xyxy for mask in masks]  # type: ignore[arg-type]  # fmt: skip
    found = {"the first": [0], "the others": [1, 2], "nobody": []}

    def answers(self: Local, batch: Any) -> list[RawAnswer]:
        told = []
        for one in batch:
            text = "".join(part for part in one.request.turns[-1].parts if isinstance(part, str))
            chosen = next(objects for name, objects in found.items() if f'"{name}"' in text)
            numbers = [(np.array(boxes[n]) / [width, height, width, height] * 1000).round().astype(int).tolist() for n in chosen]
            told.append(RawAnswer(json.dumps([{"bbox_2d": box, "label": "x"} for box in numbers])))
        return told

    monkeypatch.setattr(Local, "_answers", answers)
    encoded, texts = model.encode(sample.image), list(found)
    heard = OwnGrounding(model)
    assert heard.family.name == "qwen3-vl" and heard.prompt.name == "native_qwen3-vl" and heard.prompt.max_tokens == 512
    scores = heard.agreements(encoded, masks, [[0], [1, 2]], [texts, texts])
    assert scores[0][0] > 0.9 and scores[0][1:] == [pytest.approx(0, abs=0.3), 0] and scores[1][1] > 0.9 and scores[1][2] == 0
    monkeypatch.setattr(model.generator, "generate", lambda *_, **o: [["nobody", "the first", "the others"]] * (2 if o else 1))
    options = {"mode": "beam", "candidates": 3, "rerank": "own_grounding"}
    chosen = describe_encoded(model, encoded, masks, [[0], [1, 2]], **options)  # type: ignore[arg-type]
    assert [one.expression for one in chosen] == ["the first", "the others"]
    swapped = describe_encoded(model, encoded, masks, [[1, 2], [0]], **options)  # type: ignore[arg-type]
    assert [one.expression for one in swapped] == ["the others", "the first"]


def test_a_real_model_is_asked_without_its_adapters_and_costs_are_told(model: GrexModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "MAX_TOKENS", 6)
    sample, masks = set_masks()
    encoded, generator = model.encode(sample.image), model.generator
    inputs = generator.tokenizer.inputs([[Message("user", (sample.image, "what?"))]])
    with torch.no_grad():
        before = generator.base(**inputs).logits
        for key, parameter in generator.lm.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.3)
        assert not torch.allclose(generator.base(**inputs).logits, before, atol=1e-2)
        with generator.without_adapters() as base:
            torch.testing.assert_close(base(**inputs).logits, before)
        assert not torch.allclose(generator.base(**inputs).logits, before, atol=1e-2)
    given: dict[str, Any] = {"mode": "greedy", "candidates": 2, "rerank": "own_grounding"}
    one = describe_encoded(model, encoded, masks, [[0], [1, 2]], **given)
    again = describe_encoded(model, encoded, masks, [[0], [1, 2]], **given)
    assert [d.candidates for d in one] == [d.candidates for d in again] and all(0 <= d.score <= 1 for d in one if d.score is not None)
    different = len({text for d in one for text, _ in d.candidates})
    assert one[0].costs["calls"] == different and one[0].costs["completion_tokens"] <= 6 * different and one[1].costs == {}
    assert one[0].costs["prompt_tokens"] > 20 * different and one[0].costs == again[0].costs
    model.config.predict.rerank = "own_grounding"
    targets = tuple(instance.annotation_id for instance in selectable_instances(sample.record)[:1])
    asked_for = Item(sample.record, Path("x.png"), lambda: sample.image, object_sets=[targets])
    (answer,) = describe_sets(model, asked_for, encoded, [targets], 2)
    assert answer.fields["listener_costs"]["calls"] >= 1 and answer.fields["listener"]["expression"] in answer.fields["candidates"]
    model.config.predict.rerank = "listener"
    (plain,) = describe_sets(model, asked_for, encoded, [targets], 2)
    assert "listener_costs" not in plain.fields and plain.fields["listener"]["score"] != answer.fields["listener"]["score"]
    told = describe(model, sample.image, masks[:1], candidates=2, rerank="own_grounding", details=True)
    assert told.costs["calls"] >= 1


def test_what_cannot_listen_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GrexError, match=r'rerank "own_grounding" with a generator that sees no picture'):
        check_reranker(tiny_speaker(tmp_path), "own_grounding")
    with pytest.raises(GrexError, match=r'rerank "loud"; expected None, listener, objects, own, own_grounding'):
        check_reranker(tiny_speaker(tmp_path), "loud")
    with pytest.raises(GrexError, match="generator that is asked no chats"):
        OwnGrounding(type("M", (), {"generator": object()})())
    assert load_config(None, ["--predict.rerank=own_grounding"]).predict.rerank == "own_grounding"
    assert family_of_type("vipllava").name == "llava" and family_of_type("kosmos-2").name == "kosmos2"
    with pytest.raises(GrexError, match='model type "gpt2"'):
        family_of_type("gpt2")
