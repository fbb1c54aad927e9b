"""The 3x3 convolution with fewer products equals the plain one, where it pays and where it does not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from grex_mllm.models.deformable import SmoothingConv
from grex_mllm.ops import winograd
from grex_mllm.ops.winograd import KERNEL, REACH, TILE, conv3x3, transforms


def test_transforms_of_one_dimension_give_its_outputs() -> None:
    torch.manual_seed(0)
    before, after, kernel = (torch.from_numpy(matrix) for matrix in transforms())
    row, weights = torch.randn(REACH, dtype=torch.float64), torch.randn(KERNEL, dtype=torch.float64)
    plain = torch.stack([row[i : i + KERNEL] @ weights for i in range(TILE)])
    torch.testing.assert_close(after @ ((kernel @ weights) * (before @ row)), plain)


def test_what_is_kept_does_not_depend_on_where_it_was_made() -> None:
    """The first call may come while a model is built without memory."""
    transforms.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        transforms()
    torch.manual_seed(0)
    x, weight = torch.randn(1, 128, 50, 50), torch.randn(128, 128, 3, 3) / 1152**0.5
    with torch.no_grad():
        torch.testing.assert_close(conv3x3(x, weight), F.conv2d(x, weight, padding=1), rtol=0, atol=3e-5)


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 7), (12, 3), (30, 41)])
@pytest.mark.parametrize("most_numbers", [1, 2**22], ids=["row by row", "all at once"])
def test_equals_the_plain_convolution(size: tuple[int, int], most_numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LEAST_CHANNELS", 1), ("LEAST_CELLS", 1), ("MOST_NUMBERS", most_numbers)):
        monkeypatch.setattr(winograd, name, value)
    torch.manual_seed(0)
    x, weight = torch.randn(2, 6, *size), torch.randn(5, 6, 3, 3) / 54**0.5
    with torch.no_grad():
        assert winograd._pays(x, weight)
        torch.testing.assert_close(conv3x3(x, weight), F.conv2d(x, weight, padding=1), rtol=0, atol=2e-5)
        assert conv3x3(x[:0], weight).shape == (0, 5, *size)
        turned = x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(conv3x3(turned, weight), conv3x3(x, weight), rtol=0, atol=1e-6)


def test_plainly_with_gradients_and_in_other_types(monkeypatch: pytest.MonkeyPatch) -> None:
    large = torch.zeros(1, winograd.LEAST_CHANNELS, winograd.LEAST_CELLS, 1)
    weight = torch.zeros(winograd.LEAST_CHANNELS, winograd.LEAST_CHANNELS, 3, 3)
    assert not winograd._pays(large, weight)  # gradients are wanted
    with torch.no_grad():
        assert winograd._pays(large, weight)
        assert not winograd._pays(large.double(), weight.double())
        assert not winograd._pays(large[:, :, 1:], weight)
        assert not winograd._pays(large[:, 1:], weight[:, 1:])
        with torch.autocast("cpu", torch.bfloat16):
            assert not winograd._pays(large, weight)


def test_the_pixel_decoders_convolution_at_its_size() -> None:
    """256 channels at 52 x 52: the two ways, with and without gradients."""
    torch.manual_seed(0)
    conv = SmoothingConv(256)
    x = torch.randn(1, 256, 52, 52)
    plain = conv(x)
    assert plain.requires_grad
    with torch.inference_mode():
        quick = conv(x)
    assert not torch.equal(quick, plain.detach())  # computed in another way
    torch.testing.assert_close(quick, plain.detach(), rtol=0, atol=3e-5)
    (gradient,) = torch.autograd.grad(plain.sum(), conv.weight)
    assert bool(gradient.ne(0).all())


def test_a_recorded_model_has_the_plain_convolution() -> None:
    conv, x = SmoothingConv(128).eval(), torch.zeros(1, 128, 50, 50)
    with torch.no_grad():
        assert winograd._pays(x, conv.weight)
        exported = torch.export.export(conv, (x,)).graph
        traced = torch.jit.trace(conv, x).inlined_graph
    for operations in (" ".join(str(node.target) for node in exported.nodes), str(traced)):
        assert "conv" in operations and "bmm" not in operations
