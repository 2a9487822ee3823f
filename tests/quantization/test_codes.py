"""INT8 codes against their error bounds and an exact integer product."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bayeformers.quantization import codes as backend
from bayeformers.quantization.codes import LIMIT, Codes, ScaleCodes, int8_product, quantize_rows
from bayeformers.quantization.layers import product

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (4, 2, 3), (2, 3, 2, 2)])
def test_error_is_at_most_half_a_step(shape: tuple[int, ...], axis: int) -> None:
    tensor = torch.randn(shape, dtype=torch.float64).exp() * torch.randn(shape, dtype=torch.float64).sign()
    coded = Codes.of(tensor, axis)
    others = [other for other in range(tensor.dim()) if other != axis]
    step = tensor.abs().amax(others, keepdim=True) / 127
    torch.testing.assert_close(coded.step.double(), step, rtol=1e-6, atol=0)
    error = (coded.codes.double() * coded.step.double() - tensor).abs()
    assert (error <= step / 2 * (1 + 1e-5)).all()
    assert coded.codes.dtype == torch.int8 and coded.codes.shape == tensor.shape


def test_zero_and_tiny_channels() -> None:
    tensor = torch.tensor([[0.0, 0.0], [1e-30, -1e-30], [1e30, 1.0]])
    found = Codes.of(tensor).dequantize()
    assert torch.equal(found[0], torch.zeros(2))
    torch.testing.assert_close(found[1], tensor[1], rtol=1e-5, atol=0)
    assert found.isfinite().all()


def test_sign_turns_the_codes() -> None:
    tensor = torch.randn(5, 9)
    assert torch.equal(Codes.of(-tensor).codes, -Codes.of(tensor).codes)


def test_rows_are_those_of_the_whole() -> None:
    table, ids = Codes.of(torch.randn(11, 6)), torch.tensor([[3, 0], [10, 3]])
    assert torch.equal(table.rows(ids), table.dequantize()[ids])
    scales = ScaleCodes.of(torch.rand(11, 6))
    assert torch.equal(scales.rows(ids), scales.dequantize()[ids])


def test_scales_have_a_bounded_relative_error() -> None:
    """Over four orders of magnitude the step of the logarithm is ln(1e4) / 254."""
    scale = 10 ** torch.empty(6, 500, dtype=torch.float64).uniform_(-4, 0)
    found = ScaleCodes.of(scale).dequantize().double()
    ratio = found / scale
    assert ratio.log().abs().max() <= math.log(1e4) / 508 * 1.001
    # independent errors, uniform within a step: the channel's variance is off by its relative size / sqrt(500)
    variance = found.square().sum(1) / scale.square().sum(1)
    assert (variance - 1).abs().max() < 0.005


def test_scales_that_are_zero_equal_or_too_small() -> None:
    scale = torch.tensor([[0.0, 0.0, 0.0], [0.2, 0.2, 0.2], [1.0, 1e-9, 0.0]])
    found = ScaleCodes.of(scale).dequantize()
    torch.testing.assert_close(found, torch.tensor([[0, 0, 0], [0.2, 0.2, 0.2], [1, 1e-4, 0]]), rtol=1e-5, atol=0)
    wide = ScaleCodes.of(scale, log_range=math.inf).dequantize()
    torch.testing.assert_close(wide[2], scale[2], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 1, 1), (5, 7, 3), (17, 64, 33), (3, 300, 2)])
def test_product_is_exact_in_integers(rows: int, inner: int, outer: int) -> None:
    """Codes of both, the sum of their products in NumPy's int64, and one rounding at the end."""
    x, weight = torch.randn(rows, inner), Codes.of(torch.randn(outer, inner))
    found = int8_product(x, weight.codes, weight.step.flatten())
    step = np.abs(x.numpy()).max(1, keepdims=True).astype(np.float32) / np.float32(LIMIT)
    codes, own_step = quantize_rows(x)
    np.testing.assert_allclose(own_step.numpy(), step, rtol=1e-6)
    assert np.abs(codes.numpy() - np.rint(x.numpy() / step)).max() <= 1  # a tie may fall on either side
    total = codes.numpy().astype(np.int64) @ weight.codes.numpy().astype(np.int64).T
    expected = total * own_step.numpy().astype(np.float64) * weight.step.numpy().astype(np.float64).T
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-12)


def test_largest_sum_does_not_overflow() -> None:
    """All codes at their limit: 1000 * 127 * 127 needs INT32, and INT16 somewhere inside would saturate."""
    x, weight = torch.ones(2, 1000), Codes.of(torch.ones(3, 1000))
    torch.testing.assert_close(int8_product(x, weight.codes, weight.step.flatten()), torch.full((2, 3), 1000.0))


def test_product_without_an_exact_kernel_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 holds sums of 300 products of codes exactly: 300 * 127^2 < 2^24."""
    x, weight = torch.randn(5, 300), Codes.of(torch.randn(4, 300))
    found = int8_product(x, weight.codes, weight.step.flatten())
    monkeypatch.setattr(backend, "has_exact_product", lambda: False)
    assert torch.equal(int8_product(x, weight.codes, weight.step.flatten()), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("axis", [0, 1])
def test_affine_keeps_shape_and_dtype(axis: int, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(2, 3, 8, dtype=dtype), torch.randn(5, 8), torch.randn(5, dtype=dtype)
    found = product(x, Codes.of(weight if axis == 0 else weight.T, axis), bias, axis)
    assert found.dtype == dtype and found.shape == (2, 3, 5)
    expected = x.double() @ weight.double().T + bias.double()
    # each of 8 products is off by half a step of either factor: at most 4 max|x| max|w| / 127 each
    bound = 8 * x.abs().max().double() * weight.abs().max() / LIMIT + expected.abs().max() * 2**-7
    assert (found.double() - expected).abs().max() < bound
