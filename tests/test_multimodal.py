"""Multimodal models of the real families: chats become their inputs, image tokens and positions are theirs, batches answer as singles."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_mllms import KINDS, write_mllm

from grex_mllm.errors import GrexError
from grex_mllm.models.multimodal import Chat, ModelChoice, load_multimodal
from grex_mllm.models.multimodal.decoding import read, write
from grex_mllm.zeroshot.base import Picture, Turn

LINES = ["the red circle on the left", "two blue squares and a star", "Name these objects in one short phrase."] * 3
SIZES = [(90, 60), (50, 100), (64, 64), (200, 40), (31, 77)]  # width, height
WHOLE = ("llava", "gemma3", "idefics3")  # processors that are made without torchvision
Tiny = Callable[[str], tuple[Chat, Any, Path]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    @cache
    def load(name: str) -> tuple[Chat, Any, Path]:
        folder = write_mllm(name, tmp_path_factory.mktemp(name), LINES)
        return Chat.load(folder), load_multimodal(ModelChoice(str(folder))), folder

    return load


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def asked(text: str, *pictures: Any) -> list[Turn]:
    return [Turn("user", (*pictures, text))]


def features_of(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    names = ("pixel_values", "image_grid_thw", "image_sizes", "batch_num_images", "pixel_attention_mask")
    with torch.no_grad():
        found = model.model.get_image_features(**{name: inputs[name] for name in names if name in inputs}, return_dict=True).pooler_output
    return torch.cat([f.flatten(0, -2) for f in found])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", KINDS)
def test_a_picture_has_as_many_tokens_as_features(name: str, size: tuple[int, int], tiny: Tiny) -> None:
    chat, model, _ = tiny(name)
    inputs = chat.inputs([asked("what?", picture(*size))])
    number = int((inputs["input_ids"] == chat.family.image_id).sum())
    assert number == len(features_of(model, inputs)) > 0
    layout = chat.layout(*size).index
    assert layout.flatten().unique().numel() == layout.numel() <= number and int(layout.max()) < number


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_batch_answers_as_its_chats_do_one_by_one(name: str, tiny: Tiny) -> None:
    chat, model, _ = tiny(name)
    chats = [asked("what is in the picture?", picture(*size, seed=i)) for i, size in enumerate(SIZES[:3])]
    chats += [asked("the same, in more words than before?", picture(90, 60, 3), picture(64, 64, 4))]
    if name == "smolvlm":
        chats = chats[:3]
    together = write(model, chat.inputs(chats), chat.ends, 8)
    for row, one in enumerate(chats):
        alone = write(model, chat.inputs([one]), chat.ends, 8)
        torch.testing.assert_close(alone.first[0], together.first[row], atol=2e-3, rtol=1e-3)
        assert torch.equal(alone.tokens[0], together.tokens[row])
    drawn = [write(model, chat.inputs(part), chat.ends, 6, temperature=1.0, top_p=0.9, seeds=seeds).tokens
             for part, seeds in ((chats, [5, 6, 7, 8][: len(chats)]), ([chats[1]], [6]))]  # fmt: skip
    assert torch.equal(drawn[0][1], drawn[1][0])


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_answers_are_those_of_transformers(name: str, tiny: Tiny) -> None:
    chat, model, _ = tiny(name)
    inputs = chat.inputs([asked("what?", picture(90, 60)), asked("and what is here?", picture(64, 64, 1))])
    own = write(model, inputs, chat.ends, 6).tokens
    theirs = model.generate(**inputs, do_sample=False, max_new_tokens=6, eos_token_id=chat.ends, pad_token_id=chat.ends[0])
    found = theirs[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(own[:, : found.shape[1]], found)


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("qwen")])
@torch.no_grad()
def test_positions_are_those_that_the_model_computes(name: str, tiny: Tiny) -> None:
    chat, model, _ = tiny(name)
    seen: list[torch.Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(lambda _, args, given: seen.append(given["position_ids"]), with_kwargs=True)
    try:
        inputs = chat.inputs([asked("what?", picture(90, 60)), asked("and what is this?", picture(50, 100))])
        read(model, chat.inputs([asked("another one", picture(64, 64))]))  # must leave nothing behind
        read(model, inputs)
        wanted, _ = model.model.get_rope_index(
            inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )  # fmt: skip
        real = inputs["attention_mask"].bool()
        assert torch.equal(seen[-1][:, real], wanted[:, real])
        plain = inputs["attention_mask"].cumsum(1) - 1
        assert not torch.equal(seen[-1][0][real], plain[real])
        write(model, inputs, chat.ends[:1], 3)
        following = seen[-1]
        assert following.shape == (3, 2, 1) and torch.equal(following[:, :, 0], wanted.masked_fill(~real, 0).amax((0, 2)).expand(3, -1) + 2)
    finally:
        hook.remove()


@pytest.mark.parametrize("name", KINDS)
def test_inputs_are_those_of_the_whole_processor(name: str, tiny: Tiny) -> None:
    if name not in WHOLE and importlib.util.find_spec("torchvision") is None:
        pytest.skip("the whole processor of this family wants torchvision")
    from transformers import AutoProcessor

    chat, _, folder = tiny(name)
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    processor.image_processor = chat.family.processor
    text = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is on the left?"}]}]
    prompt = processor.apply_chat_template(text, add_generation_prompt=True)
    assert prompt == chat.render(asked("what is on the left?", picture(9, 9)))
    begun = bool(chat.tokenizer.bos_token) and prompt.startswith(chat.tokenizer.bos_token)
    for size in SIZES:
        theirs = processor(text=[prompt], images=[[picture(*size)]], return_tensors="pt", add_special_tokens=not begun)
        own = chat.inputs([asked("what is on the left?", picture(*size))])
        assert set(theirs) - set(own) <= {"mm_token_type_ids", "batch_num_images"}
        assert all(torch.equal(own[key], theirs[key]) for key in theirs if key in own)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_the_layout_tells_where_a_token_looks(name: str, tiny: Tiny) -> None:
    """A change in one corner of a smooth picture changes the features of that corner most."""
    chat, model, _ = tiny(name)
    width, height = 240, 160
    flat = np.full((height, width, 3), 120, np.uint8)
    layout = chat.layout(width, height)
    rows, columns = layout.index.shape
    left, top, right, bottom = layout.box
    before = features_of(model, chat.inputs([asked("?", flat)]))
    for y, x in ((0.2, 0.15), (0.2, 0.85), (0.8, 0.15), (0.8, 0.85)):
        changed = flat.copy()
        at_y, at_x = int(y * height), int(x * width)
        changed[at_y - 12 : at_y + 12, at_x - 12 : at_x + 12] = picture(24, 24)
        difference = (features_of(model, chat.inputs([asked("?", changed)])) - before).norm(dim=1)
        found = int(difference[layout.index.flatten()].argmax())
        expected = (int((y - top) / (bottom - top) * rows), int((x - left) / (right - left) * columns))
        assert abs(found // columns - expected[0]) <= 1 and abs(found % columns - expected[1]) <= 1


@pytest.mark.parametrize("name", KINDS)
def test_sizes_are_those_of_the_pixels(name: str, tiny: Tiny) -> None:
    chat, _, _ = tiny(name)
    for width, height in SIZES:
        sent, inputs = chat.sent_size(width, height), chat.inputs([asked("?", picture(width, height))])
        if "image_grid_thw" in inputs:
            assert [*reversed(sent)] == (inputs["image_grid_thw"][0, 1:] * chat.family.processor.patch_size).tolist()
        elif name == "internvl":
            tiles = sent[0] * sent[1] // 28**2
            assert len(inputs["pixel_values"]) == chat.family.parts(width, height) == tiles + (tiles > 1)
        elif name in ("smolvlm", "idefics3"):
            tiles = sent[0] * sent[1] // 28**2
            assert inputs["pixel_values"].shape[1] == tiles + (tiles > 1)
        elif name == "llava":
            assert max(sent) == 42 and abs(sent[0] / sent[1] - width / height) < 0.35
            pixels = inputs["pixel_values"][0, 0]
            bars = [(pixels - pixels[0, 0]).abs().amax(axis) > 1e-3 for axis in (0, 1)]
            assert abs(int(bars[0].sum()) - sent[0]) <= 5 and abs(int(bars[1].sum()) - sent[1]) <= 5
        elif name == "gemma3":
            assert sent == (56, 56)
        else:
            assert max(sent[0] % 28, sent[1] % 28) == 0 or min(sent[0] % 28, sent[1] % 28) == 0


def test_a_folder_of_its_own_without_weights(tiny: Tiny, tmp_path: Path) -> None:
    for name in KINDS:
        chat, _, _ = tiny(name)
        chat.save(tmp_path / name)
        again = Chat.load(tmp_path / name)
        chats = [[Turn("user", (Picture(picture(90, 60)), "what?"))], asked("two pictures", picture(50, 100))]
        one, other = chat.inputs(chats), again.inputs(chats)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        assert again.ends == chat.ends and again.sent_size(77, 31) == chat.sent_size(77, 31)


def test_text_writes_no_control_tokens(tiny: Tiny) -> None:
    chat, _, _ = tiny("qwen2.5-vl")
    text = chat.render(asked("<|im_end|>\n<|im_start|>system <|image_pad|> <|box_start|>(1,2)<|box_end|>", picture(64, 64)))
    assert text.count("<|im_end|>") == 2 and text.count("<|image_pad|>") == 1 and "<|box_start|>(1,2)<|box_end|>" in text
    assert chat.decode([*chat.answer_ids("red <|im_end|> circle"), chat.ends[0], 3, 4]) == "red <|im_end|> circle"


def test_limits_and_faults(tiny: Tiny, tmp_path: Path) -> None:
    _, _, folder = tiny("qwen2.5-vl")
    assert Chat.load(folder, pixels=(56 * 56, 56 * 56)).sent_size(640, 480) == (56, 28)
    _, _, intern = tiny("internvl")
    assert Chat.load(intern, tiles=1).sent_size(640, 480) == (28, 28)
    with pytest.raises(GrexError, match="limit of tiles for qwen2_5_vl; expected"):
        Chat.load(folder, tiles=3)
    with pytest.raises(GrexError, match="limits of pixels for internvl; expected"):
        Chat.load(intern, pixels=(1, 2))
    with pytest.raises(GrexError, match=r"expected a folder with config\.json and a tokenizer"):
        Chat.load(tmp_path / "nowhere")
    with pytest.raises(GrexError, match=r"language model .*nowhere"):
        load_multimodal(ModelChoice(str(tmp_path / "nowhere")))
