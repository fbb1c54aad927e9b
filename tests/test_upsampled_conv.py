"""The convolution of an upsampled map equals the two steps, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from grex_mllm.ops.upsampled_conv import upsampled_conv


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (4, 3)])
@pytest.mark.parametrize("biased", [True, False])
def test_upsampled_convolution(kernel: int, size: tuple[int, int], biased: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, kernel, kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True) if biased else None
    ours = upsampled_conv(x, weight, bias)
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=kernel // 2)
    torch.testing.assert_close(ours, expected)
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    weights = torch.randn_like(ours)
    for found, wanted in zip(*(torch.autograd.grad((y * weights).sum(), leaves) for y in (ours, expected)), strict=True):
        torch.testing.assert_close(found, wanted)
