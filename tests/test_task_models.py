"""Models without a chat template (PaliGemma 1 and 2, Florence-2, Kosmos-2) as local backends: questions, batches, places, refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from score_case import make_dataset
from test_local import once, picture, replies, request
from tiny_task_models import TASK_MODELS, write_task_model

from grex_mllm.cli import main
from grex_mllm.errors import GrexError
from grex_mllm.models.multimodal.chat import Chat, Message
from grex_mllm.models.multimodal.task_words import TaskWords
from grex_mllm.shipped import PROMPT_FOLDER
from grex_mllm.zeroshot.base import RawAnswer, Turn
from grex_mllm.zeroshot.families import find_family
from grex_mllm.zeroshot.local import Local
from grex_mllm.zeroshot.local_settings import LocalSettings
from grex_mllm.zeroshot.parsing import parse_grounding
from grex_mllm.zeroshot.prompts import find_prompt

LINES = ["the red circle on the left", "two blue squares and a star", "detect the man", "Locate it in the image."] * 3
TEXTS = ["the red circle", "it", "two blue squares and a star", "the man on the left"]
FAMILY = {name: name.removesuffix("2") if name == "paligemma2" else name for name in TASK_MODELS}
QUESTIONS = {
    "paligemma": "<image><bos>detect the red circle\n",
    "florence2": "<image><s>Locate the phrases in the caption: the red circle</s>",
    "kosmos2": "</image><grounding><phrase> the red circle</phrase>",
}
Open = Callable[..., Local]


def mostly(*quick: str) -> list[Any]:
    """All models, those that are not named in the long suite."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.long) for name in TASK_MODELS]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Open:
    @cache
    def folder(name: str) -> Path:
        return write_task_model(name, tmp_path_factory.mktemp(name), LINES)

    @cache
    def load(name: str, **settings: Any) -> Local:
        return Local(str(folder(name)), LocalSettings(precision="fp32", **settings), "cpu")

    return load


def asked(name: str, text: str) -> str:
    family = find_family(FAMILY[name])
    return find_prompt("grec", family).render(family.view(90, 60), expression=text)[1]


@pytest.mark.parametrize("name", mostly("paligemma", "florence2", "kosmos2"))
def test_a_question_is_what_the_makers_processor_writes(name: str, opened: Open) -> None:
    words = opened(name).chat
    assert isinstance(words, TaskWords)
    seen = picture().pixels
    inputs = words.inputs([[Turn("user", (picture(), asked(name, "the red circle")))]])
    text = words.tokenizer.decode(inputs["input_ids"][0])
    assert text.endswith(QUESTIONS[FAMILY[name]]) and "labels" not in inputs
    assert words.sent_size(640, 480) == tuple(inputs["pixel_values"].shape[:-3:-1])
    if name == "kosmos2":
        assert int(inputs["image_embeds_position_mask"].sum()) == 64 and text.startswith("<s><image>")
    else:
        assert text.count("<image>") == {"florence2": 5}.get(name, 16)
    broken = words.question([Message("user", (seen, "a <image> and </s> and <eos> and <loc0001>"))])[1]
    assert "<image>" not in broken and ("</s>" not in broken or "paligemma" in name) and "<loc0001>" in broken
    question = Message("user", (seen, "x"))
    for wrong in ([Message("system", ("x",)), question], [Message("user", ("x",))], [Message("user", (seen, seen, "x"))]):
        with pytest.raises(ValueError, match="one picture and one text"):
            words.question(wrong)


@pytest.mark.parametrize("name", mostly("florence2", "kosmos2"))
def test_answers_do_not_depend_on_the_batch_and_keep_their_places(name: str, opened: Open) -> None:
    made = [request(f"{n}", asked(name, text), picture(n // 2), max_tokens=10) for n, text in enumerate(TEXTS)]
    together, alone = replies(opened(name, batch=4), made), replies(opened(name, batch=1), made)
    assert {k: (r.text, r.finish) for k, r in together.items()} == {k: (r.text, r.finish) for k, r in alone.items()}
    assert len({r.text for r in together.values()}) > 1
    token = {"florence2": "<loc_", "kosmos2": "<patch_index_"}.get(name, "<loc")
    assert any(token in str(raw.text) for raw in together.values())
    for raw in together.values():
        assert raw.sent == opened(name).view(90, 60) and raw.usage["completion_tokens"] <= 10 < raw.usage["prompt_tokens"]
    hot = [request(f"{n}", asked(name, "it"), picture(), temperature=1.5, top_p=0.9, sample=n, max_tokens=6) for n in range(4)]
    drawn, again = replies(opened(name, batch=4), hot), replies(opened(name, batch=3), hot[::-1])
    assert {k: r.text for k, r in drawn.items()} == {k: r.text for k, r in again.items()} and len({r.text for r in drawn.values()}) > 1


@pytest.mark.parametrize("name", mostly("paligemma", "florence2", "kosmos2"))
def test_greedy_answers_are_those_of_transformers(name: str, opened: Open) -> None:
    """One question, its own processor and `generate`, as the makers' pages do it, but without their beams."""
    backend = opened(name, batch=1)
    words, model = backend.chat, backend.model
    assert isinstance(words, TaskWords)
    text = asked(name, "two blue squares and a star")
    inputs = words.processor(images=picture(5).pixels, text=words.kind.before + text, return_tensors="pt")
    inputs.pop("labels", None)
    start = {"decoder_start_token_id": 2} if name == "florence2" else {}
    theirs = model.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=1, **start)
    new = theirs[0, 1:] if name == "florence2" else theirs[0, inputs["input_ids"].shape[1] :]
    said = replies(backend, [request("a", text, picture(5), max_tokens=8)])["a"]
    assert said.text == words.decode(new.tolist())


def test_a_location_token_is_one_token_and_is_read(opened: Open) -> None:
    """What a family writes comes back from the model's own tokenizer as it was, and the family's parser reads it."""
    boxes = np.array([[64.0, 120, 320, 480], [0, 0, 640, 480]])
    for name in set(FAMILY.values()):
        family, tokenizer = find_family(FAMILY[name]), opened(name).chat.tokenizer
        view = family.view(640, 480, opened(name).view(640, 480))
        text = family.write(boxes, view, "the man")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        back = opened(name).chat.decode(ids, special=True)
        told = {"frame": family.frame, "order": family.order, "answer": "boxes", "view": view}
        first, second = (parse_grounding(RawAnswer(t), **told) for t in (text, back))  # type: ignore[arg-type]
        assert first.status == second.status == "ok" and np.array_equal(first.boxes_xyxy, second.boxes_xyxy) and len(first.boxes_xyxy) == 2


@pytest.mark.parametrize("name", mostly("florence2"))
def test_grec_and_gres_from_the_command_line(name: str, opened: Open, tmp_path: Path) -> None:
    data, folder = make_dataset(tmp_path / "d"), opened(name).model.name_or_path
    words = ["predict", "--model", f"{FAMILY[name]}:{folder}", "--data", str(data), "--split", "val", "--device", "cpu"]
    for task, masks in (("grec", "box"), ("gres", "polygon" if name == "florence2" else "box")):
        out, own = tmp_path / f"{task}.jsonl", tmp_path / f"{task}.yaml"
        shipped = (PROMPT_FOLDER / task / f"native_{FAMILY[name]}.yaml").read_text(encoding="utf-8")
        own.write_text(re.sub(r"max_tokens: \d+", "max_tokens: 8", shipped), encoding="utf-8")
        flags = [f"--ask.task={task}", f"--ask.masks={masks}", f"--ask.prompt={own}", "--local.precision=fp32"]
        flags += [] if task == "grec" else ["--ask.reject=consistency:2@1"]
        assert main([*words, "--tasks", "ground", "--out", str(out), *flags]) == 0
        lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert lines and all(line["raw"] for line in lines) and {line["status"] for line in lines} <= {"ok", "unparsable"}


@pytest.mark.parametrize("name", mostly("florence2"))
def test_what_they_cannot_do_is_refused_with_a_reason(name: str, opened: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, folder = make_dataset(tmp_path / "d"), opened(name).model.name_or_path
    words = ["predict", "--model", f"{FAMILY[name]}:{folder}", "--data", str(data), "--split", "val", "--device", "cpu"]
    words += ["--local.precision=fp32", "--out", str(tmp_path / "x.jsonl")]

    def told(*flags: str) -> str:
        assert main([*words, *flags]) != 0
        return capsys.readouterr().err

    assert "several marked objects" in told("--tasks", "generate")
    assert "several marked objects" in told("--ask.describe=uniform")
    assert "takes no chat" in told("--ask.shots=2")
    for flag in ("--ask.task=count", "--ask.reject=twice", "--ask.reject=probability:0.5"):
        if name != "florence2":
            continue  # the others take such questions
        assert "no task for" in told(flag)
    assert not (tmp_path / "x.jsonl").exists()


def test_paligemma_counts_and_tells_whether_there_is_any(opened: Open, tmp_path: Path) -> None:
    family = find_family("paligemma")
    view = family.view(640, 480)
    assert find_prompt("count", family).render(view, expression="men in red")[1] == "answer en how many men in red are in the image?"
    assert find_prompt("exists", family).render(view, expression="a dog")[1].startswith("answer en is there a dog")
    other = find_prompt("count", "kosmos2")
    assert other.render(view, expression="men in red")[1] == "Question: How many men in red are in this image? Answer:"
    data, folder = make_dataset(tmp_path / "d"), opened("paligemma").model.name_or_path
    words = ["predict", "--model", f"paligemma:{folder}", "--data", str(data), "--split", "val", "--device", "cpu", "--tasks", "ground"]
    for n, flag in enumerate(("--ask.task=count", "--ask.reject=probability:0.5")):
        assert main([*words, "--local.precision=fp32", "--out", str(tmp_path / f"{n}.jsonl"), flag]) == 0


def test_faults_name_what_to_do(opened: Open, tmp_path: Path) -> None:
    folder = Path(opened("florence2").model.name_or_path)
    with pytest.raises(GrexError, match=r"a limit of pixels or tiles for florence2; expected none"):
        Local(str(folder), LocalSettings(max_tiles=2), "cpu")
    with pytest.raises(GrexError, match=r"of type florence2, which is asked by task words and takes no chat"):
        Chat.load(folder)
    transformers.Molmo2Config().save_pretrained(tmp_path / "molmo2")
    opened("florence2").chat.tokenizer.save_pretrained(tmp_path / "molmo2")
    with pytest.raises(GrexError, match=r"of type molmo2, whose image processor needs torchvision; expected one of qwen2_vl"):
        Local(str(tmp_path / "molmo2"), LocalSettings(), "cpu")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "own").mkdir()
    for file in folder.iterdir():
        (tmp_path / "own" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "own" / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling.X"}}), encoding="utf-8")
    with pytest.raises(GrexError, match=r"belong to code of its own; expected a conversion"):
        Local(str(tmp_path / "own"), LocalSettings(), "cpu")
    backend = opened("florence2", batch=2)
    mixed = replies(backend, [request("a", "<OD>and more", picture()), request("b", asked("florence2", "it"), picture())])
    assert mixed["a"].finish == "error" and "only content" in str(mixed["a"].error) and mixed["b"].finish != "error"
    long = replies(backend, [request("long", asked("florence2", "word " * 600), picture())])["long"]
    assert long.finish == "error" and "places for" in str(long.error)
    half = Local(str(folder), LocalSettings(dtype="bfloat16", precision="fp32"), "cpu")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert replies(half, [request("a", asked("florence2", "it"), picture())])["a"].finish in ("stop", "length")
    assert list(half.hold(iter([once(request("a", asked("florence2", "it"), picture()))]))) and half.fingerprint() != backend.fingerprint()
