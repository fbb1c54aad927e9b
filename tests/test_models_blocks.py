"""Building blocks against brute force: deformable attention, windows, positions, resnet norms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.config import VisionConfig
from grex_mllm.errors import GrexError
from grex_mllm.models import windows
from grex_mllm.models.pwam import normalise_positions
from grex_mllm.models.resnet import FrozenBatchNorm, ResNet, append_coordinates
from grex_mllm.models.swin import SwinTransformer, WindowAttention
from grex_mllm.models.windows import from_windows, relative_index, to_windows, window_layout
from grex_mllm.ops.attention import softmax_of_few
from grex_mllm.ops.deform_attn import deformable_attention_bags, deformable_attention_reference
from grex_mllm.types import TextFeatures

SHAPES = [(2, 3), (4, 5)]


def samples(batch: int = 2, queries: int = 7, heads: int = 2, depth: int = 4, points: int = 3) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    total = sum(h * w for h, w in SHAPES)
    value = torch.randn(batch, total, heads, depth, dtype=torch.float64)
    # far outside on both sides, too
    places = torch.rand(batch, queries, 2, heads, len(SHAPES), points, dtype=torch.float64) * 12 - 4
    places[0, 1, 0, 0] = 1e12
    places[0, 2, 1, 0] = -1e12
    weights = torch.rand(batch, queries, heads, len(SHAPES), points, dtype=torch.float64)
    return value, places, weights


def test_deformable_attention_by_hand() -> None:
    """One map of 1 x 2 with values 10 and 20: a quarter into the second cell reads 0.75 * 10 + 0.25 * 20; outside reads zero."""
    value = torch.tensor([10.0, 20.0], dtype=torch.float64).view(1, 2, 1, 1)
    points = torch.tensor([[0.25, 0.0], [-1.5, 0.0], [1.5, 0.0], [1.0, 0.5]], dtype=torch.float64).view(1, 4, 2, 1, 1, 1)
    weights = torch.ones(1, 4, 1, 1, 1, dtype=torch.float64)
    for attend in (deformable_attention_bags, deformable_attention_reference):
        assert attend(value, [(1, 2)], points, weights).flatten().tolist() == pytest.approx([12.5, 0.0, 10.0, 10.0])


def test_points_that_are_no_numbers_stay_in_memory() -> None:
    value, points, weights = samples()
    points[0, 0] = math.nan
    out = deformable_attention_bags(value, SHAPES, points, weights)
    assert out[0, 0].isnan().all() and out[1].isfinite().all()


def test_fast_deformable_attention_equals_reference_with_gradients() -> None:
    results = []
    for attend in (deformable_attention_bags, deformable_attention_reference):
        value, points, weights = (t.clone().requires_grad_() for t in samples())
        out = attend(value, SHAPES, points, weights)
        torch.manual_seed(1)
        (out * torch.randn(out.shape, dtype=out.dtype)).sum().backward()
        results.append([out, value.grad, points.grad, weights.grad])
    for mine, reference in zip(*results, strict=True):
        assert mine is not None and reference is not None
        assert torch.allclose(mine, reference, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("height", "width", "shift"), [(4, 4, 0), (5, 7, 0), (5, 7, 1), (2, 3, 1), (8, 4, 2)])
def test_window_attention_equals_definition(height: int, width: int, shift: int) -> None:
    """Pad, roll, cut into windows, attend with bias and region mask, and back, written out window by window."""
    torch.manual_seed(0)
    window, batch, channels = 4, 2, 8
    attention = WindowAttention(channels, 2, window).double()
    nn.init.normal_(attention.relative_position_bias_table)
    x = torch.randn(batch, height * width, channels, dtype=torch.float64)
    expected = by_definition(attention, x.view(batch, height, width, channels), window, shift)
    assert torch.allclose(attention(x, height, width, shift), expected.flatten(1, 2), rtol=0, atol=1e-12)


def by_definition(attention: WindowAttention, x: Tensor, window: int, shift: int) -> Tensor:
    batch, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    tall, wide = x.shape[1:3]
    region = torch.zeros(tall, wide)
    number = 0
    cuts = (slice(0, -window), slice(-window, -shift or None), slice(-shift, None)) if shift else (slice(None),)
    for rows in cuts:
        for columns in cuts:
            region[rows, columns] = number
            number += 1
    x = x.roll((-shift, -shift), (1, 2))
    out = torch.zeros_like(x)
    heads, depth = attention.num_heads, channels // attention.num_heads
    bias = attention.relative_position_bias_table[relative_index(window)].permute(2, 0, 1)
    for top in range(0, tall, window):
        for left in range(0, wide, window):
            here = (slice(None), slice(top, top + window), slice(left, left + window))
            tokens = x[here].reshape(batch, window**2, channels)
            qkv = attention.qkv(tokens).view(batch, window**2, 3, heads, depth).permute(2, 0, 3, 1, 4)
            ids = region[here[1:]].flatten()
            mask = (ids[:, None] != ids[None]).double() * -100.0
            scores = qkv[0] @ qkv[1].transpose(2, 3) / math.sqrt(depth) + bias + mask
            attended = (scores.softmax(-1) @ qkv[2]).transpose(1, 2).reshape(batch, window, window, channels)
            out[here] = attention.proj(attended)
    return out.roll((shift, shift), (1, 2))[:, :height, :width]


def test_window_gathers_have_right_gradients() -> None:
    layout = window_layout(2, 3, 5, 4, 2, torch.device("cpu"))
    x = torch.randn(2 * 3 * 5, 2, dtype=torch.float64, requires_grad=True)
    fill = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: to_windows(a, layout, b), (x, fill))
    answers = torch.randn(2 * 3 * 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: from_windows(a, layout), (answers,))
    slots = to_windows(x, layout, fill).view(-1, 16, 2)
    real = [slots[kind.first : kind.last, : kind.real].reshape(-1, 2) for kind in layout.kinds]
    assert torch.equal(from_windows(torch.cat(real), layout), x)
    assert sum((k.last - k.first) * (16 - k.real) for k in layout.kinds) == len(layout.padding)


def test_cached_layout_made_in_inference_mode_serves_training() -> None:
    net = SwinTransformer(VisionConfig(name="swin", embed_width=8, swin_depths=[2, 1, 1, 1], swin_heads=[1, 1, 1, 1], window=3), 8)
    image = torch.rand(1, 3, 32, 32)
    windows._LAYOUTS.clear()
    with torch.inference_mode():
        net(image)
    made = dict(windows._LAYOUTS)
    sum(m.square().sum() for m in net(image)).backward()  # type: ignore[union-attr]
    assert len(made) > 1 and windows._LAYOUTS.keys() == made.keys() and all(windows._LAYOUTS[k] is v for k, v in made.items())
    gradient = net.patch_embed.proj.weight.grad
    assert gradient is not None and gradient.abs().max() > 1e-6


def test_pixel_word_fusion_ignores_padding_words_and_prefix_is_shared() -> None:
    torch.manual_seed(0)
    config = VisionConfig(name="swin", embed_width=8, swin_depths=[1, 2, 1, 1], swin_heads=[1, 1, 2, 2], window=3, fusion="pwam")
    net = SwinTransformer(config, 6).eval()
    for stage in net.stages:
        if stage.gate is not None:
            nn.init.normal_(stage.gate[0].weight)
            nn.init.normal_(stage.gate[2].weight)
    image, tokens, mask = torch.rand(2, 3, 40, 52), torch.randn(3, 5, 6), torch.tensor([[1, 1, 1, 0, 0]] * 3)
    other = tokens.clone()
    other[:, 3:] = 9.0
    index = torch.tensor([1, 0, 1])
    with torch.no_grad():
        shared = net.finish(net.encode_prefix(image), index, TextFeatures(tokens, mask))
        padded = net(image[index], TextFeatures(other, mask))
        silent = net(image, None)
        whispered = net(image[index], TextFeatures(tokens.flip(1), mask))
    for a, b in zip(shared, padded, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert [tuple(m.shape) for m in silent] == [(2, 8, 10, 13), (2, 16, 5, 7), (2, 32, 3, 4), (2, 64, 2, 2)]
    assert not torch.allclose(shared[3], whispered[3], atol=1e-3)


def test_softmax_of_few_equals_softmax_with_gradients() -> None:
    x = torch.randn(3, 4, 12, dtype=torch.float64) * 300
    assert torch.allclose(softmax_of_few(x), x.softmax(-1), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(softmax_of_few, (torch.randn(2, 5, dtype=torch.float64, requires_grad=True),))


def test_positions_are_normalised_like_instance_norm() -> None:
    x = torch.randn(2, 9, 4)
    assert torch.allclose(normalise_positions(x), F.instance_norm(x.transpose(1, 2)).transpose(1, 2), atol=1e-5)


def test_frozen_batch_norm_equals_batch_norm_in_eval_and_has_no_parameters() -> None:
    torch.manual_seed(0)
    norm, reference = FrozenBatchNorm(4), nn.BatchNorm2d(4).eval()
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = torch.rand(4) + 0.1
        getattr(norm, name).copy_(value)
        getattr(reference, name).data.copy_(value)
    x = torch.randn(2, 4, 3, 3)
    assert torch.allclose(norm(x), reference(x), atol=1e-6)
    assert not list(norm.parameters())


@pytest.mark.parametrize(("stem", "strides"), [("conv3", (2, 4, 8, 16)), ("conv7", (4, 8, 16, 32))])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_small_resnet_strides(stem: str, strides: tuple[int, ...], block: str) -> None:
    config = VisionConfig(
        block=block, norm="group", stem=stem, stem_width=8, widths=[8, 16, 16, 24], bottleneck_widths=[8] * 4, depths=[1, 2, 1, 1]
    )
    config.coordinates = True
    net = ResNet(config)
    assert net.strides == strides
    maps = net(torch.rand(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(1, c, 64 // s, 96 // s) for c, s in zip(net.channels, strides, strict=True)]


def test_coordinates_are_pixel_centres() -> None:
    grid = append_coordinates(torch.zeros(1, 3, 2, 4))[0, 3:]
    assert grid[0, 0].tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert grid[1, :, 0].tolist() == [-0.5, 0.5]


@pytest.mark.parametrize(
    "change", [{"stem": "conv5"}, {"norm": "batch"}, {"block": "plain"}, {"widths": [8, 8]}, {"norm": "group", "widths": [9, 9, 9, 9]}]
)
def test_bad_resnet_settings_name_field_and_remedy(change: dict[str, object]) -> None:
    config = VisionConfig()
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(GrexError, match=r"expected .*;"):
        ResNet(config)
