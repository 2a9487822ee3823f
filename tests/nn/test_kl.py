"""The KL term over a model, and the ELBO, against closed forms, quadrature and functional references in float64."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from scipy import integrate, optimize
from scipy.special import dawsn
from torch import Tensor, nn

import bayeformers.nn as bnn
from bayeformers import (
    ARDPrior,
    DoubleExponentialPrior,
    EmpiricalBayesPrior,
    LogUniformPrior,
    MopedPrior,
    NormalPrior,
    ScaleMixturePrior,
    fixed_draw,
    kl_divergence,
    log_prior,
    log_variational_posterior,
    posterior_mean,
    to_bayesian,
    unfreeze,
)
from bayeformers.distributions import InitialScale, Prior
from bayeformers.nn.kl import tensor_kl
from tests.cases import case
from tests.reference import key_of, kl_by_quadrature, moped_sigma, normal_log_density, row_noise, sigma

PRIORS = [
    MopedPrior(),
    MopedPrior(relative_scale=3.0),
    NormalPrior(std=0.7),
    NormalPrior(std=0.2, centre=0.1),
    EmpiricalBayesPrior(),
    EmpiricalBayesPrior(centre=0.0),
    ScaleMixturePrior(0.3, 0.5, 0.1),
    ScaleMixturePrior(0.3, 0.5, 0.1, quadrature=16),
    DoubleExponentialPrior(0.3),
    DoubleExponentialPrior(0.2, centre=0.1),
    LogUniformPrior(),
    ARDPrior(),
]


GAUSSIAN_PRIORS = PRIORS[:-4]


class Tied(nn.Module):
    """A little language model: a table with a padding row in the middle, tied to its decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3, padding_idx=2)
        self.hidden = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 6)
        self.decoder.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.hidden(self.table(ids))))


def tied(moved: bool = True, **options: Any) -> nn.Module:
    """Bayesian, float64, means and scales away from their initial values."""
    torch.manual_seed(1)
    model = to_bayesian(Tied().double(), delta=0.1, freeze=False, **options)
    if moved:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def random_weights(model: nn.Module, centre: nn.Module) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(mu, sigma, w0) of every distinct tensor without its padding row: written out by hand."""
    keep = [0, 1, 3, 4, 5]
    pairs = [
        (model.table.weight[keep], model.table.weight_rho[keep], centre.table.weight[keep]),
        *(
            (getattr(m, n), getattr(m, f"{n}_rho"), getattr(c, n))
            for m, c, n in (
                (model.hidden, centre.hidden, "weight"),
                (model.hidden, centre.hidden, "bias"),
                (model.decoder, centre.decoder, "bias"),
            )
        ),
    ]
    return [(mu.detach().double(), sigma(rho), w0.detach().double()) for mu, rho, w0 in pairs]


def reference_kl(prior: Any, mu: Tensor, scale: Tensor, w0: Tensor) -> float:
    """KL of one tensor by torch.distributions, or by quadrature per weight."""
    q = torch.distributions.Normal(mu, scale)
    if isinstance(prior, ScaleMixturePrior):

        def log_p(x: Tensor) -> Tensor:
            parts = (normal_log_density(x, 0.0, prior.std1), normal_log_density(x, 0.0, prior.std2))
            return torch.logaddexp(parts[0] + math.log(prior.pi), parts[1] + math.log(1 - prior.pi))

        values = zip(mu.flatten().tolist(), scale.flatten().tolist(), strict=True)
        return sum(kl_by_quadrature(m, s, log_p, 20_001) for m, s in values)
    if isinstance(prior, LogUniformPrior):  # 2 int_0^y D, y = mu / (sigma sqrt 2)
        ratios = (mu / scale).abs().flatten().tolist()
        return sum(2 * integrate.quad(dawsn, 0, r / math.sqrt(2), limit=200)[0] for r in ratios)
    centre = w0 if getattr(prior, "centre", "pretrained") == "pretrained" else torch.full_like(mu, prior.centre)
    if isinstance(prior, DoubleExponentialPrior):
        values = zip(mu.flatten().tolist(), scale.flatten().tolist(), centre.flatten().tolist(), strict=True)
        width = torch.tensor(prior.scale, dtype=torch.float64)
        return sum(kl_by_quadrature(m, s, torch.distributions.Laplace(c, width).log_prob) for m, s, c in values)
    if isinstance(prior, ARDPrior):
        centre, std = torch.zeros_like(mu), (mu.square() + scale.square()).sqrt()
    elif isinstance(prior, MopedPrior):
        std = prior.relative_scale * moped_sigma(w0, 0.1)
    elif isinstance(prior, NormalPrior):
        std = torch.full_like(mu, prior.std)
    else:
        std = (scale.square() + (mu - centre).square()).mean().sqrt()
    return float(torch.distributions.kl_divergence(q, torch.distributions.Normal(centre, std)).sum())


@pytest.mark.protects("kl_counted_once")
@pytest.mark.parametrize("prior", PRIORS, ids=repr)
def test_kl_matches_reference(prior: Any) -> None:
    """kl_counted_once, moped_sets_prior: every prior on a tied model, the padding row left out; 4 se where sampled."""
    torch.manual_seed(1)
    model, original = tied(prior=prior), Tied()
    torch.manual_seed(1)
    original = Tied().double()
    expected = sum(reference_kl(prior, *weights) for weights in random_weights(model, original))
    if isinstance(prior, ScaleMixturePrior):
        model.train()
        values = []
        for _ in range(1000 if prior.quadrature is None else 1):
            model(torch.tensor([0]))  # each forward has its own draw, which the sampled KL shares
            values.append(float(kl_divergence(model).detach()))
        found = torch.tensor(values, dtype=torch.float64)
        error = float(found.std()) / math.sqrt(len(found)) if len(found) > 1 else 0.0
        # 16 nodes where q is up to 7 times as wide as the narrower part: a quadrature error of percents at worst
        assert abs(float(found.mean()) - expected) < (4 * error if error else 0.02 * expected)
        assert len(set(values)) == len(values)
    else:
        assert float(kl_divergence(model).detach()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("prior", PRIORS, ids=repr)
def test_parts_differ_by_the_kl(prior: Any) -> None:
    """log_variational_posterior - log_prior = KL, and the first is minus the entropy of torch.distributions."""
    model, original = tied(prior=prior), Tied().double()
    model.train()(torch.tensor([1]))
    difference = log_variational_posterior(model) - log_prior(model)
    torch.testing.assert_close(difference, kl_divergence(model), rtol=1e-9, atol=1e-9)
    entropies = [
        torch.distributions.Normal(mu, scale).entropy().sum() for mu, scale, _ in random_weights(model, original)
    ]
    torch.testing.assert_close(log_variational_posterior(model), -torch.stack(entropies).sum())


@pytest.mark.protects("kl_has_gradient")
@pytest.mark.parametrize("prior", PRIORS, ids=repr)
def test_kl_has_gradient(prior: Any) -> None:
    """kl_has_gradient: in every mean and rho, by finite differences; none for the padding row, its mean included."""
    model = tied(prior=prior)
    model.train()(torch.tensor([1]))  # fixes the draw of a sampled KL
    kl_divergence(model).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        flat = parameter.data.view(-1)
        for element in (0, flat.numel() // 2, flat.numel() - 1):
            step = 1e-2 if parameter.dtype == torch.float32 else 1e-5
            before = float(flat[element])
            values = []
            for sign in (1, -1):
                flat[element] = before + sign * step
                values.append((float(flat[element]), float(kl_divergence(model).detach())))
            flat[element] = before
            slope = (values[0][1] - values[1][1]) / (values[0][0] - values[1][0])
            # central differences: relative error of order step^2 times the third derivative
            assert float(parameter.grad.view(-1)[element]) == pytest.approx(slope, rel=2e-3, abs=1e-4), (name, element)
    assert model.table.weight.grad[2].abs().max() == 0 and model.table.weight_rho.grad[2].abs().max() == 0


@pytest.mark.parametrize("prior", GAUSSIAN_PRIORS, ids=repr)
@pytest.mark.parametrize("padding_idx", [None, 5])
def test_large_tensors_are_summed_whole(prior: Any, padding_idx: int | None) -> None:
    """A tensor that is worked on in blocks or around a padding row has the KL, and gradients, of the formula."""
    torch.manual_seed(0)
    table = nn.Embedding(700, 600, padding_idx=padding_idx)
    with torch.no_grad():
        table.weight[:350] *= 0.05  # a tensor whose parts differ: statistics of a part are not those of the whole
    model = to_bayesian(table, delta=0.1, freeze=False, prior=prior)
    w0 = table.weight.detach().clone()
    with torch.no_grad():
        table.weight.add_(torch.randn_like(w0), alpha=0.05)
        table.weight_rho.add_(torch.randn_like(w0), alpha=0.3)
    model.train()(torch.tensor([1]))
    found = kl_divergence(model)
    gradients = torch.autograd.grad(found, [table.weight, table.weight_rho])
    rows = [r for r in range(700) if r != padding_idx]
    mu = table.weight.detach().double().requires_grad_()
    rho = table.weight_rho.detach().double().requires_grad_()
    scale = F.softplus(rho)[rows]
    q = torch.distributions.Normal(mu[rows], scale)
    if isinstance(prior, ScaleMixturePrior) and prior.quadrature:
        pytest.skip("its quadrature is judged on a small tensor")
    if isinstance(prior, ScaleMixturePrior):
        draw = model.scope.sampling_key()
        eps = row_noise(key_of(draw.seed, draw.index, "weight"), rows, 600)
        value = mu[rows] + scale * eps
        parts = [normal_log_density(value, 0.0, s) + math.log(p) for s, p in ((0.5, 0.3), (0.1, 0.7))]
        expected = -q.entropy().sum() - torch.logaddexp(*parts).sum()
    else:
        centre = w0[rows].double()
        centre = centre if getattr(prior, "centre", "pretrained") == "pretrained" else 0 * centre + prior.centre
        std = (scale.square() + (mu[rows] - centre).square()).mean().sqrt()
        if isinstance(prior, MopedPrior):
            std = prior.relative_scale * moped_sigma(w0[rows], 0.1)
        elif isinstance(prior, NormalPrior):
            std = torch.tensor(prior.std, dtype=torch.float64)
        expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(centre, std)).sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, [mu, rho]), strict=True):
        # float32 sums over 420,000 weights (the floor of sigma_0) are good to some 1e-5
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=5e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("centre", ["pretrained", 0.1])
def test_empirical_bayes_per_layer(centre: Any) -> None:
    """min over one s per layer of the KL, by a search; weight and bias share it, a tied weight is its first owner's."""
    model = tied(prior=EmpiricalBayesPrior(centre=centre, per="layer"))
    torch.manual_seed(1)
    table, weight, bias, decoder_bias = random_weights(model, Tied().double())
    expected, best = 0.0, []
    for layer in ([table], [weight, bias], [decoder_bias]):

        def at(log_s: float, layer: Any = layer) -> float:
            priors = [
                torch.distributions.Normal(w0 if centre == "pretrained" else centre, math.exp(log_s))
                for *_, w0 in layer
            ]
            posteriors = [torch.distributions.Normal(mu, scale) for mu, scale, _ in layer]
            pairs = zip(posteriors, priors, strict=True)
            return sum(float(torch.distributions.kl_divergence(q, p).sum()) for q, p in pairs)

        found = optimize.minimize_scalar(at, bounds=(-8, 4), method="bounded", options={"xatol": 1e-8})
        expected, best = expected + found.fun, [*best, math.exp(found.x)]
    kl = kl_divergence(model)
    assert float(kl.detach()) == pytest.approx(expected, rel=1e-7)
    assert summary_kl(model) == pytest.approx(expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(kl, model.hidden.bias)
    shift = bias[0] - (bias[2] if centre == "pretrained" else centre)
    torch.testing.assert_close(gradient, shift / best[1] ** 2, rtol=1e-5, atol=1e-8)


def summary_kl(model: nn.Module) -> float:
    """What the table of `summary` adds up to."""
    return sum(float(tensor_kl(tensor).detach()) for tensor in bnn.variational_tensors(model))


def test_empirical_bayes_per_layer_has_gradient() -> None:
    """By finite differences of the whole KL, s moving along: it stands at its optimum, so that costs nothing."""
    model = tied(prior=EmpiricalBayesPrior(per="layer"))
    kl_divergence(model).backward()
    for name, parameter in model.named_parameters():
        flat, element, step = parameter.data.view(-1), parameter.numel() - 1, 1e-2 if name.endswith("rho") else 1e-5
        before, values = float(flat[element]), []
        for sign in (1, -1):
            flat[element] = before + sign * step
            values.append((float(flat[element]), float(kl_divergence(model).detach())))
        flat[element] = before
        slope = (values[0][1] - values[1][1]) / (values[0][0] - values[1][0])
        assert float(parameter.grad.view(-1)[element]) == pytest.approx(slope, rel=2e-3, abs=1e-4), name


def test_users_prior_is_estimated_without_bias() -> None:
    """A density with `log_prob` alone: mean of 2,000 one-draw KLs within 4 standard errors of the quadrature."""

    @dataclass(frozen=True)
    class StudentPrior(Prior):
        freedom: float = 3.0
        type: ClassVar[str] = "test_student"
        needs_centre: ClassVar[bool] = False

        def for_tensor(self, centre: Tensor, initial: InitialScale) -> Any:
            return torch.distributions.StudentT(self.freedom)

    model = tied(prior=StudentPrior()).train()
    torch.manual_seed(1)
    weights, density = random_weights(model, Tied().double()), torch.distributions.StudentT(torch.tensor(3.0).double())
    expected = sum(
        kl_by_quadrature(m, s, density.log_prob, 4001)
        for mu, scale, _ in weights
        for m, s in zip(mu.flatten().tolist(), scale.flatten().tolist(), strict=True)
    )
    values = []
    for _ in range(2000):
        model(torch.tensor([0]))
        values.append(float(kl_divergence(model).detach()))
    found = torch.tensor(values, dtype=torch.float64)
    assert abs(float(found.mean()) - expected) < 4 * float(found.std()) / math.sqrt(2000)


@pytest.mark.protects("moped_sets_prior")
@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("name", ["bert", "gpt2-lm", "bart-lm", "t5"])
def test_kl_is_zero_before_training(name: str, freeze: bool) -> None:
    """MOPED: 0 up to rounding. rho holds sigma_0 to a relative error u <= 1 + |rho| ulps, 20 * 6e-8 = 1.2e-6 at most;
    KL per weight is then u^2 + O(u^3) plus the rounding of 0.5 (r^2 - 1) - log r, some 1e-7: D * 2e-7 bounds the sum.
    """
    model = to_bayesian(case(name).build(), freeze=freeze)
    size = sum(t.loc.numel() for t in bnn.variational_tensors(model))
    assert abs(float(kl_divergence(model))) < 2e-7 * size


@pytest.mark.protects("moped_copies")
def test_moped_copies() -> None:
    """moped_copies: training the means moves them away from the prior's centre, which is a copy."""
    for unfrozen_later in (False, True):
        model = tied(moved=False) if not unfrozen_later else unfreeze(to_bayesian(Tied().double(), delta=0.1))
        assert float(kl_divergence(model)) == pytest.approx(0, abs=1e-5)
        optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if not n.endswith("rho")], lr=0.1)
        model(torch.tensor([0, 1])).square().sum().backward()
        optimizer.step()
        assert float(kl_divergence(model)) > 0.1
        expected = model.decoder.bias.detach() - model.decoder.bias_prior_centre
        assert expected.abs().max() > 0


def test_mean_that_trains_without_its_centre() -> None:
    """A mean unfrozen by hand has no centre: the error names `unfreeze` and the tensor; a plain prior needs none."""
    model = to_bayesian(Tied())
    model.hidden.bias.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"hidden\.bias.*unfreeze"):
        kl_divergence(model)
    model = to_bayesian(Tied(), prior=NormalPrior(centre=0.0))
    model.hidden.bias.requires_grad_(True)
    assert torch.isfinite(kl_divergence(model))


def test_no_bayesian_layer() -> None:
    for function in (kl_divergence, log_prior, log_variational_posterior):
        with pytest.raises(ValueError, match=r"`model` \(Tied\).*to_bayesian"):
            function(Tied())


@pytest.mark.protects("nested_kl")
def test_hand_built_layers() -> None:
    """Layers used like torch's: N(0, 1) prior, the KL of each counted once."""
    model = nn.Sequential(bnn.Linear(3, 4), nn.Tanh(), bnn.Linear(4, 2, prior=NormalPrior(0.5, 0.0)))
    expected = 0.0
    for layer, std in ((model[0], 1.0), (model[2], 0.5)):
        for name in ("weight", "bias"):
            q = torch.distributions.Normal(getattr(layer, name).double(), sigma(getattr(layer, f"{name}_rho")))
            p = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), std)
            expected += float(torch.distributions.kl_divergence(q, p).sum())
    assert float(kl_divergence(model)) == pytest.approx(expected, rel=1e-5)
    assert float(kl_divergence(nn.ModuleList([model, model[0]]))) == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------------------------ the ELBO


def test_analytic_elbo_of_linear_regression() -> None:
    """y = x w + b + noise: expected log-likelihood, KL and the gradient of both in closed form (2,000 draws, 4 se).

    E_q ||y - x w - b||^2 = ||y - x mu - m||^2 + sum x^2 sigma^2 + N s_b^2.
    """
    torch.manual_seed(0)
    x, y, noise_std = torch.randn(20, 3).double(), torch.randn(20).double(), 0.7
    layer = bnn.Linear(3, 1, prior=NormalPrior(0.8, 0.0), delta=0.5, dtype=torch.float64).train()

    def log_likelihood(prediction: Tensor) -> Tensor:
        return normal_log_density_with_gradient(y, prediction.squeeze(-1), noise_std)

    leaves = [p.detach().double().requires_grad_() for p in layer.parameters()]
    named = dict(zip(dict(layer.named_parameters()), leaves, strict=True))
    scale, scale_b = F.softplus(named["weight_rho"]), F.softplus(named["bias_rho"])
    residual = (y - (x @ named["weight"].T + named["bias"]).squeeze(-1)).square().sum()
    spread = (x.square() @ scale.square().T).sum() + 20 * scale_b.square().sum()
    expected = -0.5 * (residual + spread) / noise_std**2 - 20 * math.log(noise_std * math.sqrt(2 * math.pi))
    expected_gradient = torch.cat([g.flatten() for g in torch.autograd.grad(expected, leaves)])

    values, gradients = [], []
    for _ in range(2000):
        value = log_likelihood(layer(x))
        gradient = torch.autograd.grad(value, list(layer.parameters()))
        values.append(value.detach())
        gradients.append(torch.cat([g.double().flatten() for g in gradient]))
    found, slopes = torch.stack(values), torch.stack(gradients)
    assert abs(found.mean() - expected) < 4 * found.std() / math.sqrt(len(found))
    error = slopes.std(0) / math.sqrt(len(slopes))
    assert ((slopes.mean(0) - expected_gradient).abs() < 4 * error + 1e-9).all()
    q = torch.distributions.Normal(torch.cat([leaves[0].flatten(), named["bias"]]).detach(),
                                   torch.cat([scale.flatten(), scale_b]).detach())  # fmt: skip
    p = torch.distributions.Normal(torch.zeros(4).double(), torch.full((4,), 0.8, dtype=torch.float64))
    assert float(kl_divergence(layer)) == pytest.approx(float(torch.distributions.kl_divergence(q, p).sum()), rel=1e-9)


def normal_log_density_with_gradient(y: Tensor, mean: Tensor, std: float) -> Tensor:
    """log N(y; mean, std^2), summed, differentiable in the mean."""
    return (-0.5 * ((y - mean) / std).square() - math.log(std * math.sqrt(2 * math.pi))).sum()


@pytest.mark.protects("noise_is_fresh")
@pytest.mark.parametrize("name", ["bert", "albert", "gpt2-lm"])
def test_noise_is_fresh(name: str) -> None:
    """noise_is_fresh: two training forwards before one backward give the sum of the two forwards' own gradients."""
    model = to_bayesian(case(name).build(), delta=0.3, freeze=False).train()
    inputs = case(name).inputs()
    rhos = [p for n, p in model.named_parameters() if n.endswith("rho") and "rel_emb" not in n]

    def forward() -> Tensor:
        return model(**inputs).logits.tanh().sum()

    torch.manual_seed(11)
    first, second = forward(), forward()
    together = torch.autograd.grad(first + second, rhos, allow_unused=True)
    torch.manual_seed(11)
    apart = [torch.autograd.grad(forward(), rhos, allow_unused=True) for _ in range(2)]
    assert not torch.equal(first, second)
    for both, a, b in zip(together, *apart, strict=True):
        if both is not None:
            torch.testing.assert_close(both, a + b, rtol=1e-5, atol=1e-6)
            assert not torch.equal(a, b) or a.abs().max() == 0


@pytest.mark.protects("one_draw_per_forward")
def test_layer_used_twice_has_one_draw() -> None:
    """w^2 through one shared layer: d/d sigma of E[(w^2 x - y)^2] needs one draw; two draws give another number."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    model = to_bayesian(Twice().double(), delta=0.4).train()
    with torch.no_grad():
        model.layer.weight.fill_(1.3)
    x = torch.ones(1, 1, dtype=torch.float64)
    scale = float(sigma(model.layer.weight_rho))
    outputs = torch.stack([model(x).detach().squeeze() for _ in range(2000)])
    assert (outputs >= 0).all()  # a square: two draws would give negative products
    # E[w^2] = mu^2 + s^2; Var[w^2] = 4 mu^2 s^2 + 2 s^4
    error = math.sqrt((4 * 1.3**2 * scale**2 + 2 * scale**4) / 2000)
    assert abs(float(outputs.mean()) - (1.3**2 + scale**2)) < 4 * error


def test_mean_mode_has_no_rho_gradient() -> None:
    model = to_bayesian(case("bert").build(), freeze=False).train()
    with posterior_mean(model):
        model(**case("bert").inputs()).logits.sum().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if n.endswith("rho"))


def test_gradient_accumulates_over_micro_batches() -> None:
    """With a held draw the gradient of a batch is the sum over its parts, also an uneven one (relative 1e-5)."""
    model = to_bayesian(case("bert").build(), delta=0.2).double().train()
    ids = torch.randint(4, 64, (7, 6))
    rhos = [p for n, p in model.named_parameters() if n.endswith("rho")]

    def gradient(rows: slice) -> list[Tensor]:
        with fixed_draw(model, 2):
            loss = F.cross_entropy(model(input_ids=ids[rows]).logits, ids[rows, 0] % 3, reduction="sum")
        return list(torch.autograd.grad(loss, rhos))

    parts = [gradient(slice(a, b)) for a, b in ((0, 3), (3, 6), (6, 7))]
    for whole, *rest in zip(gradient(slice(0, 7)), *parts, strict=True):
        torch.testing.assert_close(sum(rest), whole, rtol=1e-5, atol=1e-6 * float(whole.abs().max() + 1e-6))


def test_means_that_train_against_the_conversion_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Once; `unfreeze` is the way that is meant."""
    model = to_bayesian(nn.Linear(3, 2), prior=NormalPrior(std=1.0, centre=0.0))
    with caplog.at_level(logging.WARNING):
        kl_divergence(model)
        assert not caplog.text
        model.requires_grad_(True)
        kl_divergence(model)
        kl_divergence(model)
    assert caplog.text.count("though the conversion froze the means") == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        kl_divergence(unfreeze(to_bayesian(nn.Linear(3, 2), prior=NormalPrior(std=1.0, centre=0.0))))
    assert not caplog.text
