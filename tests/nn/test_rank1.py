"""Rank-1 layers: moments and KL in closed form, one dense weight per draw, conversion, training and reload."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayeformers
import bayeformers.nn as bnn
from bayeformers import (
    NormalPrior,
    VariationalPosterior,
    fixed_draw,
    kl_divergence,
    posterior_mean,
    summary,
    to_bayesian,
    to_deterministic,
    unfreeze,
)
from bayeformers.quantization import quantize
from bayeformers.sampling import batched
from tests.cases import case
from tests.training import tiny


def layer(*, bias: bool = True, dtype: torch.dtype = torch.float64, **kwargs: Any) -> bnn.Rank1Linear:
    torch.manual_seed(0)
    return bnn.Rank1Linear(3, 2, bias=bias, dtype=dtype, delta=0.3, **kwargs)


def drawn(module: bnn.Rank1Linear, index: int) -> tuple[Tensor, Tensor]:
    with fixed_draw(module, index):
        return module.r.detach().clone(), module.s.detach().clone()


@pytest.mark.parametrize("bias", [True, False])
def test_a_draw_is_one_dense_weight(bias: bool) -> None:
    module, x = layer(bias=bias), torch.randn(4, 5, 3, dtype=torch.float64)
    for index in range(3):
        r, s = drawn(module, index)
        with fixed_draw(module, index):
            found = module(x)
            assert torch.equal(module(x), found)
            assert torch.equal(module(x[:1]), found[:1])
        torch.testing.assert_close(found, F.linear(x, module.weight * torch.outer(r, s), module.bias))


def test_the_mean_is_the_plain_layer() -> None:
    module, x = layer(), torch.randn(4, 3, dtype=torch.float64)
    plain = F.linear(x, module.weight, module.bias)
    torch.testing.assert_close(module.eval()(x), plain, rtol=1e-14, atol=1e-15)
    module.train()
    assert not torch.equal(module(x), module(x))
    with posterior_mean(module):
        torch.testing.assert_close(module(x), plain, rtol=1e-14, atol=1e-15)


@pytest.mark.protects("draw_covariance")
def test_moments_of_the_output() -> None:
    """y_o = r_o z_o + b_o with z_o = sum_i W_oi x_i s_i: E y_o = z_o(1) + b_o, and of two outputs

        Cov(y_o, y_p) = (1 + [o = p] a^2) sum_i W_oi W_pi x_i^2 c_i^2  +  [o = p] a^2 z_o(1)^2,

    where a is the scale of r and c that of s. Products of Gaussians have heavier tails than a Gaussian: their fourth
    moments are within a factor 3 of it here, so errors of 6 Gaussian standard errors, sd sqrt(2 / n), are safe.
    """
    module, x, n = layer(), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), 2_500
    a, c = 0.3, 0.3
    outputs = []
    with torch.no_grad():
        for index in range(n):
            with fixed_draw(module, index, seed=1):
                outputs.append(module(x))
    found = torch.stack(outputs)
    weight, z = module.weight.detach(), module.weight.detach() @ x
    shared = (weight * x.square()) @ weight.T * c**2
    same = torch.eye(2, dtype=torch.float64)
    covariance = (1 + same * a**2) * shared + torch.diag(a**2 * z.square())
    deviation = covariance.diagonal().sqrt()
    assert bool(((found.mean(0) - z - module.bias).abs() < 5 * deviation / n**0.5).all())
    assert bool(((found.T.cov() - covariance).abs() < 6 * torch.outer(deviation, deviation) * (2 / n) ** 0.5).all())


def test_kl_in_closed_form() -> None:
    """sum over r and s of log(t / s) + (s^2 + (1 - m)^2) / (2 t^2) - 1/2; W and b have none."""
    module = layer(prior=NormalPrior(std=0.5, centre=0.8))
    with torch.no_grad():
        module.r_rho.add_(0.4)
    expected = torch.zeros((), dtype=torch.float64)
    for rho in (module.r_rho, module.s_rho):
        scale = F.softplus(rho.double())
        expected += (torch.log(0.5 / scale) + (scale**2 + 0.2**2) / (2 * 0.25) - 0.5).sum()
    torch.testing.assert_close(kl_divergence(module).double(), expected.detach(), check_dtype=False)
    start = kl_divergence(to_bayesian(nn.Linear(3, 2), parametrization="rank1"))
    assert start.item() == pytest.approx(0, abs=1e-5)


def test_gradients_of_the_scales_are_exact() -> None:
    """dL/drho_s = dL/ds eps sigmoid(rho), with eps = (s - 1) / scale."""
    module, x = layer(), torch.randn(4, 3, dtype=torch.float64)
    r, s = (value.requires_grad_() for value in drawn(module, 0))
    (F.linear(x * s, module.weight) * r + module.bias).square().sum().backward()
    with fixed_draw(module, 0):
        module(x).square().sum().backward()
    for value, rho in ((r, module.r_rho), (s, module.s_rho)):
        scale = F.softplus(rho.detach().double())
        expected = value.grad * (value.detach() - 1) / scale * torch.sigmoid(rho.detach().double())
        torch.testing.assert_close(rho.grad.double(), expected, rtol=1e-5, atol=1e-7)


def test_linearised_covariance() -> None:
    """J Sigma J^T in r and s at 1: dy_o/dr_p = [o = p] z_o, dy_o/ds_i = W_oi x_i."""
    module, x = layer(), torch.randn(4, 3, dtype=torch.float64)
    net = to_bayesian(nn.Sequential(nn.Linear(3, 2).double()), delta=0.3, parametrization="rank1")
    module = net[0]
    _, found = VariationalPosterior(net).linearize(x)
    weight = module.weight.detach()
    z = x @ weight.T
    by_s = torch.einsum("oi,bi,pi->bop", weight, x.square() * 0.09, weight)
    torch.testing.assert_close(found, by_s + torch.diag_embed(0.09 * z.square()), rtol=1e-5, atol=1e-8)


# -- conversion --------------------------------------------------------------------------------------------------------


def converted(**kwargs: Any) -> nn.Module:
    return to_bayesian(case("bert").build(), delta=0.2, parametrization="rank1", **kwargs).eval()


def inputs() -> dict[str, Any]:
    return {key: value for key, value in case("bert").inputs().items() if key != "labels"}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**inputs()).logits


def test_conversion_takes_the_linear_layers_and_can_be_undone() -> None:
    plain = case("bert").build().eval()
    state, expected = copy.deepcopy(plain.state_dict()), logits(plain)
    model = to_bayesian(plain, parametrization="rank1")
    kinds = {name: module for name, module in model.named_modules() if isinstance(module, bnn.Rank1Linear)}
    assert kinds.keys() == {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert not any(isinstance(m, bnn.Embedding) for m in model.modules())
    torch.testing.assert_close(logits(model), expected)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"{name}.{key}_rho" for name in kinds for key in ("r", "s")}
    assert all(entry.shape[0] in (t.shape[0] for t in model.parameters()) for entry in summary(model).tensors)
    with fixed_draw(model, 0):
        first = logits(model)
    with fixed_draw(model, 1):
        assert not torch.equal(logits(model), first)
    to_deterministic(model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), expected)
    assert not any(issubclass(type(m), bnn.BayesianModule) for m in model.modules())


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("prior", [None, NormalPrior(std=0.1, centre=1.0)])
def test_a_reload_has_the_same_bits(freeze: bool, prior: Any, tmp_path: Path) -> None:
    model = converted(freeze=freeze, **({} if prior is None else {"prior": prior}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_rho"):
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    again = bayeformers.from_pretrained(tmp_path)
    assert {n: p.requires_grad for n, p in again.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    for index in range(2):
        with fixed_draw(model, index):
            expected = logits(model)
        with fixed_draw(again, index):
            assert torch.equal(logits(again), expected)
    plain = type(case("bert").build()).from_pretrained(tmp_path)  # transformers alone gives the posterior mean
    torch.testing.assert_close(logits(plain.eval()), logits(model))


def test_training_moves_the_matrix_and_the_scales_and_keeps_the_means(tmp_path: Path) -> None:
    model = to_bayesian(tiny.plain(), 0.2, freeze=False, parametrization="rank1")
    unfreeze(model)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith((".r", ".s")))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = tiny.trainer(tmp_path, model, rho_learning_rate=0.1)
    trainer.train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.endswith((".r", ".s")) for name in moved)
    assert {"classifier.weight", "classifier.r_rho", "classifier.s_rho"} <= moved
    assert trainer.evaluate()["eval_mutual_information"] > 0
    assert "kl" in trainer.state.log_history[0]


def test_hand_built_layers_share_no_noise() -> None:
    net = nn.Sequential(bnn.Rank1Linear(3, 3), bnn.Rank1Linear(3, 3))
    with fixed_draw(net, 0):
        assert not torch.equal(net[0].r, net[1].r) and not torch.equal(net[0].r, net[0].s)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"parametrization": "rank2"}, "`parametrization`"),
        ({"parametrization": None}, "`parametrization`"),
        ({"parametrization": "rank1", "estimator": "flipout"}, "`estimator`"),
        ({"parametrization": "rank1", "estimator": {"classifier": "local_reparameterization"}}, "`estimator`"),
        ({"parametrization": "rank1", "target_modules": ["word_embeddings"]}, "no torch.nn.Linear"),
    ],
)
def test_bad_conversions(options: dict[str, Any], told: str) -> None:
    model = case("bert").build()
    with pytest.raises(ValueError, match=told):
        to_bayesian(model, **options)
    assert not any(isinstance(module, bnn.BayesianModule) for module in model.modules())
    assert not any(name.endswith((".r", ".s")) for name, _ in model.named_parameters())


def test_another_models_posterior_is_no_prior() -> None:
    with pytest.raises(ValueError, match="`prior`"):
        to_bayesian(case("bert").build(), prior=converted(), parametrization="rank1")


def test_bad_layers() -> None:
    with pytest.raises(ValueError, match="`estimator`"):
        bnn.Rank1Linear(3, 2, estimator="flipout")
    with pytest.raises(ValueError, match="`delta`"):
        bnn.Rank1Linear(3, 2, delta=0.0)
    with pytest.raises(TypeError, match="prior"):
        bnn.Rank1Linear(3, 2, prior=1.0)  # type: ignore[arg-type]


def test_quantisation_is_refused() -> None:
    with pytest.raises(ValueError, match="rank-1"):
        quantize(to_bayesian(nn.Sequential(nn.Linear(3, 2)), parametrization="rank1"), [torch.ones(2, 3)])


@pytest.mark.parametrize("parametrization", ["rank1", "rows"])
def test_draws_in_one_batch_are_those_of_a_loop(parametrization: Any) -> None:
    net = to_bayesian(nn.Sequential(nn.Linear(3, 2).double()), delta=0.3, parametrization=parametrization)
    layer, x = net[0], torch.randn(5, 4, 3, dtype=torch.float64)
    expected, drawn = [], []
    for index in range(3):
        with fixed_draw(net, index, seed=1), torch.no_grad():
            expected.append(layer(x))
            drawn.append({name: getattr(layer, name) for name in layer.specs})
    values = {name: torch.stack([draw[name] for draw in drawn]) for name in drawn[0]}
    found = batched._OPERATIONS[type(layer)](layer, x.repeat(3, 1, 1), values)
    torch.testing.assert_close(found, torch.cat(expected))
