"""Encoders of the systems before BERT and Swin: word vectors with a bi-directional GRU, and Darknet-53 with timm's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config
from torch import nn

from grex_mllm.config import TextConfig, VisionConfig, load_config
from grex_mllm.errors import GrexError
from grex_mllm.models import build_grounding
from grex_mllm.models.grex import GrexModel
from grex_mllm.models.text import load_text_tokenizer
from grex_mllm.models.vision import build_vision
from grex_mllm.models.words import WordEncoder, make_word_tokenizer, mirror, read_word_vectors, word_tokenizer
from grex_mllm.training.combinations import check_combinations
from grex_mllm.training.run import train_from_config

SMALL = {"vocab_size": 30, "hidden_size": 6, "word_width": 5, "dropout": 0.0}
IDS = torch.tensor([[2, 7, 4, 9, 0, 0], [2, 5, 0, 0, 0, 0], [2, 3, 8, 8, 6, 4], [2, 0, 0, 0, 0, 0]])
DARKNET = {"name": "darknet53", "darknet_width": 4, "darknet_depths": [1, 1, 2, 1, 1]}


def encoder(sentence: str = "attention") -> WordEncoder:
    torch.manual_seed(0)
    return WordEncoder(TextConfig(name="bigru", sentence=sentence, **SMALL)).double().eval()  # type: ignore[arg-type]


def reference(net: WordEncoder, ids: list[int]) -> torch.Tensor:
    """The words of one expression without padding, by torch's own bi-directional GRU, the directions added."""
    both = nn.GRU(5, 6, batch_first=True, bidirectional=True).double()
    state = {f"{k}": v for k, v in net.onward.state_dict().items()}
    state |= {f"{k}_reverse": v for k, v in net.back.state_dict().items()}
    both.load_state_dict(state)
    return both(net.vectors(torch.tensor([ids])))[0][0].unflatten(-1, (2, 6))


@pytest.mark.parametrize("sentence", ["attention", "channels", "final"])
def test_words_and_sentence_equal_a_direct_transcription(sentence: str) -> None:
    net = encoder(sentence)
    with torch.no_grad():
        tokens, mask = net(IDS, (IDS > 0).long())
        assert tokens.shape == (4, 6, 6) and torch.equal(mask, (IDS > 0).long())
        for row, ids in enumerate(IDS.tolist()[:3]):
            words = [i for i in ids[1:] if i]
            states = reference(net, words)
            added = states.sum(dim=1)
            torch.testing.assert_close(tokens[row, 1 : 1 + len(words)], added, rtol=0, atol=1e-12)
            expected = torch.zeros(6, dtype=torch.float64)
            if sentence == "final":
                expected = states[-1, 0] + states[0, 1]
            else:
                scores = [net.score(torch.tanh(net.inner(word))) for word in added]
                for c in range(6):
                    own = [score[c if sentence == "channels" else 0].exp() for score in scores]
                    for weight, word in zip(own, added, strict=True):
                        expected[c] += weight / sum(own) * word[c]
            torch.testing.assert_close(tokens[row, 0], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("sentence", ["attention", "channels", "final"])
def test_padding_is_never_read_and_every_weight_gets_a_gradient(sentence: str) -> None:
    net = encoder(sentence)
    mask = (IDS > 0).long()
    tokens = net(IDS, mask).tokens
    longer = torch.nn.functional.pad(IDS, (0, 4), value=11)
    again = net(longer, torch.nn.functional.pad(mask, (0, 4))).tokens[:, :6]
    real = mask.bool()
    torch.testing.assert_close(again[real], tokens[real], rtol=0, atol=1e-12)
    shortest = net(IDS[3:, :1], mask[3:, :1]).tokens  # no word at all
    torch.testing.assert_close(shortest, tokens[3:, :1], rtol=0, atol=1e-12)
    tokens[real].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-12 for p in net.parameters())


def test_a_mirrored_order_is_its_own_inverse() -> None:
    order = mirror(torch.tensor([3, 1, 5]), 5)
    assert order.tolist() == [[2, 1, 0, 3, 4], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0]]
    assert torch.equal(order.gather(1, order), torch.arange(5).expand(3, 5))


def test_bfloat16_follows() -> None:
    net = encoder().float()
    exact = net(IDS, (IDS > 0).long()).tokens
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(IDS, (IDS > 0).long()).tokens
    assert (rough.float() - exact).abs().mean() < 0.02


def test_a_vocabulary_of_the_most_frequent_words_survives_saving(tmp_path: Path) -> None:
    config = TextConfig(name="bigru", vocab_size=6, tokenizer="train")
    tokenizer = make_word_tokenizer(config, lambda: ["The red dog, the cat", "the red bus", "Red!"])
    assert tokenizer.vocabulary == ["[PAD]", "[UNK]", "[CLS]", "the", "red", "dog"]
    ids, mask = tokenizer.encode(["the RED horse", "dog"], 5)
    assert ids.tolist() == [[2, 3, 4, 1, 0], [2, 5, 0, 0, 0]] and mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    tokenizer.save(tmp_path)
    assert torch.equal(load_text_tokenizer(tmp_path).encode(["the RED horse", "dog"], 5)[0], ids)
    with pytest.raises(GrexError, match=r"vocab_size 3"):
        make_word_tokenizer(TextConfig(vocab_size=3), lambda: ["a"])


def vectors(folder: Path) -> Path:
    file = folder / "vectors.txt"
    file.write_text("the 1 2 3 4 5\nDog 5 4 3 2 1\n. . . 0 0 0 0 1\ndog 0.5 0 -1e-1 2 0\n", encoding="utf-8")
    return file


def test_vectors_of_a_file_start_the_words_that_it_has(tmp_path: Path) -> None:
    file = vectors(tmp_path)
    net = encoder().float()
    before = net.vectors.weight.detach().clone()
    assert net.start_from(str(file), ["[PAD]", "[UNK]", "[CLS]", "dog", "horse", "the"]) == 2
    assert net.vectors.weight[3].tolist() == pytest.approx([0.5, 0, -0.1, 2, 0]) and net.vectors.weight[5].tolist() == [1, 2, 3, 4, 5]
    assert torch.equal(net.vectors.weight[4], before[4]) and torch.equal(net.vectors.weight[6:], before[6:])
    tokenizer = make_word_tokenizer(TextConfig(name="bigru", path=str(file), vocab_size=5), lambda: [])
    assert tokenizer.vocabulary == ["[PAD]", "[UNK]", "[CLS]", "the", "dog"]
    assert list(read_word_vectors(file, [". . ."], 5)) == [". . ."]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("the 1 2 3 4 5\ndog 1\n", "line 2 of 2 parts"), ("the 1 2\n", "vectors of 2 numbers"), ("the 1 2 3 4 x\n", "the vector of"),
        ("the 1 2 3 4 nan\n", "not finite"), ("cat 1 2 3 4 5\n", "none of the 1 words"),
        ("the " + "1" * 70_000 + "\n", "over 65,536 bytes"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_vectors_is_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "vectors.txt"
    file.write_text(text)
    with pytest.raises(GrexError, match=message):
        read_word_vectors(file, ["the"], 5)
    with pytest.raises(GrexError, match="a text file of word vectors"):
        read_word_vectors(tmp_path / "none.txt", ["the"], 5)


def test_a_model_with_words_is_trained_saved_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "vectors.txt"
    file.write_text("red 1 1 1 1\nblue 2 2 2 2\n")
    changes = {"model__text__name": "bigru", "model__text__word_width": 4, "model__text__vocab_size": 60, "model__text__path": str(file)}
    config = tiny_config(**changes, data__train="synthetic", train__steps=2, train__batch_images=2, train__out=str(tmp_path / "m"))
    config.train.optim.lr = 0.0
    train_from_config(config)
    model = GrexModel.from_pretrained(tmp_path / "m")
    row = model.text_tokenizer.vocabulary.index("red")
    assert model.grounding.text.vectors.weight[row].tolist() == [1, 1, 1, 1]
    assert model.config.model.text.vocab_size == model.text_tokenizer.vocab_size <= 60 and model.config.model.text.path is None
    first = model.ground(torch.zeros(3, 40, 40, dtype=torch.uint8), "the red circle")
    assert first.mask.shape == (40, 40)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(GrexError, match="bert or bigru"):
        build_grounding(load_config(None, ["--model.text.name=lstm"]).model)
    with pytest.raises(GrexError, match="attention, channels, final"):
        WordEncoder(TextConfig(sentence="mean"))
    with pytest.raises(GrexError, match="no blocks"):
        WordEncoder(TextConfig(gradient_checkpointing=True))
    with pytest.raises(GrexError, match=r"train\.optim\.text is released"):
        check_combinations(load_config(None, ["--model.text.name=bigru", "--train.optim.text=released"]))


def timm_names(net: nn.Module) -> dict[str, Any]:
    state = {key: torch.full_like(value, 0.25) for key, value in net.state_dict().items()}
    counters = {key.replace("running_var", "num_batches_tracked"): torch.tensor(7) for key in state if key.endswith("running_var")}
    return {**state, **counters, "head.fc.weight": torch.zeros(10, 4), "head.fc.bias": torch.zeros(10)}


def test_darknet_has_the_published_size_and_timm_names(tmp_path: Path) -> None:
    """40.58 M weights without the classifier: timm lists 41.61 M with the 1,025,000 of its 1,000 classes."""
    from safetensors.torch import save_file

    with torch.device("meta"):
        whole = build_vision(VisionConfig(name="darknet53"), 8)
    assert whole.channels == (128, 256, 512, 1024) and whole.strides == (4, 8, 16, 32)
    norms = sum(b.numel() for n, b in whole.named_buffers() if n.endswith((".weight", ".bias")))
    assert sum(p.numel() for p in whole.parameters()) + norms == 40_584_928
    assert sum(1 for n, p in whole.named_parameters() if p.ndim == 4) == 52  # the 53rd is the classifier's
    names = set(whole.state_dict())
    assert {"stem.conv1.conv.weight", "stages.0.conv_down.bn.running_mean", "stages.4.blocks.3.conv2.bn.bias"} <= names
    net = build_vision(VisionConfig(**DARKNET), 8)  # type: ignore[arg-type]
    save_file(timm_names(net), str(tmp_path / "w.safetensors"))
    read = build_vision(VisionConfig(**DARKNET, weights=str(tmp_path / "w.safetensors")), 8)  # type: ignore[arg-type]
    assert all(bool((value == 0.25).all()) for value in read.state_dict().values())


def test_darknet_gives_four_maps_and_every_weight_a_gradient() -> None:
    net = build_vision(VisionConfig(**DARKNET | {"darknet_width": 8}, norm="group"), 8).train()  # type: ignore[arg-type]
    maps = net(torch.rand(2, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [(c, 64 // s, 96 // s) for c, s in zip(net.channels, net.strides, strict=True)]
    maps[-1].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
    once = build_vision(VisionConfig(**DARKNET | {"darknet_width": 8}, norm="group", gradient_checkpointing=True), 8).train()  # type: ignore[arg-type]
    once.load_state_dict(net.state_dict())
    image = torch.rand(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(once(image), net(image), strict=True))
    with pytest.raises(GrexError, match="5 numbers"):
        build_vision(VisionConfig(name="darknet53", darknet_depths=[1, 1]), 8)
    with pytest.raises(GrexError, match="an even number"):
        build_vision(VisionConfig(name="darknet53", darknet_width=3), 8)


def test_words_that_no_tokenizer_knows_share_one_entry() -> None:
    assert word_tokenizer(["the"]).encode(["the zebra zebra", "x"], 4)[0].tolist() == [[2, 3, 1, 1], [2, 1, 0, 0]]
