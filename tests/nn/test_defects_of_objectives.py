"""KL, scales, priors and initial values: each property against the formula that broke it elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayeformers.nn as bnn
from bayeformers import MopedPrior, NormalPrior, kl_divergence, summary, to_bayesian
from bayeformers.distributions import scale_from_rho
from tests.reference import kl_by_quadrature, normal_log_density, sigma, sigma_slope

LOC, SCALE = 0.3, 0.2


def square_layer(width: int, std: float = 1.0) -> bnn.Linear:
    """width^2 weights with q = N(LOC, SCALE^2) and p = N(0, std^2)."""
    layer = bnn.Linear(width, width, bias=False, prior=NormalPrior(std, 0.0), dtype=torch.float64)
    with torch.no_grad():
        layer.weight.fill_(LOC)
        layer.weight_rho.fill_(math.log(math.expm1(SCALE)))
    return layer


class Tied(nn.Module):
    """Embedding and decoder share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.decoder = nn.Embedding(6, 3), nn.Linear(3, 6)
        self.decoder.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        output: Tensor = self.decoder(torch.tanh(self.table(ids)))
        return output


def trainable(seed: int = 0) -> nn.Module:
    """Bayesian, means trained, in float64."""
    torch.manual_seed(seed)
    return to_bayesian(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double(), delta=0.1, freeze=False)


def move_means(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("rho"):
                parameter.add_(0.3)


# ------------------------------------------------------------------------------------------------------------------ KL


@pytest.mark.protects("kl_has_gradient")
def test_kl_has_gradient() -> None:
    """d KL / d rho = (sigma / s^2 - 1 / sigma) sigmoid(rho); a value stored through `.data` has none."""
    layer = square_layer(3)

    def check(kl: Tensor) -> None:
        (found,) = torch.autograd.grad(kl, layer.weight_rho, allow_unused=True)
        assert found is not None
        scale = sigma(layer.weight_rho)
        torch.testing.assert_close(
            found.double(), (scale - 1 / scale) * sigma_slope(layer.weight_rho), rtol=1e-5, atol=0
        )

    check(kl_divergence(layer))
    stored = torch.zeros((), dtype=torch.float64, requires_grad=True)
    stored.data = kl_divergence(layer).detach()
    with pytest.raises(AssertionError):
        check(stored)


@pytest.mark.protects("kl_is_a_sum")
def test_kl_is_a_sum() -> None:
    """Layers of 10^2, 100^2, 1000^2 equal weights: KL grows with their number; a mean says the same for all."""
    per_weight = kl_by_quadrature(LOC, SCALE, lambda x: normal_log_density(x, 0.0, 1.0))

    def check(divide_by: Callable[[nn.Module], float]) -> None:
        for width in (10, 100, 1000):
            layer = square_layer(width)
            found = float(kl_divergence(layer).detach()) / divide_by(layer)
            assert found == pytest.approx(width**2 * per_weight, rel=1e-6)

    check(lambda layer: 1.0)
    with pytest.raises(AssertionError):
        check(lambda layer: layer.weight.numel())  # type: ignore[union-attr,operator]


@pytest.mark.protects("kl_counted_once")
def test_kl_counted_once() -> None:
    """A tied tensor counts once; a sum over the layers that use it counts it again."""
    model = to_bayesian(Tied().double(), delta=0.1, prior=NormalPrior(1.0, 0.0))

    def check(kl: float) -> None:
        q = [
            torch.distributions.Normal(mu.detach(), sigma(rho))
            for mu, rho in (
                (model.table.weight, model.table.weight_rho),
                (model.decoder.bias, model.decoder.bias_rho),
            )
        ]
        p = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
        assert kl == pytest.approx(sum(float(torch.distributions.kl_divergence(one, p).sum()) for one in q), rel=1e-6)

    check(float(kl_divergence(model).detach()))
    with pytest.raises(AssertionError):
        check(sum(float(kl_divergence(layer).detach()) for layer in (model.table, model.decoder)))  # type: ignore[arg-type]


@pytest.mark.protects("nested_kl")
def test_nested_kl() -> None:
    """Layers at any depth count; a loop over the children sees the top level only."""
    inner = nn.Sequential(nn.Sequential(square_layer(2)), square_layer(3))
    model = nn.Sequential(square_layer(4), inner)
    per_weight = kl_by_quadrature(LOC, SCALE, lambda x: normal_log_density(x, 0.0, 1.0))

    def check(kl: float) -> None:
        assert kl == pytest.approx((4 + 9 + 16) * per_weight, rel=1e-6)

    check(float(kl_divergence(model).detach()))
    with pytest.raises(AssertionError):
        check(sum(float(kl_divergence(c).detach()) for c in model.children() if isinstance(c, bnn.BayesianModule)))


# -------------------------------------------------------------------------------------------------------------- priors


@pytest.mark.protects("prior_scale_is_not_variance")
def test_prior_scale_is_not_variance() -> None:
    """`NormalPrior(std=2)` has standard deviation 2; read as a variance it would be 1.41."""

    def check(std: float) -> None:
        expected = 9 * kl_by_quadrature(LOC, SCALE, lambda x: normal_log_density(x, 0.0, 2.0))
        assert float(kl_divergence(square_layer(3, std)).detach()) == pytest.approx(expected, rel=1e-6)

    check(2.0)
    with pytest.raises(AssertionError):
        check(math.sqrt(2.0))


@pytest.mark.protects("prior_scale_is_chosen")
def test_prior_scale_is_chosen() -> None:
    """Each std gives its own KL; a prior fixed at softplus(1) = 1.31 gives one."""

    def check(std_of: Callable[[float], float]) -> None:
        for std in (0.1, 1.0, 5.0):
            expected = 9 * kl_by_quadrature(LOC, SCALE, lambda x, s=std: normal_log_density(x, 0.0, s))  # type: ignore[misc]
            assert float(kl_divergence(square_layer(3, std_of(std))).detach()) == pytest.approx(expected, rel=1e-6)

    check(lambda std: std)
    with pytest.raises(AssertionError):
        check(lambda std: math.log1p(math.e))


@pytest.mark.protects("moped_copies")
def test_moped_copies() -> None:
    """Once the means train, the prior's centre stays where it was; an alias of them never pulls back."""

    def check(model: nn.Module) -> None:
        move_means(model)
        shifts = [(t.loc - t.module.prior_centre(t.parameter_name)) for t in bnn.variational_tensors(model)]
        torch.testing.assert_close(torch.cat([s.flatten() for s in shifts]).abs().min(), torch.tensor(0.3).double())
        assert float(kl_divergence(model).detach()) > 1

    check(trainable())
    aliased = trainable()
    for tensor in bnn.variational_tensors(aliased):
        setattr(tensor.module, f"{tensor.parameter_name}_prior_centre", tensor.loc.data)
    with pytest.raises(AssertionError):
        check(aliased)


@pytest.mark.protects("init_does_not_alias")
def test_init_does_not_alias() -> None:
    """No two tensors of a converted model share memory, so training one changes no other."""

    def check(model: nn.Module) -> None:
        pointers = [tensor.data_ptr() for tensor in model.state_dict().values()]
        assert len(set(pointers)) == len(pointers)

    check(trainable())
    aliased = trainable()
    aliased[0].weight_prior_centre = aliased[0].weight.data
    with pytest.raises(AssertionError):
        check(aliased)


@pytest.mark.protects("moped_sets_prior")
def test_moped_sets_prior() -> None:
    """MOPED sets posterior and prior: KL = 0 before training; with the posterior alone it is not.

    rho in float32 holds sigma to a relative 1e-6: the KL is second order in that.
    """

    def check(prior: MopedPrior | NormalPrior) -> None:
        model = to_bayesian(nn.Linear(20, 20).double(), delta=0.1, prior=prior)
        assert abs(float(kl_divergence(model).detach())) < 1e-6

    check(MopedPrior())
    with pytest.raises(AssertionError):
        check(NormalPrior(1.0, 0.0))


@pytest.mark.protects("prior_is_saved")
def test_prior_is_saved() -> None:
    """A state dict brings the prior back; without its centres the KL of the reloaded model is another."""
    model = trainable()
    move_means(model)
    state = model.state_dict()

    def check(state: dict[str, Tensor]) -> None:
        fresh = trainable(seed=1)
        fresh.load_state_dict(state, strict=False)
        found, expected = (float(kl_divergence(m).detach()) for m in (fresh, model))
        assert found == pytest.approx(expected, rel=1e-9)

    check(state)
    with pytest.raises(AssertionError):
        check({name: value for name, value in state.items() if not name.endswith("_prior_centre")})


# -------------------------------------------------------------------------------------------------------------- scales


@pytest.mark.protects("softplus_is_stable")
def test_softplus_is_stable() -> None:
    """Scale, its logarithm and their slopes are finite for rho in [-200, 200]; log(1 + exp(rho)) is not."""

    def check(softplus: Callable[[Tensor], Tensor]) -> None:
        rho = torch.tensor([-200.0, -104.0, -20.0, 0.0, 20.0, 89.0, 200.0], requires_grad=True)
        scale = softplus(rho)
        (slope,) = torch.autograd.grad(scale.log().sum(), rho)
        assert bool((scale > 0).all() and scale.isfinite().all() and slope.isfinite().all())

    check(scale_from_rho)
    with pytest.raises(AssertionError):
        check(lambda rho: torch.log(1 + torch.exp(rho)))
    with pytest.raises(AssertionError):
        check(F.softplus)  # stable above, but 0 from -104 down, where the logarithm is infinite


@pytest.mark.protects("zero_weights")
def test_zero_weights() -> None:
    """A zero bias gets delta * 0.02: not softplus(0) = 0.69, which drowns the layer, nor 1e-20, which never learns."""
    layer = nn.Linear(4, 2).double()
    with torch.no_grad():
        layer.bias.zero_()

    def check(scale: Tensor) -> None:
        torch.testing.assert_close(scale, torch.full((2,), 0.1 * 0.02, dtype=torch.float64), rtol=1e-6, atol=0)

    zero = layer.bias.detach().clone()
    check(sigma(to_bayesian(layer, delta=0.1).bias_rho))
    for defective in (F.softplus(0.1 * zero), 0.1 * zero + 1e-20):
        with pytest.raises(AssertionError):
            check(defective)


@pytest.mark.protects("fan_in_init")
def test_fan_in_init() -> None:
    """A fresh layer's means have torch's variance 1 / (3 fan-in), whatever the width; N(0, 0.1^2) has one for all.

    n weights, uniform: the variance's relative error has sd sqrt(0.8 / n) (kurtosis 1.8); 4 of them.
    """

    def check(weight_of: Callable[[int], Tensor]) -> None:
        for fan_in in (16, 256, 4096):
            weight = weight_of(fan_in).detach()
            allowed = 4 * math.sqrt(0.8 / weight.numel())
            assert float(weight.var()) * 3 * fan_in == pytest.approx(1, rel=allowed)

    torch.manual_seed(0)
    check(lambda fan_in: bnn.Linear(fan_in, 64).weight)
    with pytest.raises(AssertionError):
        check(lambda fan_in: torch.empty(64, fan_in).normal_(0, 0.1))


# -------------------------------------------------------------------------------------------------------------- memory


class FivePerWeight(nn.Module):
    """Mean, rho, noise, prior mean and prior scale of every weight, all stored."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.mu, self.rho = nn.Parameter(plain.weight.detach()), nn.Parameter(torch.zeros_like(plain.weight))
        for name in ("eps", "prior_mu", "prior_sigma"):
            self.register_buffer(name, torch.zeros_like(plain.weight))


@pytest.mark.protects("memory")
@pytest.mark.parametrize(("freeze", "numbers"), [(True, 2), (False, 3)])
def test_memory(freeze: bool, numbers: int) -> None:
    """Numbers stored per weight: mean and rho, plus the prior's centre where the mean trains."""

    def check(layer: nn.Module) -> None:
        stored = sum(tensor.numel() for tensor in (*layer.parameters(), *layer.buffers()))
        assert stored == numbers * 32 * 32

    check(to_bayesian(nn.Linear(32, 32, bias=False), freeze=freeze))
    with pytest.raises(AssertionError):
        check(FivePerWeight(nn.Linear(32, 32, bias=False)))


@pytest.mark.protects("sizes_count_weights")
def test_sizes_count_weights() -> None:
    """The reported size is the number of random weights, not of means and scales together."""
    model = to_bayesian(nn.Linear(10, 5))

    def check(size: int) -> None:
        assert size == 55

    check(summary(model).bayesian_parameters)
    with pytest.raises(AssertionError):
        check(sum(parameter.numel() for parameter in model.parameters()))
