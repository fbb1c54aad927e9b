"""Image encoders from other packages, the text encoder and its tokenizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grex_mllm.config import ModelConfig, TextConfig, VisionConfig
from grex_mllm.errors import GrexError
from grex_mllm.models import build_grounding
from grex_mllm.models.pixel_decoder import build_pixel_decoder
from grex_mllm.models.text import TextEncoder, load_text_tokenizer, train_text_tokenizer
from grex_mllm.models.vision import build_vision, load_weights

SMALL_SWIN = VisionConfig(name="swin", embed_width=8, swin_depths=[1, 1, 1, 1], swin_heads=[1, 1, 2, 2], window=3)
TIMM_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
library = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from grex_mllm.config import VisionConfig
from grex_mllm.models.vision import build_vision
for name in ("resnet10t", "swin_tiny_patch4_window7_224"):
    net = build_vision(VisionConfig(name="timm:" + name), 8).eval()
    maps = net(torch.rand(1, 3, 224, 224))
    assert net.strides == (4, 8, 16, 32) and [m.shape[1] for m in maps] == list(net.channels), (name, net.strides, net.channels)
"""


def test_hub_backbone_from_a_folder(tmp_path: Path) -> None:
    from transformers import SwinConfig

    SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, image_size=64).save_pretrained(tmp_path)
    net = build_vision(VisionConfig(name=f"hf:{tmp_path}"), 8)
    maps = net(torch.rand(1, 3, 64, 64))
    assert net.strides == (4, 8, 16, 32)
    assert [tuple(m.shape[1:]) for m in maps] == [(c, 64 // s, 64 // s) for c, s in zip(net.channels, net.strides, strict=True)]


def test_timm_backbones_in_a_process_of_their_own() -> None:
    """Needs timm and torchvision in a folder apart ($GREX_TIMM), because a mismatched torchvision breaks transformers."""
    folder = os.environ.get("GREX_TIMM")
    if not folder:
        pytest.skip("set GREX_TIMM to a folder with timm and torchvision (pip install --no-deps --target)")
    done = subprocess.run([sys.executable, "-c", TIMM_PROGRAM, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["vgg", "hf:/nowhere/at/all"])
def test_unknown_backbone_is_one_clear_error(name: str) -> None:
    with pytest.raises(GrexError, match=r"expected .*;"):
        build_vision(VisionConfig(name=name), 8)


def test_backbone_weights_load_without_the_fusion_and_refuse_others(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    plain = build_vision(SMALL_SWIN, 8)
    state = {k: torch.full_like(v, 0.5) for k, v in plain.state_dict().items()}
    file = tmp_path / "swin.safetensors"
    save_file(state, str(file))
    fused = build_vision(VisionConfig(**{**vars(SMALL_SWIN), "fusion": "pwam", "weights": str(file)}), 8)
    assert set(state) < set(fused.state_dict()) and all(torch.equal(fused.state_dict()[k], v) for k, v in state.items())
    save_file({k: v for k, v in state.items() if "patch_embed" not in k}, str(file))
    with pytest.raises(GrexError, match=r"missing \['patch_embed"):
        load_weights(plain, str(file))
    with pytest.raises(GrexError, match="convert swin"):
        load_weights(plain, str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize("section", ["pixel_decoder", "decoder"])
def test_unknown_rooms_are_one_clear_error(section: str) -> None:
    config = ModelConfig()
    getattr(config, section).name = "none"
    with pytest.raises(GrexError, match=r"expected .*;"):
        if section == "decoder":
            build_grounding(config)
        else:
            build_pixel_decoder(config.pixel_decoder, (1, 2, 3, 4))
    with pytest.raises(GrexError, match="3 maps"):
        build_pixel_decoder(config.pixel_decoder, (1, 2, 3))


def test_tokens_equal_recorded(shared: Path) -> None:
    folder = shared / "oracle" / "preprocess"
    tokenizer = load_text_tokenizer(folder)
    samples = [s for split in json.loads((folder / "expected.json").read_text()).values() for s in split]
    assert len(samples) == 72
    ids, mask = tokenizer.encode([s["sentence"]["raw"] for s in samples], 20)
    assert ids.tolist() == [s["lang_tokens"][0] for s in samples]
    assert mask.tolist() == [s["lang_mask"][0] for s in samples]


def test_trained_tokenizer_survives_saving_and_cuts_long_sentences(tmp_path: Path) -> None:
    tokenizer = train_text_tokenizer(["the two red circles", "everything but the blue square"], 200)
    tokenizer.save(tmp_path)
    again = load_text_tokenizer(tmp_path)
    assert again.vocab_size == tokenizer.vocab_size
    ids, mask = again.encode(["The two RED circles", "", "the " * 5000], 6)
    assert torch.equal(ids, tokenizer.encode(["the two red circles", "", "the " * 5000], 6)[0])
    assert mask.sum(1).tolist() == [6, 2, 6]
    assert (ids[mask == 0] == 0).all()
    with pytest.raises(GrexError, match=r"tokenizer.json or vocab.txt"):
        load_text_tokenizer(tmp_path / "empty")


def test_text_dropout_is_configured_and_padding_rows_are_kept() -> None:
    config = TextConfig(vocab_size=30, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, max_positions=16, dropout=0.5)
    encoder = TextEncoder(config)
    ids, mask = torch.ones(2, 4, dtype=torch.int64), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    noisy = [encoder.train()(ids, mask).tokens for _ in range(2)]
    assert not torch.equal(*noisy)
    quiet = [encoder.eval()(ids, mask).tokens for _ in range(2)]
    assert torch.equal(*quiet) and quiet[0].shape == (2, 4, 16) and bool((quiet[0][0, 2:] != 0).any())


def test_text_encoder_starts_from_a_folder_with_the_configured_dropout(tmp_path: Path) -> None:
    config = TextConfig(vocab_size=30, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, max_positions=16)
    first = TextEncoder(config)
    first.bert.save_pretrained(tmp_path)
    second = TextEncoder(TextConfig(path=str(tmp_path), dropout=0.0))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    assert second.bert.config.hidden_dropout_prob == 0.0 and second.width == 16
    with pytest.raises(GrexError, match=r"config\.json"):
        TextEncoder(TextConfig(path=str(tmp_path / "none")))


def test_efficientnet_pads_and_normalises_as_its_weights_were_trained() -> None:
    """Strides, channels and "same" padding by hand; statistics stay; gradients reach every weight."""
    from torch.nn import functional as F

    from grex_mllm.models.efficientnet import ConvNorm

    net = build_vision(VisionConfig(name="efficientnet_lite0"), 8).train()
    image = torch.rand(2, 3, 64, 96, requires_grad=True)
    before = {name: value.clone() for name, value in net.named_buffers()}
    maps = net(image)
    assert [tuple(m.shape[1:]) for m in maps] == [(c, 64 // s, 96 // s) for c, s in zip(net.channels, net.strides, strict=True)]
    assert (net.strides, net.channels) == ((4, 8, 16, 32), (24, 40, 112, 320))
    sum(m.square().sum() for m in maps).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())
    layer = ConvNorm(2, 4, 5, 2)
    for values in (layer.mean, layer.var, layer.scale.data, layer.shift.data):
        values.uniform_(0.5, 1.5)
    x = torch.rand(1, 2, 8, 7)  # rows: 4 out, 3 more needed, 1 above and 2 below; columns: 4 out, 4 more, 2 and 2
    plain = F.conv2d(F.pad(x, (2, 2, 1, 2)), layer.weight, stride=2)
    expected = F.batch_norm(plain, layer.mean, layer.var, layer.scale, layer.shift, training=False, eps=1e-3)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    grey = (torch.full((3,), 0.75) - mean) / std
    assert torch.allclose(grey.view(3, 1, 1) * net.scale + net.shift, torch.full((3, 1, 1), 0.5), atol=1e-6)


def test_frozen_stages_of_efficientnet_give_the_same_maps_and_the_rest_the_same_gradients() -> None:
    torch.manual_seed(0)
    net = build_vision(VisionConfig(name="efficientnet_lite0"), 8).train().double()  # random weights let signals fade: rounding would show
    image = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    whole = net(image)
    sum(m.square().sum() for m in whole).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    net.zero_grad()
    for part in (net.stem, *net.stages[:3]):
        part.requires_grad_(False)
    partly = net(image)
    sum(m.square().sum() for m in partly).backward()
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(whole, partly, strict=True))
    assert [m.requires_grad for m in partly] == [False, False, True, True]
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4 * float(gradients[name].abs().max())), name
    with torch.no_grad():
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(whole, net(image), strict=True))
