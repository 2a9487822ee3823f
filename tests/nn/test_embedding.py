"""`Embedding`: one value per row and draw, whatever else is looked up; the padding row stays silent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bayeformers import fixed_draw, kl_divergence, to_bayesian
from bayeformers import nn as bnn
from bayeformers.nn import training_draw, variational_tensors
from bayeformers.nn.noise import Draw
from tests.reference import key_of, row_noise, sigma, sigma_slope

CPU = torch.device("cpu")


def table(padding_idx: int | None = 2, rows: int = 11, width: int = 5) -> bnn.Embedding:
    torch.manual_seed(0)
    layer = to_bayesian(nn.Embedding(rows, width, padding_idx), delta=0.4, freeze=False)
    with torch.no_grad():
        layer.weight_rho.add_(torch.randn(rows, width), alpha=0.3)
    return layer  # type: ignore[return-value]


@pytest.mark.parametrize("padding_idx", [None, 0, 2, 10])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("whole_first", [True, False])
def test_a_row_is_the_same_everywhere(padding_idx: int | None, gradient: bool, whole_first: bool) -> None:
    """Bit for bit: at every position, in every batch, alone or in the whole table, before and after it was made."""
    layer = table(padding_idx).eval()
    with fixed_draw(layer, 3), torch.set_grad_enabled(gradient):
        if whole_first:
            layer.variational("weight").sample()
        batches = [torch.tensor(b) for b in ([1, 7, 7, 2, 0], [7], [[3, 7], [10, 1]], [[[7]]])]
        outputs = [layer(ids) for ids in batches]
        whole = layer.variational("weight").sample()
        for ids, output in zip(batches, outputs, strict=True):
            assert output.shape == (*ids.shape, 5)
            assert torch.equal(output, whole[ids])
            assert torch.equal(layer(ids), output)
    noise = row_noise(key_of(0, 3, "weight"), range(11), 5)
    if padding_idx is not None:
        noise[padding_idx] = 0
        assert torch.equal(whole[padding_idx], layer.weight[padding_idx])
    torch.testing.assert_close(whole.double(), layer.weight + sigma(layer.weight_rho) * noise, rtol=1e-5, atol=1e-6)


def test_a_held_draw_keeps_rows_then_the_whole_in_their_place() -> None:
    """One entry per tensor, dropped when a weight moves; always bit for bit the value that has gradients."""
    layer, draw, ids = table().eval(), Draw(3), torch.tensor([7, 1])
    assert draw.kept == {}
    layer.draw = draw
    weight = layer.variational("weight")
    expected = weight.sample().detach()
    with torch.no_grad():
        assert torch.equal(weight.sample_rows(ids), expected[ids])
        made = draw.kept["weight"].made
        assert made is not None and made.flatten().nonzero().flatten().tolist() == [1, 7]
        assert torch.equal(weight.sample(), expected) and weight.sample() is weight.sample()
        assert draw.kept["weight"].made is None and torch.equal(weight.sample_rows(ids), expected[ids])
        layer.get_parameter("weight").mul_(2)
        assert not torch.equal(weight.sample_rows(ids), expected[ids])
        assert draw.kept["weight"].made is not None


@pytest.mark.parametrize("rows", [slice(1, 4), torch.tensor([7, 2, 7])])
def test_rows_are_a_tensor_of_their_own(rows: Any) -> None:
    """Value, noise and signs are the whole's there; the padding row, which takes no noise, keeps its variance."""
    layer = table().train()
    with training_draw(layer):
        whole = layer.variational("weight")
        part = whole.rows(rows)
        assert torch.equal(part.sample(), whole.sample()[rows])
        assert torch.equal(part.perturbation, whole.perturbation[rows])
        assert torch.equal(part.signs(0, (2, 3), CPU), whole.signs(0, (2, 11), CPU)[:, rows])
        assert torch.equal(part.signs(1, (2, 5), CPU), whole.signs(1, (2, 5), CPU))
    torch.testing.assert_close(part.variance.double(), sigma(layer.weight_rho)[rows].square(), rtol=1e-5, atol=1e-9)


def test_training_rows_share_the_forward() -> None:
    """In one training forward an id has one value; in the next another; the padding row never moves."""
    layer = table().train()
    a = layer(torch.tensor([4, 4, 2]))
    b = layer(torch.tensor([4, 2]))
    assert torch.equal(a[0], a[1]) and not torch.equal(a[0], b[0])
    assert torch.equal(a[2], layer.weight[2]) and torch.equal(b[1], layer.weight[2])


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_gradient_reaches_only_rows_looked_up(padding_idx: int | None) -> None:
    """d/d rho = (sum over positions of the output's gradient) * eps * slope; a padding row has none, nor its mean."""
    layer = table(padding_idx).train()
    ids = torch.tensor([[1, 4, 4], [2, 2, 9]])
    upstream = torch.randn(2, 3, 5)
    with fixed_draw(layer, 1):
        layer(ids).backward(upstream)
    by_weight = torch.zeros(11, 5, dtype=torch.float64)
    by_weight.index_add_(0, ids.flatten(), upstream.double().reshape(-1, 5))
    noise = row_noise(key_of(0, 1, "weight"), range(11), 5)
    if padding_idx is not None:
        by_weight[padding_idx] = 0  # as torch's own Embedding
    expected = by_weight * noise * sigma_slope(layer.weight_rho)
    torch.testing.assert_close(layer.weight_rho.grad.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad.double(), by_weight, rtol=1e-5, atol=1e-6)


def test_tied_decoder_uses_the_same_rows() -> None:
    """A table tied to a decoder: the decoder multiplies with the rows that were looked up; padding silent in both."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Linear(5, 11, bias=False)
            self.table = nn.Embedding(11, 5, padding_idx=2)
            self.decoder.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.decoder(self.table(ids))

    model = to_bayesian(Tied(), delta=0.5)
    assert len(list(variational_tensors(model))) == 1
    ids = torch.arange(11)
    for train in (True, False):
        for gradient in (True, False):
            with torch.set_grad_enabled(gradient), fixed_draw(model.train(train), 0):
                rows = model.table(ids)
                gram = model(ids)
                torch.testing.assert_close(gram, rows @ rows.T)
                assert torch.equal(rows[2], model.table.weight[2])
    gram = model.train()(ids)
    torch.testing.assert_close(gram, gram.T)  # one draw in a training forward too


def test_degenerate_tables() -> None:
    """Empty lookups, and a table that is nothing but its padding row."""
    layer = table().train()
    assert layer(torch.empty(0, 3, dtype=torch.long)).shape == (0, 3, 5)
    only = to_bayesian(nn.Embedding(1, 3, padding_idx=0))
    assert torch.equal(only.train()(torch.zeros(2, dtype=torch.long)), torch.zeros(2, 3))
    assert float(kl_divergence(only).detach()) == 0


def test_int32_ids() -> None:
    layer = table().eval()
    with fixed_draw(layer, 0):
        assert torch.equal(layer(torch.tensor([1, 2, 7], dtype=torch.int32)), layer(torch.tensor([1, 2, 7])))
