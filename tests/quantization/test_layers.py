"""Every kind of layer in INT8: its weight, its bias, its draws."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayeformers import fixed_draw, to_bayesian
from bayeformers.quantization import quantize
from bayeformers.quantization.codes import Codes
from bayeformers.quantization.layers import KINDS, QuantizedLayer
from tests.quantization.networks import LAYERS, Named, conv1d, images, masked_lm, sentences

pytestmark = pytest.mark.filterwarnings("error")
CASES = {**LAYERS, "Conv1D": (conv1d, lambda: images(3, 2, 7))}


def test_every_kind_is_tried() -> None:
    assert {type(make(True)) for make, _ in CASES.values()} | {nn.Embedding} == set(KINDS)


@pytest.mark.protects("int8_bias")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_mean_is_the_layer_with_rounded_weights(name: str, bias: bool) -> None:
    make, inputs = CASES[name]
    layer, x = make(bias).eval(), inputs()
    kept = copy.deepcopy(layer.state_dict())
    quantized = quantize(Named(layer), x, arithmetic="float", max_error=1.0).model.layer
    assert isinstance(quantized, QuantizedLayer) and isinstance(quantized, type(layer))
    rounded = copy.deepcopy(layer)
    with torch.no_grad():
        rounded.weight.copy_(Codes.of(layer.weight, quantized.axis).dequantize())
    torch.testing.assert_close(quantized(x), rounded(x))
    assert all(torch.equal(value, kept[key]) for key, value in layer.state_dict().items())
    assert (quantized.bias is None) == (layer.bias is None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_draws_are_those_of_the_float_layer(name: str, bias: bool) -> None:
    """W = mean + D, each within half a step of its channel, and the bias exactly."""
    make, inputs = CASES[name]
    model, x = to_bayesian(Named(make(bias)), delta=0.2).eval(), inputs()
    posterior = quantize(model, x, arithmetic="float", max_error=1.0)
    layer = posterior.model.layer
    mean, rho = model.layer.weight.detach(), model.layer.weight_rho
    for index in range(2):
        with fixed_draw(model, index, seed=3), posterior.draw(index, seed=3), torch.no_grad():
            drawn = model.layer.variational("weight").sample()
            others = [other for other in range(mean.dim()) if other != layer.axis]
            step = (mean.abs().amax(others, keepdim=True) + (drawn - mean).abs().amax(others, keepdim=True)) / 127
            # the scale's own rounding: 1.9 % of D at most
            assert ((layer.weight - drawn).abs() <= step / 2 + 0.02 * (drawn - mean).abs() + 1e-6).all()
            if model.layer.bias is not None:
                assert torch.equal(layer.bias, model.layer.variational("bias").sample())
            scale = (model(x) - x.new_zeros(())).square().mean().sqrt()
            assert (posterior.model(x) - model(x)).abs().max() < 0.05 * scale + 1e-6
    assert rho.requires_grad
    assert torch.equal(layer.weight, Codes.of(mean, layer.axis).dequantize())


@pytest.mark.parametrize("arithmetic", ["float", "int8"])
def test_draw_in_int8_arithmetic(arithmetic: Any) -> None:
    model, x = to_bayesian(Named(nn.Linear(40, 6)), delta=0.3).eval(), images(50, 40)
    posterior = quantize(model, x, arithmetic=arithmetic)
    with fixed_draw(model, 1), posterior.draw(1), torch.no_grad():
        expected, found = model(x), posterior.model(x)
    # two roundings, of a row of x and of a row of W, each of relative size max / (127 sqrt(12) rms) with max < 4 rms
    assert (found - expected).norm() / expected.norm() < 2 * 4 / (127 * 12**0.5)
    assert posterior.weights[0].arithmetic == arithmetic


def test_embedding_reads_rows() -> None:
    model = to_bayesian(Named(nn.Embedding(20, 6, padding_idx=0)), delta=0.3).eval()
    ids = torch.tensor([[0, 3, 3], [19, 0, 1]])
    posterior = quantize(model, ids)
    table = posterior.model.layer
    with posterior.draw(2), fixed_draw(model, 2), torch.no_grad():
        rows = table(ids)
        assert table.drawn is not None and table.drawn.nbytes == 0  # no whole table was made
        assert torch.equal(rows, table.weight[ids])  # now one was, of the same numbers
        assert torch.equal(rows, table(ids))
        assert (rows - model(ids)).abs().max() < 0.05
        assert torch.equal(rows[0, 0], torch.nn.functional.embedding(torch.tensor(0), table.mean.dequantize()))
        assert torch.equal(rows[0, 1], rows[0, 2])
    with pytest.raises(IndexError):
        table(torch.tensor([20]))


@pytest.mark.parametrize("x", [torch.empty(0, 8), torch.empty(2, 0, 8)])
def test_empty_batch(x: Tensor) -> None:
    posterior = quantize(Named(nn.Linear(8, 3)), images(4, 8), arithmetic="int8")
    assert posterior.model(x).shape == (*x.shape[:-1], 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("arithmetic", ["float", "int8"])
def test_dtype_of_the_original(dtype: torch.dtype, arithmetic: Any) -> None:
    model, x = to_bayesian(Named(nn.Linear(8, 3).to(dtype)), delta=0.1).eval(), images(4, 8).to(dtype)
    posterior = quantize(model, x, arithmetic=arithmetic)
    assert posterior.model.layer.weight.dtype == dtype and posterior.model.layer.weight_step.dtype == torch.float32
    with posterior.draw(0), fixed_draw(model, 0):
        found, expected = posterior.model(x), model(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_pickle_and_deepcopy() -> None:
    class_swapped = quantize(Named(nn.Linear(8, 3)), images(4, 8)).model
    for copied in (copy.deepcopy(class_swapped), pickle.loads(pickle.dumps(class_swapped))):
        assert torch.equal(copied(images(2, 8)), class_swapped(images(2, 8)))


def test_constant_zero_channels() -> None:
    layer = nn.Linear(8, 4)
    with torch.no_grad():
        layer.weight[1] = 0
        layer.weight[:, 2] = 0
    posterior = quantize(Named(layer), images(5, 8), arithmetic="int8")
    assert torch.equal(posterior.model.layer.weight[1], torch.zeros(8))
    assert torch.equal(posterior.model(images(5, 8))[:, 1], layer.bias[1].detach().expand(5))


def test_scales_at_the_floor_change_nothing() -> None:
    """Every sigma at its least, 1e-8: draws are the mean."""
    model = to_bayesian(Named(nn.Linear(8, 4)), delta=0.1).eval()
    with torch.no_grad():
        model.layer.weight_rho.fill_(-100.0)
        model.layer.bias_rho.fill_(-100.0)
    posterior = quantize(model, images(5, 8))
    mean = posterior.model(images(5, 8))
    with posterior.draw(0):
        torch.testing.assert_close(posterior.model(images(5, 8)), mean, rtol=0, atol=1e-5)


def test_cast_after_quantization() -> None:
    """The layer's dtype follows, its steps stay float32, for tied layers too."""
    small = quantize(to_bayesian(masked_lm(), delta=0.2), sentences())
    table, decoder = small.model.get_input_embeddings(), small.model.get_output_embeddings()
    step = table.weight_step.detach().clone()
    mean = small.model(**sentences()).logits
    small.model.bfloat16()
    assert torch.equal(table.weight_step, step) and decoder.weight_step is table.weight_step
    assert table.weight.dtype == decoder.weight.dtype == torch.bfloat16
    with small.draw(0):
        assert small.model(**sentences()).logits.dtype == torch.bfloat16
    small.model.float()
    torch.testing.assert_close(small.model(**sentences()).logits, mean, rtol=0.05, atol=0.02)
