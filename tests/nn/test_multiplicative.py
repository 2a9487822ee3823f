"""sigma = softplus(rho) max(|mu|, floor): the draw, the KL and their gradients against the formula, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayeformers.nn as bnn
from bayeformers import (
    ARDPrior,
    DoubleExponentialPrior,
    EmpiricalBayesPrior,
    MopedPrior,
    NormalPrior,
    ScaleMixturePrior,
    VariationalPosterior,
    bayesian_config,
    calibrate_delta,
    fixed_draw,
    kl_divergence,
    log_prior,
    log_variational_posterior,
    to_bayesian,
    to_deterministic,
)
from bayeformers.training.records import ScaleShift
from tests.reference import moped_sigma, noise_of

LAYERS = {"table": "Embedding", "hidden": "Linear", "decoder": "Linear"}


class Tied(nn.Module):
    """A table with a padding row, tied to its decoder; a weight of zero, and one of a hundredth of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3, padding_idx=2)
        self.hidden = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 6)
        self.decoder.weight = self.table.weight
        with torch.no_grad():
            self.hidden.weight[0, 0] = 0.0
            self.hidden.weight[1, 1] *= 0.01

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.hidden(self.table(ids))))


def plain() -> Tied:
    torch.manual_seed(1)
    return Tied().double()


def converted(**options: Any) -> nn.Module:
    """Means, and scales, away from where they started."""
    model = to_bayesian(plain(), **{"delta": 0.2, "freeze": False, "scale": "multiplicative", **options})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            torch.manual_seed(sum(map(ord, name)))
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
            parameter.view(-1)[0] *= 1.5
        model.hidden.weight[0, 0] = 0.0
    return model


def floor_of(w0: Tensor, padding_idx: int | None = None) -> float:
    """0.1 mean|w0| of the rows that are random."""
    rows = [r for r in range(len(w0)) if r != padding_idx]
    return 0.1 * float(w0[rows].abs().mean())


def leaves_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}


NAMES = {"table.weight": 2, "hidden.weight": None, "hidden.bias": None, "decoder.bias": None}


def scales(leaves: dict[str, Tensor], source: nn.Module) -> dict[str, Tensor]:
    """sigma by the formula, with gradient in mu and rho."""
    found = {}
    for name, padding in NAMES.items():
        floor = floor_of(source.get_parameter(name).detach(), padding)
        unit = torch.where(leaves[name].abs() > floor, leaves[name].abs(), torch.full_like(leaves[name], floor))
        found[name] = F.softplus(leaves[f"{name}_rho"]) * unit
    return found


def test_starts_at_the_scale_of_the_additive_rule() -> None:
    for name, tensor in (
        (t.name, t) for t in bnn.variational_tensors(to_bayesian(plain(), 0.2, scale="multiplicative"))
    ):
        weight = plain().get_parameter(name).detach()
        keep = [r for r in range(len(weight)) if r != NAMES[name]]
        torch.testing.assert_close(tensor.scale()[keep], moped_sigma(weight[keep], 0.2), rtol=1e-6, atol=0)


@pytest.mark.protects("multiplicative_zero")
def test_multiplicative_zero() -> None:
    """multiplicative_zero: weights at 0, and whole tensors of them, are uncertain, and their scale can be trained."""
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.bias)
    with torch.no_grad():
        layer.weight[1] = 0.0
    model = to_bayesian(layer, 0.3, scale="multiplicative")
    for name, reference in (("weight", layer.weight), ("bias", layer.bias)):
        scale = model.variational(name).scale
        assert float(scale.min()) > 0
        torch.testing.assert_close(scale.double(), moped_sigma(reference, 0.3), rtol=1e-5, atol=0)
    model.train()(torch.randn(5, 4)).square().sum().backward()
    assert (model.weight_rho.grad[1] != 0).all() and (model.bias_rho.grad != 0).all()
    (kl_divergence(model) + log_prior(model)).backward()
    assert torch.isfinite(model.weight_rho.grad).all()


@pytest.mark.parametrize("index", [0, 3])
def test_draw_and_its_gradient(index: int) -> None:
    """w = mu + softplus(rho) max(|mu|, floor) eps: dL/dmu also goes through |mu|, and stops at the floor."""
    model, source, ids = converted(), plain(), torch.tensor([[0, 2, 5], [3, 3, 1]])
    with fixed_draw(model, index):
        output = model(ids)
        output.square().sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(model(ids), output.detach(), rtol=1e-12, atol=1e-12)
    leaves = leaves_of(model)
    noise = noise_of(source, LAYERS, index)
    weights = {name: leaves[name] + scale * noise[name].double() for name, scale in scales(leaves, source).items()}
    expected = torch.func.functional_call(source, weights, (ids,), tie_weights=True)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    expected.square().sum().backward()
    for name, parameter in model.named_parameters():
        theirs = leaves[name].grad
        # rho is float32, and so is its gradient
        torch.testing.assert_close(parameter.grad.double(), theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("estimator", ["reparameterization", "flipout", "local_reparameterization"])
def test_estimators_see_one_scale(estimator: str) -> None:
    """perturbation = scale * noise and variance = scale^2, padding row without; rows of a lookup as in the table."""
    model = converted(estimator=estimator).train()
    model(torch.tensor([1, 2]))
    for name, layer in (("weight", model.hidden), ("weight", model.table)):
        tensor = layer.variational(name)
        noise = tensor.draw.noise(tensor.spec, tensor.loc).double()
        torch.testing.assert_close(tensor.perturbation, tensor.scale * noise, rtol=1e-7, atol=1e-9)
        variance = tensor.scale.square().clone()
        if tensor.spec.padding_idx is not None:
            variance[tensor.spec.padding_idx] = 0
            rows = torch.tensor([5, 2, 0])
            torch.testing.assert_close(tensor.rows(rows).perturbation, tensor.perturbation[rows])
            torch.testing.assert_close(tensor.sample_rows(rows)[[0, 2]], tensor.sample()[rows[[0, 2]]])
        torch.testing.assert_close(tensor.variance, variance)


def reference_kl(prior: Any, mu: Tensor, scale: Tensor, w0: Tensor) -> Tensor:
    """KL of one tensor, differentiable, by torch.distributions or the formula."""
    q = torch.distributions.Normal(mu, scale)
    if isinstance(prior, ARDPrior):
        return torch.distributions.kl_divergence(
            q, torch.distributions.Normal(0 * mu, (mu.square() + scale.square()).sqrt())
        ).sum()
    if isinstance(prior, DoubleExponentialPrior):
        d = mu - w0
        folded = scale * (2 / torch.pi) ** 0.5 * (-0.5 * (d / scale) ** 2).exp() + d * torch.erf(d / scale / 2**0.5)
        return (folded / prior.scale + torch.tensor(2 * prior.scale).log()).sum() - q.entropy().sum()
    if isinstance(prior, MopedPrior):
        std = moped_sigma(w0, 0.2)
    elif isinstance(prior, NormalPrior):
        std = torch.tensor(prior.std, dtype=torch.float64)
    else:
        std = (scale.square() + (mu - w0).square()).mean().sqrt()
    centre = torch.full_like(w0, prior.centre) if getattr(prior, "centre", "") == 0.1 else w0
    return torch.distributions.kl_divergence(q, torch.distributions.Normal(centre, std)).sum()


PRIORS = [
    MopedPrior(), NormalPrior(0.7), NormalPrior(0.7, 0.1), EmpiricalBayesPrior(), ARDPrior(),
    DoubleExponentialPrior(0.3),
]  # fmt: skip


@pytest.mark.parametrize("prior", PRIORS, ids=repr)
def test_kl_and_its_gradient(prior: Any) -> None:
    model, source = converted(prior=prior), plain()
    found = kl_divergence(model)
    found.backward()
    leaves = leaves_of(model)
    parts = []
    for name, scale in scales(leaves, source).items():
        w0 = source.get_parameter(name).detach()
        keep = [r for r in range(len(w0)) if r != NAMES[name]]
        parts.append(reference_kl(prior, leaves[name][keep], scale[keep], w0[keep]))
    expected = torch.stack(parts).sum()
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    for name, parameter in model.named_parameters():
        # rho is float32, and so is its gradient
        torch.testing.assert_close(parameter.grad.double(), leaves[name].grad, rtol=1e-5, atol=1e-5, msg=name)
    torch.testing.assert_close(log_variational_posterior(model) - log_prior(model), found, rtol=1e-9, atol=1e-9)


def test_sampled_kl_uses_the_same_scale() -> None:
    """-H[q] - log p(w) at the draw of the forward, q's scale and w by the formula."""
    prior = ScaleMixturePrior(0.3, 0.5, 0.1)
    model, source = converted(prior=prior).train(), plain()
    model(torch.tensor([1]))
    key, expected = model.hidden.scope.sampling_key(), torch.zeros((), dtype=torch.float64)
    for tensor in bnn.variational_tensors(model):
        scale = scales(leaves_of(model), source)[tensor.name]
        keep = [r for r in range(len(scale)) if r != NAMES[tensor.name]]
        w = (tensor.loc + scale * key.noise(tensor.spec, tensor.loc))[keep]
        parts = [
            torch.distributions.Normal(0.0, s).log_prob(w) + torch.tensor(p).log() for s, p in ((0.5, 0.3), (0.1, 0.7))
        ]
        entropy = torch.distributions.Normal(0.0, scale[keep]).entropy().sum()
        expected = expected - entropy - torch.logaddexp(*parts).sum()
    assert float(kl_divergence(model).detach()) == pytest.approx(float(expected), rel=1e-6)


def test_ard_knows_only_alpha() -> None:
    """sum log(1 + 1 / alpha) / 2 where no weight is under the floor: no gradient reaches the means."""
    layer = nn.Linear(3, 2, bias=False).double()
    nn.init.uniform_(layer.weight, 1.0, 2.0)
    model = to_bayesian(layer, 0.5, freeze=False, prior=ARDPrior(), scale="multiplicative")
    kl = kl_divergence(model)
    kl.backward()
    assert float(kl) == pytest.approx(6 * 0.5 * torch.tensor(1 + 1 / 0.25).log().item(), rel=1e-6)
    assert float(model.weight.grad.abs().max()) < 1e-6
    assert float(model.weight_rho.grad.abs().min()) > 0.1


def test_scale_follows_a_mean_that_trains() -> None:
    model = to_bayesian(nn.Linear(3, 2), 0.1, freeze=False, scale="multiplicative")
    before = model.variational("weight").scale.clone()
    with torch.no_grad():
        model.weight.mul_(2)
    above = model.weight.abs() > 2 * model.weight_scale_floor
    torch.testing.assert_close(model.variational("weight").scale[above], 2 * before[above])


def test_variances_of_the_posterior() -> None:
    model = converted()
    for loc, variance in VariationalPosterior(model).variances().items():
        tensor = next(t for t in bnn.variational_tensors(model) if t.loc is loc)
        expected = scales(leaves_of(model), plain())[tensor.name].detach().square()
        if NAMES[tensor.name] is not None:
            expected[NAMES[tensor.name]] = 0
        torch.testing.assert_close(variance, expected, rtol=1e-6, atol=1e-9)


def test_scale_shift_is_of_sigma() -> None:
    """The trainer's record: doubling every mean moves log sigma by log 2 wherever the floor is not met."""
    model = to_bayesian(nn.Linear(3, 2), 0.1, scale="multiplicative")
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(1.0)
    shift = ScaleShift(model)
    with torch.no_grad():
        model.weight.mul_(2)
        model.bias.mul_(2)
    assert shift.median(model) == pytest.approx(0.6931, rel=1e-3)


def test_calibration_does_not_depend_on_the_parameterisation() -> None:
    """Frozen means: the same scales, so the same draws and the same delta; and the scales come back as they were."""
    torch.manual_seed(0)
    inputs, labels, found = torch.randn(64, 4), torch.randint(3, (64,)), []
    for scale in ("additive", "multiplicative"):
        torch.manual_seed(3)
        model = to_bayesian(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), 0.07, scale=scale)
        before = model[0].weight_rho.detach().clone()
        found.append(calibrate_delta(model, inputs, labels, num_samples=4, progress=False))
        assert torch.equal(model[0].weight_rho, before)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_state_and_its_removal() -> None:
    """The floor is in the state dict of both owners of a tied tensor; an additive model has no such entry."""
    model, other = converted(), to_bayesian(plain(), 0.5, scale="multiplicative")
    added = set(model.state_dict()) - set(to_bayesian(plain(), freeze=False).state_dict())
    assert added == {f"{n}_scale_floor" for n in (*NAMES, "decoder.weight")}
    assert bayesian_config(model).scale == "multiplicative"
    with torch.no_grad():
        other.hidden.weight_scale_floor.fill_(9.0)
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(key.endswith("_prior_centre") for key in unexpected)
    torch.testing.assert_close(other.hidden.variational("weight").scale, model.hidden.variational("weight").scale)
    assert set(to_deterministic(model).state_dict()) == set(plain().state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """The floor and rho stay float32; draws are of the model's dtype, KL and its gradients are float32 and finite."""
    torch.manual_seed(0)
    model = to_bayesian(Tied().to(dtype), 0.1, freeze=False, scale="multiplicative").train()
    assert model.to(dtype).hidden.weight_scale_floor.dtype == model.hidden.weight_rho.dtype == torch.float32
    assert model.hidden.variational("weight").sample().dtype == dtype
    kl = kl_divergence(model)
    kl.backward()
    assert kl.dtype == torch.float32 and abs(float(kl)) < 1e-3
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_hand_built_layer() -> None:
    """`become_bayesian(scale=...)` of a layer; `reset_parameters` fixes the floor anew."""
    layer = bnn.Linear(4, 3)
    layer.become_deterministic()
    layer.become_bayesian(prior=NormalPrior(), delta=0.2, estimator="flipout", scale="multiplicative")
    with torch.no_grad():
        layer.weight.mul_(10)
    layer.reset_parameters()
    torch.testing.assert_close(layer.weight_scale_floor, 0.1 * layer.weight.abs().mean())
    torch.testing.assert_close(
        layer.variational("weight").scale.double(), moped_sigma(layer.weight, 0.2), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("scale", ["relative", "Multiplicative", 1, True, ["additive"], ""])
def test_bad_scale(scale: Any) -> None:
    """Named, before anything changes."""
    model = nn.Linear(2, 2)
    with pytest.raises((ValueError, TypeError), match="`scale` must be one of.*additive.*multiplicative"):
        to_bayesian(model, scale=scale)
    assert type(model) is nn.Linear
