"""What is written out by hand or cut into chunks to be fast on a CPU equals the plain form, with gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grex_mllm.models import deformable, grounding
from grex_mllm.ops import deform_attn
from grex_mllm.ops import feedforward as feedforward_module
from grex_mllm.ops.deform_attn import deformable_attention_bags, deformable_attention_reference
from grex_mllm.ops.feedforward import feedforward
from tests.test_models_rela import RESNET, SWIN, build, inputs

SHAPES = [(3, 5), (6, 4)]


def attention_inputs(dtype: torch.dtype) -> list[Tensor]:
    """Three images with 6 queries, 2 heads, 2 points a map; every fifth point far outside."""
    torch.manual_seed(0)
    value = torch.randn(3, sum(h * w for h, w in SHAPES), 2, 4)
    points = torch.rand(3, 6, 2, 2, len(SHAPES), 2) * 8 - 2
    points.view(-1)[::5] *= 50
    weights = torch.rand(3, 6, 2, len(SHAPES), 2)
    return [t.to(dtype).requires_grad_() for t in (value, points, weights)]


def with_gradients(attend: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    fresh = [t.detach().clone().requires_grad_() for t in given]
    out = attend(fresh[0], SHAPES, *fresh[1:])
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape, dtype=out.dtype))
    return [out.detach(), *(t.grad for t in fresh if t.grad is not None)]


@pytest.mark.parametrize("most_points", [1, 40, 2**19], ids=["image by image", "two images", "all at once"])
def test_deformable_attention_in_chunks_equals_grid_sample(most_points: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deform_attn, "MOST_POINTS", most_points)
    given = attention_inputs(torch.float32)
    mine, reference = (with_gradients(attend, given) for attend in (deformable_attention_bags, deformable_attention_reference))
    assert len(mine) == len(reference) == 4
    for a, b in zip(mine, reference, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_chunks_cover_every_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.zeros(5, 6, 2, 2, 2, 2)  # 48 points an image
    for most, sizes in ((1, [1] * 5), (95, [1] * 5), (96, [2, 2, 1]), (1000, [5])):
        monkeypatch.setattr(deform_attn, "MOST_POINTS", most)
        assert [len(range(5)[some]) for some in deform_attn._chunks(points)] == sizes


def test_deformable_attention_in_half_precision_has_gradients_of_the_inputs_types() -> None:
    value, points, weights = attention_inputs(torch.float32)
    half = value.detach().to(torch.bfloat16).requires_grad_()
    out = deformable_attention_bags(half, SHAPES, points, weights)
    out.float().square().sum().backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16 and points.grad is not None and points.grad.dtype == torch.float32
    exact, *_ = (t.detach().requires_grad_() for t in (value, points, weights))
    deformable_attention_reference(exact, SHAPES, points.detach(), weights.detach()).square().sum().backward()
    assert exact.grad is not None and torch.allclose(half.grad.float(), exact.grad, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["value", "points", "weights"])
def test_deformable_attention_gives_the_gradients_that_are_asked_for(wanted: int) -> None:
    given = attention_inputs(torch.float64)
    everything = with_gradients(deformable_attention_bags, given)[1 + wanted]
    alone = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(given)]
    out = deformable_attention_bags(alone[0], SHAPES, *alone[1:])
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape, dtype=out.dtype))
    grad = alone[wanted].grad
    assert grad is not None and torch.equal(grad, everything)
    assert all(t.grad is None for i, t in enumerate(alone) if i != wanted)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_feedforward_in_chunks_equals_two_layers(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(5, 12), nn.Linear(12, 3)
    x, weight = torch.randn(2, 7, 5), torch.randn(2, 7, 3)
    results = []
    for way in ("plain", "chunked"):
        monkeypatch.setattr(feedforward_module, "LARGE", 0 if way == "chunked" else 10**9)
        monkeypatch.setattr(feedforward_module, "MOST_HIDDEN", 12 * 4)  # four rows at a time: the last chunk has two
        mine = x.clone().requires_grad_()
        nn.ModuleList([first, second]).zero_grad()
        out = feedforward(mine, first, second, activation)
        assert ("_Feedforward" in type(out.grad_fn).__name__) == (way == "chunked")
        (out * weight).sum().backward()
        parameters = [*first.parameters(), *second.parameters()]
        results.append([out.detach(), mine.grad, *(p.grad.clone() for p in parameters if p.grad is not None)])
    act = F.relu if activation == "relu" else F.gelu
    assert torch.allclose(results[0][0], second(act(first(x))), atol=1e-6)
    assert len(results[0]) == len(results[1]) == 6
    for plain, chunked in zip(*results, strict=True):
        assert torch.allclose(plain, chunked, rtol=1e-5, atol=1e-5)


def test_feedforward_refuses_an_unknown_activation() -> None:
    with pytest.raises(ValueError, match="one of"):
        feedforward(torch.zeros(1, 2), nn.Linear(2, 2), nn.Linear(2, 2), "tanh")


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("images", [1, 2])
def test_fused_expressions_in_chunks_answer_as_together(at_once: int, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(SWIN, boxes=True, count=True)
    image, index, ids, mask = inputs()
    if images == 1:
        image, index = image[:1], torch.zeros_like(index)
    outputs = []
    with torch.no_grad():
        for most in (64, at_once):
            monkeypatch.setattr(grounding, "FUSED_AT_ONCE", most)
            outputs.append(model(image, index, ids, mask))
    together, chunked = outputs
    for name in ("mask_logits", "minimap_logits", "no_target_logits", "boxes_norm", "box_logits", "count_logits", "minimap_prob"):
        assert torch.allclose(getattr(chunked, name), getattr(together, name), atol=1e-4), name
    assert chunked.extra.layers == together.extra.layers == []
    assert torch.allclose(chunked.extra.mask_embeddings, together.extra.mask_embeddings, atol=1e-4)


def test_many_expressions_of_a_fused_encoder_go_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(SWIN)
    image, _, ids, mask = inputs()
    seen: list[int] = []
    finish = model.vision.finish
    monkeypatch.setattr(model.vision, "finish", lambda prefix, index, text: seen.append(len(index)) or finish(prefix, index, text))
    given = (model.encode_image(image[:1]), torch.zeros(5, dtype=torch.int64), ids.repeat(2, 1)[:5], mask.repeat(2, 1)[:5])
    with torch.no_grad():
        assert len(model.ground(*given).mask_logits) == 5
    assert seen == [2, 2, 1] and grounding.FUSED_AT_ONCE == 2
    seen.clear()
    model.ground(*given)
    assert seen == [5]


@pytest.mark.parametrize("vision", [RESNET, SWIN], ids=["resnet", "swin"])
def test_no_convolution_of_the_pixel_decoder_trains_with_channels_last(vision: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass in that layout takes twice as long on CPU (and, with few channels, is not safe with torch 2.13)."""
    model = build(vision)  # type: ignore[arg-type]
    layouts: list[bool] = []
    for module in model.pixel_decoder.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda _, given: layouts.append(given[0].is_contiguous()))
    assert isinstance(model.pixel_decoder, deformable.DeformablePixelDecoder)
    model(*inputs())
    assert len(layouts) == 6 and all(layouts)
