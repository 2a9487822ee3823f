"""KL(q || p) of every prior against quadrature, `torch.distributions`, or direct minimisation; in float64."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, optimize
from torch import Tensor

from bayeformers.distributions import (
    ARDNormal,
    DiagonalNormal,
    DoubleExponential,
    EmpiricalNormal,
    LogUniform,
    ScaleMixture,
    kl_divergence,
    register_kl,
)
from tests.reference import kl_by_quadrature, normal_log_density

POSTERIORS = [(0.0, 1.0), (1.5, 0.3), (-2.0, 4.0), (0.01, 0.002), (-0.4, 0.05)]
MIXTURES = [(0.5, 1.0, 0.1), (0.25, 0.3, 1.2), (0.9, 0.05, 0.5)]


def posterior(*pairs: tuple[float, float]) -> DiagonalNormal:
    loc, scale = zip(*pairs, strict=True)
    return DiagonalNormal(torch.tensor(loc, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64))


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def mixture_log_density(pi: float, std1: float, std2: float) -> object:
    """log p by `torch.distributions`."""
    weights = torch.distributions.Categorical(torch.tensor([pi, 1 - pi], dtype=torch.float64))
    parts = torch.distributions.Normal(
        torch.zeros(2, dtype=torch.float64), torch.tensor([std1, std2], dtype=torch.float64)
    )
    return torch.distributions.MixtureSameFamily(weights, parts).log_prob


@pytest.mark.parametrize(("loc", "scale"), POSTERIORS)
@pytest.mark.parametrize(("centre", "std"), [(0.5, 2.0), (0.0, 0.1), (-1.0, 0.7)])
def test_normal_matches_quadrature(loc: float, scale: float, centre: float, std: float) -> None:
    kl = kl_divergence(posterior((loc, scale)), DiagonalNormal(scalar(centre), scalar(std)))
    expected = kl_by_quadrature(loc, scale, lambda x: normal_log_density(x, centre, std))
    assert float(kl) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.protects("kl_is_a_sum")
def test_kl_is_a_sum() -> None:
    """kl_is_a_sum: over elements of any shape, never a mean; torch.distributions says the same."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((10, 10), (100, 100), (3, 4, 5), (1,), ()):
        loc, centre = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        scale, std = (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1 for _ in range(2))
        expected = torch.distributions.kl_divergence(
            torch.distributions.Normal(loc, scale), torch.distributions.Normal(centre, std)
        )
        torch.testing.assert_close(
            kl_divergence(DiagonalNormal(loc, scale), DiagonalNormal(centre, std)), expected.sum()
        )


@pytest.mark.protects("prior_scale_is_not_variance")
def test_prior_scale_is_not_variance() -> None:
    """prior_scale_is_not_variance: a scale of 2 has density 1 / (2 sqrt(2 pi)) at its centre."""
    p = DiagonalNormal(scalar(0.0), scalar(2.0))
    assert float(p.log_prob(scalar(0.0)).exp()) == pytest.approx(1 / (2 * math.sqrt(2 * math.pi)))


def test_entropy_matches_torch() -> None:
    q = posterior(*POSTERIORS)
    expected = torch.distributions.Normal(q.loc, q.scale).entropy().sum()
    torch.testing.assert_close(q.entropy(), expected)
    wide = DiagonalNormal(torch.zeros(4, 3, dtype=torch.float64), scalar(0.5))  # a scale that broadcasts
    torch.testing.assert_close(wide.entropy(), 12 * torch.distributions.Normal(scalar(0.0), scalar(0.5)).entropy())


@pytest.mark.parametrize(("pi", "std1", "std2"), MIXTURES)
@pytest.mark.parametrize(("loc", "scale"), [(0.0, 0.04), (0.3, 0.05), (-0.8, 0.02)])
def test_mixture_by_quadrature(loc: float, scale: float, pi: float, std1: float, std2: float) -> None:
    """128 Gauss-Hermite nodes against a fine trapezoid rule: they converge where q is not much wider than p's parts."""
    kl = kl_divergence(posterior((loc, scale)), ScaleMixture(pi, std1, std2, 128))
    expected = kl_by_quadrature(loc, scale, mixture_log_density(pi, std1, std2))  # type: ignore[arg-type]
    assert float(kl) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("pi", "std1", "std2"), MIXTURES)
def test_sampled_mixture_is_unbiased(pi: float, std1: float, std2: float) -> None:
    """The one-draw estimate, n = 20,000 draws: mean within 4 standard errors of the quadrature."""
    generator = torch.Generator().manual_seed(3)
    p, pairs = ScaleMixture(pi, std1, std2), [(0.0, 0.1), (0.3, 0.05), (-0.8, 0.2), (0.0, 1.0)]
    draws = []
    for _ in range(20_000 // 200):
        q = posterior(*(pairs * 200))
        noise = torch.randn(q.loc.shape, generator=generator, dtype=torch.float64)
        draws.append(kl_divergence(q, p, noise) / 200)
    found = torch.stack(draws)
    log_density = mixture_log_density(pi, std1, std2)
    expected = sum(kl_by_quadrature(loc, scale, log_density) for loc, scale in pairs)  # type: ignore[arg-type]
    error = float(found.std()) / math.sqrt(len(found))
    assert abs(float(found.mean()) - expected) < 4 * error
    assert 0 < error < 0.05 * abs(expected) + 0.05


def test_sampled_mixture_is_one_element_at_a_time() -> None:
    """-H[q] - log p(loc + scale * noise), by torch.distributions."""
    q, noise = posterior(*POSTERIORS), torch.linspace(-2, 2, 5, dtype=torch.float64)
    log_p = mixture_log_density(0.3, 0.7, 0.02)(q.loc + q.scale * noise)  # type: ignore[operator]
    expected = -torch.distributions.Normal(q.loc, q.scale).entropy().sum() - log_p.sum()
    torch.testing.assert_close(kl_divergence(q, ScaleMixture(0.3, 0.7, 0.02), noise), expected)


@pytest.mark.parametrize("centre", [0.0, 0.7])
def test_empirical_bayes_is_the_best_normal(centre: float) -> None:
    """KL = min over s of KL(q || N(m, s^2)), found by a search over s; and its gradient is the envelope's."""
    q = posterior(*POSTERIORS)
    found = kl_divergence(q, EmpiricalNormal(scalar(centre)))

    def at(log_s: float) -> float:
        p = torch.distributions.Normal(scalar(centre), math.exp(log_s))
        return float(torch.distributions.kl_divergence(torch.distributions.Normal(q.loc, q.scale), p).sum())

    low, high, golden = -10.0, 10.0, (math.sqrt(5) - 1) / 2
    while high - low > 1e-7:
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if at(a) < at(b) else (a, high)
    assert float(found) == pytest.approx(at(low), abs=1e-9)
    best = EmpiricalNormal(scalar(centre)).best_scale(q)
    assert float(best) == pytest.approx(math.exp(low), rel=1e-6)
    scale = q.scale.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        kl_divergence(DiagonalNormal(q.loc, scale), EmpiricalNormal(scalar(centre))), scale
    )
    torch.testing.assert_close(
        gradient, q.scale / best.square() - 1 / q.scale
    )  # at fixed s: the optimum's derivative is 0


@pytest.mark.parametrize(("loc", "scale"), [*POSTERIORS, (3.0, 1e-3)])
@pytest.mark.parametrize(("centre", "width"), [(0.0, 1.0), (0.5, 0.03), (-1.0, 4.0)])
def test_double_exponential_matches_quadrature(loc: float, scale: float, centre: float, width: float) -> None:
    """Against `torch.distributions.Laplace`, in pieces that end at its kink."""
    p = torch.distributions.Laplace(scalar(centre), scalar(width))
    q = torch.distributions.Normal(scalar(loc), scalar(scale))

    def integrand(x: float) -> float:
        log_q = q.log_prob(scalar(x))
        return float(log_q.exp() * (log_q - p.log_prob(scalar(x))))

    ends = sorted({loc - 12 * scale, loc + 12 * scale, min(max(centre, loc - 12 * scale), loc + 12 * scale), loc})
    pieces = zip(ends, ends[1:], strict=False)
    expected = sum(integrate.quad(integrand, a, b, epsabs=1e-12, epsrel=1e-10)[0] for a, b in pieces)
    found = kl_divergence(posterior((loc, scale)), DoubleExponential(scalar(centre), scalar(width)))
    assert float(found) == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_double_exponential_around_its_own_mean() -> None:
    """A frozen mean is the prior's centre itself: the same number as with an equal centre."""
    q = posterior(*POSTERIORS)
    own = kl_divergence(q, DoubleExponential(q.loc, scalar(0.3)))
    torch.testing.assert_close(own, kl_divergence(q, DoubleExponential(q.loc.clone(), scalar(0.3))))


@pytest.mark.parametrize(("loc", "scale"), [*POSTERIORS, (1.0, 1e-3), (-5e-3, 1.0)])
def test_log_uniform_matches_quadrature(loc: float, scale: float) -> None:
    """-H[q] - E_q log p, p the improper density of `LogUniform.log_prob`; singular at 0, where the pieces end."""
    q = torch.distributions.Normal(scalar(loc), scalar(scale))

    def integrand(x: float) -> float:
        return float(q.log_prob(scalar(x)).exp() * LogUniform().log_prob(scalar(x))) if x else 0.0

    low, high = loc - 12 * scale, loc + 12 * scale
    ends = sorted({low, high, loc, *(x for x in (-0.1 * scale, 0.0, 0.1 * scale) if low < x < high)})
    pieces = zip(ends, ends[1:], strict=False)
    expected_log_p = sum(integrate.quad(integrand, a, b, epsabs=1e-12, epsrel=1e-10, limit=200)[0] for a, b in pieces)
    expected = -float(q.entropy()) - expected_log_p
    # `log_prob` is cut off at |w| = 1e-8, which moves its expectation by about 1e-8 / sigma
    found = float(kl_divergence(posterior((loc, scale)), LogUniform()))
    assert found == pytest.approx(expected, rel=1e-7, abs=1e-7 + 2e-8 / scale)


def test_log_uniform_is_zero_where_all_is_noise() -> None:
    """At mu = 0 exactly, non-negative elsewhere, and finite at mu / sigma = 1e6 in float32, gradients too."""
    assert float(kl_divergence(posterior((0.0, 0.1), (0.0, 3.0)), LogUniform())) == 0.0
    loc = torch.tensor([0.0, 1e-8, 1e-3, 1.0, 1e2], requires_grad=True)
    scale = torch.tensor([1e-4, 1e-2, 1e-4, 1e-6, 1e-4], requires_grad=True)
    kl = kl_divergence(DiagonalNormal(loc, scale), LogUniform())
    kl.backward()
    assert float(kl) > 0 and torch.isfinite(kl)
    assert torch.isfinite(loc.grad).all() and torch.isfinite(scale.grad).all()


@pytest.mark.parametrize(("loc", "scale"), POSTERIORS)
def test_ard_is_the_best_normal_of_each_weight(loc: float, scale: float) -> None:
    """min over s of KL(N(mu, sigma^2) || N(0, s^2)), the minimum found by a search over s and each KL by quadrature."""

    def at(log_s: float) -> float:
        return kl_by_quadrature(loc, scale, lambda x: normal_log_density(x, 0.0, math.exp(log_s)), 4001)

    found = float(kl_divergence(posterior((loc, scale)), ARDNormal()))
    best = optimize.minimize_scalar(at, bounds=(-12, 6), method="bounded", options={"xatol": 1e-9})
    assert found == pytest.approx(best.fun, rel=1e-7, abs=1e-9)
    assert found == pytest.approx(0.5 * math.log(1 + (loc / scale) ** 2), rel=1e-12)


def test_ard_of_a_multiplicative_posterior() -> None:
    """BayeTorch's form: sigma^2 = alpha mu^2 gives sum log(1 + 1 / alpha) / 2, whatever mu is."""
    loc = torch.tensor([0.3, -2.0, 1e-4], dtype=torch.float64)
    alpha = torch.tensor([0.01, 1.0, 7.0], dtype=torch.float64)
    kl = kl_divergence(DiagonalNormal(loc, alpha.sqrt() * loc.abs()), ARDNormal())
    torch.testing.assert_close(kl, 0.5 * (1 + 1 / alpha).log().sum())


def test_improper_and_fitted_densities_have_a_log_prob() -> None:
    """log_prob: the kernel 1 / |w| for both; ARD's is N(w; 0, s^2) at its best s = |w|."""
    w = torch.tensor([0.5, -2.0], dtype=torch.float64)
    expected = torch.stack([torch.distributions.Normal(0.0, float(x.abs())).log_prob(x) for x in w])
    torch.testing.assert_close(ARDNormal().log_prob(w), expected)
    difference = LogUniform().log_prob(w[:1]) - LogUniform().log_prob(w[1:])
    assert float(difference) == pytest.approx(math.log(4.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_new_forms_are_finite_at_extremes(dtype: torch.dtype) -> None:
    """mu = 0, |mu| / sigma from 1e-8 to 1e6: value and gradients."""
    ratio = torch.tensor([0.0, 1e-8, 1e-3, 1.0, 1e3, 1e6], dtype=dtype)
    for sigma in (1e-8, 1e-3, 10.0):
        for p in (
            ARDNormal(),
            LogUniform(),
            DoubleExponential(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)),
        ):
            loc = (ratio * sigma).requires_grad_()
            scale = torch.full_like(ratio, sigma).requires_grad_()
            kl = kl_divergence(DiagonalNormal(loc, scale), p)
            kl.backward()
            assert torch.isfinite(kl) and torch.isfinite(loc.grad).all() and torch.isfinite(scale.grad).all()


@pytest.mark.protects("kl_has_gradient")
def test_kl_has_gradient() -> None:
    """kl_has_gradient: in loc and scale, against finite differences, for every density."""
    densities = (
        DiagonalNormal(scalar(0.2), scalar(0.5)),
        ScaleMixture(0.5, 1.0, 0.1, 16),
        ScaleMixture(0.5, 1.0, 0.1),
        EmpiricalNormal(scalar(0.2)),
        DoubleExponential(scalar(0.25), scalar(0.4)),
        LogUniform(),
        ARDNormal(),
    )
    noise = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64)
    leaves = posterior((0.3, 0.4), (-0.2, 0.9), (1.0, 0.1))
    for p in densities:
        torch.autograd.gradcheck(
            lambda loc, scale, p=p: kl_divergence(DiagonalNormal(loc, scale), p, noise),
            (leaves.loc.clone().requires_grad_(), leaves.scale.clone().requires_grad_()),
        )


def test_missing_noise_is_named() -> None:
    with pytest.raises(ValueError, match=r"`noise` is needed.*ScaleMixture"):
        kl_divergence(posterior((0.0, 1.0)), ScaleMixture(0.5, 1.0, 0.1))


def test_registered_kl_is_used_and_inherited() -> None:
    """A new density needs only `log_prob`; a registered form takes over, for its subclasses too."""

    class Laplace:
        def log_prob(self, value: Tensor) -> Tensor:
            return torch.distributions.Laplace(scalar(0.0), scalar(1.0)).log_prob(value)

    class Narrow(Laplace):
        pass

    q, noise = posterior((0.1, 0.2)), scalar(0.5).reshape(1)
    expected = -q.entropy() - Laplace().log_prob(q.loc + q.scale * noise).sum()
    torch.testing.assert_close(kl_divergence(q, Laplace(), noise), expected)
    register_kl(DiagonalNormal, Laplace)(lambda q, p: scalar(7.0))
    assert float(kl_divergence(q, Narrow())) == 7.0
