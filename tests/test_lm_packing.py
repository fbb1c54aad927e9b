"""Packed sequences give what the sequences give by themselves: losses, gradients, answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generator import TEXTS
from tiny_llms import FAMILIES, write_llm

from grex_mllm.models.lm_decoding import Prefix, decode
from grex_mllm.models.lm_loss import token_losses
from grex_mllm.models.lm_packing import PACKED_FAMILIES, Shared, can_pack, pack

SOME = ("qwen3", "gemma2")  # with sdpa, and with eager attention, which wants another mask
ALL = [name if name in SOME else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]
FRAME, IMAGE, SETS, TEXT = 3, 2, 5, 4


def model_of(family: str, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(write_llm(family, folder, TEXTS * 2), dtype=torch.float32)


def sequences(width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Shared]:
    """Embeddings [E, S, D], mask and what they share: two images in turn, sets of one to five objects, texts of two to four tokens."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.tensor([0, 1, 0, 1, 1, 0, 1])
    embeds = torch.randn(len(images), FRAME + IMAGE + SETS + 1 + TEXT, width, generator=draw) * 0.1
    embeds[:, :FRAME] = embeds[:1, :FRAME]
    embeds[:, FRAME : FRAME + IMAGE] = embeds[:2, FRAME : FRAME + IMAGE][images]
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool)
    for e, (objects, tokens) in enumerate([(1, 4), (5, 2), (3, 3), (2, 4), (1, 2), (4, 3), (5, 4)]):
        mask[e, FRAME + IMAGE + objects : FRAME + IMAGE + SETS] = False
        mask[e, embeds.shape[1] - TEXT + tokens :] = False
    return embeds, mask, Shared(FRAME, IMAGE, images)


@pytest.mark.parametrize("family", ALL)
def test_losses_and_gradients_are_those_of_single_sequences(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grex_mllm.models.lm_loss.pack", lambda mask, shared: pack(mask, shared, 40))  # several packs
    lm = model_of(family, tmp_path)
    embeds, mask, shared = sequences(lm.get_input_embeddings().weight.shape[1])
    assert can_pack(lm, mask, shared)
    ids, real = torch.randint(5, 20, (len(embeds), TEXT)), mask[:, -TEXT:]
    widths: list[tuple[int, int]] = []
    lm.register_forward_pre_hook(lambda _lm, _args, given: widths.append(tuple(given["inputs_embeds"].shape[:2])), with_kwargs=True)
    found = []
    for known in (None, shared):
        lm.zero_grad()
        start = embeds.clone().requires_grad_()
        losses = token_losses(lm, start, mask, ids, real, known)
        (losses * torch.rand(losses.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        gradient = start.grad
        assert gradient is not None
        groups = [gradient[:, :FRAME].sum(0), *(gradient[shared.image_index == k, FRAME : FRAME + IMAGE].sum(0) for k in (0, 1))]
        found.append((losses, gradient[:, FRAME + IMAGE :], *groups, *(p.grad for p in lm.parameters() if p.grad is not None)))
    assert widths[0] == (7, 15) and widths[1][0] > 1 and widths[1][0] * widths[1][1] < 7 * 15
    for plain, packed in zip(*found, strict=True):
        assert bool((packed - plain).norm() < 1e-4 * plain.norm())


@pytest.mark.parametrize("family", ALL)
def test_answers_are_those_of_single_sequences(family: str, tmp_path: Path) -> None:
    lm = model_of(family, tmp_path).eval()
    embeds, mask, shared = sequences(lm.get_input_embeddings().weight.shape[1])
    stop = FRAME + IMAGE + SETS
    summary = torch.zeros(len(embeds), embeds.shape[2])
    uniforms = torch.rand(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for chances in (None, uniforms):
        prefixes = [Prefix(embeds[:, :stop] * 9, mask[:, :stop], summary, None, known) for known in (None, shared)]
        answers = [decode(lm, prefix, 7, 5, [0], 6, chances, 20.0) for prefix in prefixes]
        assert torch.equal(*answers) and (chances is None or len(set(answers[0].flatten().tolist())) > 9)
    part = Prefix(embeds[:, :stop], mask[:, :stop], summary, None, shared).part(slice(2, 5))
    assert part.shared is not None and part.shared.image_index.tolist() == [0, 1, 1] and len(part.embeds) == 3


def test_what_is_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model_of("qwen3", tmp_path)
    _, mask, shared = sequences(8)
    changes: list[Callable[[], None]] = [
        lambda: setattr(lm.config, "sliding_window", 11),  # shorter than a sequence
        lambda: setattr(lm.config, "model_type", "bloom"),  # whose positions come from the mask
        lambda: setattr(lm.config, "_attn_implementation", "flash_attention_2"),  # which takes no such mask
    ]
    assert can_pack(lm, mask, shared)
    assert not can_pack(lm, mask, None) and not can_pack(lm, mask, Shared(0, IMAGE, shared.image_index))
    for change in changes:
        kept = dict(vars(lm.config))
        change()
        assert not can_pack(lm, mask, shared)
        vars(lm.config).update(kept)
    lm.config.sliding_window = 16
    assert can_pack(lm, mask, shared) and {"llama", "qwen2"} < set(PACKED_FAMILIES)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=20), st.integers(0, 4), st.integers(12, 90))
def test_every_token_stands_once_and_sees_its_own_sequence(sets: list[tuple[int, int]], image: int, capacity: int) -> None:
    images = torch.tensor([number for number, _ in sets])
    mask = torch.zeros(len(sets), FRAME + image + 9, dtype=torch.bool)
    mask[:, : FRAME + image] = True
    draw = torch.Generator().manual_seed(0)
    for row, (_, length) in zip(mask, sets, strict=True):
        row[FRAME + image + torch.randperm(9, generator=draw)[:length]] = True
    packs = pack(mask, Shared(FRAME, image, images), capacity)
    num, length = packs.source.shape
    own = mask.clone()
    own[:, : FRAME + image] = False
    assert len(set(packs.place[own].tolist())) == int(own.sum())
    width = mask.shape[1]
    position = mask.long().cumsum(1) - 1
    for e in range(len(sets)):
        columns = mask[e].nonzero()[:, 0]
        places = packs.place[e, columns]
        assert torch.equal(packs.positions.flatten()[places], position[e, columns])
        assert len(set((places // length).tolist())) == 1
        source = packs.source.flatten()[places]
        assert torch.equal(source % width, columns) and torch.equal(images[source // width][FRAME:], images[e].expand(len(columns) - FRAME))
        seen = packs.seen[int(places[0]) // length, 0]
        for k, place in enumerate((places % length).tolist()):
            assert set(seen[place].nonzero()[:, 0].tolist()) == set((places[: k + 1] % length).tolist())
    assert num <= len(sets) and bool(packs.seen.any(-1).all())  # padding sees something: no attention over nothing
