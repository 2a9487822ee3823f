"""The log marginal likelihood against exact evidence, and its optima against grids, autograd and scipy; in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from bayeformers.laplace import evidence
from bayeformers.laplace.evidence import (
    Precision,
    Spectrum,
    effective_parameters,
    log_marginal_likelihood,
    optimal_noise_std,
    optimal_precision_and_noise,
    optimal_prior_precision,
)
from bayeformers.likelihoods import get_likelihood


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spectra_of_layers(seed: int = 0) -> dict[str, Spectrum]:
    """Three layers whose eigenvalues span 8 decades and contain zeros, as a rank-deficient GGN's do."""
    layers = {}
    for name, (shape, norm) in {"a": ((5, 7), 2.0), "b": ((3, 4), 40.0), "c": ((6, 2), 0.3)}.items():
        values = torch.randn(shape, generator=generator(seed), dtype=torch.float64).mul(3).exp()
        values[0] = 0.0
        layers[name] = Spectrum(values, norm)
        seed += 1
    return layers


# --------------------------------------------------------------------------------------- Bayesian linear regression, F2


@dataclasses.dataclass
class Regression:
    """y = X W^T + noise with prior N(0, I / tau) on W (C, d + 1): everything is known in closed form."""

    noise_std: float
    tau: float

    def __post_init__(self) -> None:
        self.inputs = torch.randn(50, 4, generator=generator(0), dtype=torch.float64)
        self.features = torch.cat([self.inputs, torch.ones(50, 1, dtype=torch.float64)], 1)
        weight = torch.randn(3, 5, generator=generator(1), dtype=torch.float64)
        noise = torch.randn(50, 3, generator=generator(2), dtype=torch.float64)
        self.targets = self.features @ weight.T + self.noise_std * noise

    def exact_log_evidence(self) -> float:
        """Each output's y ~ N(0, s^2 I + X X^T / tau)."""
        gram = self.features @ self.features.T / self.tau
        covariance = self.noise_std**2 * torch.eye(50, dtype=torch.float64) + gram
        density = torch.distributions.MultivariateNormal(torch.zeros(50, dtype=torch.float64), covariance)
        return float(density.log_prob(self.targets.T).sum())

    def best_weight(self) -> Tensor:
        precision = self.features.T @ self.features / self.noise_std**2 + self.tau * torch.eye(5, dtype=torch.float64)
        return torch.linalg.solve(precision, self.features.T @ self.targets / self.noise_std**2).T

    def spectrum(self) -> Spectrum:
        """At unit noise G = N I and A = X^T X / N, so that G (x) A is the exact GGN."""
        right = torch.linalg.eigvalsh(self.features.T @ self.features / 50)
        left = torch.full((3,), 50.0, dtype=torch.float64)
        return Spectrum(left[:, None] * right[None, :], float(self.best_weight().square().sum()))


@pytest.mark.parametrize(("noise_std", "tau"), [(0.5, 2.0), (1.0, 1.0), (0.1, 30.0)])
def test_it_is_the_exact_evidence_of_a_linear_model(noise_std: float, tau: float) -> None:
    problem = Regression(noise_std, tau)
    fitted = problem.features @ problem.best_weight().T
    found = log_marginal_likelihood(
        float(get_likelihood("regression").log_likelihood(fitted, problem.targets, noise_std)),
        {"layer": problem.spectrum()},
        tau,
        scale=1 / noise_std**2,
    )
    assert found == pytest.approx(problem.exact_log_evidence(), rel=0, abs=1e-9)


def test_it_is_the_formula_summed_over_layers() -> None:
    """loglik - tau |theta|^2 / 2 + (p / 2) log tau - sum log(scale L + tau) / 2."""
    spectra, taus, scale = spectra_of_layers(), {"a": 0.3, "b": 12.0, "c": 1.7}, 2.5
    expected = -123.0
    for name, spectrum in spectra.items():
        tau, values = taus[name], spectrum.eigenvalues
        expected += -0.5 * tau * spectrum.squared_norm + 0.5 * values.numel() * math.log(tau)
        expected -= 0.5 * float((scale * values + tau).log().sum())
    assert log_marginal_likelihood(-123.0, spectra, taus, scale=scale) == pytest.approx(expected, abs=1e-10)
    same = dict.fromkeys(spectra, 0.8)
    assert log_marginal_likelihood(-1.0, spectra, 0.8) == log_marginal_likelihood(-1.0, spectra, same)


def test_a_temperature_divides_the_log_likelihood_and_the_curvature() -> None:
    """Tempering by T is the same regression with noise s sqrt(T), up to that Gaussian's constant."""
    problem, temperature = Regression(0.5, 2.0), 3.0
    spectra, constant = {"layer": problem.spectrum()}, 0.5 * math.log(2 * math.pi)
    squared_error = float((problem.features @ problem.best_weight().T - problem.targets).square().sum())
    tempered = (-squared_error / (2 * 0.25) - 150 * (math.log(0.5) + constant)) / temperature
    hotter = -squared_error / (2 * 0.75) - 150 * (0.5 * math.log(0.75) + constant)
    difference = log_marginal_likelihood(tempered, spectra, 2.0, scale=1 / (temperature * 0.25))
    difference -= log_marginal_likelihood(hotter, spectra, 2.0, scale=1 / 0.75)
    assert difference == pytest.approx(tempered - hotter, abs=1e-10)


# ------------------------------------------------------------------------------------------------- prior precision, F10


def test_the_derivative_is_half_of_gamma_minus_tau_norm() -> None:
    """Against autograd through the plain formula, at tau = 1 and elsewhere; and gamma against its definition."""
    spectra = spectra_of_layers()
    for log_tau in (0.0, -3.0, 4.0):
        point = torch.tensor(log_tau, dtype=torch.float64, requires_grad=True)
        value = sum(
            -0.5 * point.exp() * s.squared_norm
            + 0.5 * s.eigenvalues.numel() * point
            - 0.5 * (s.eigenvalues + point.exp()).log().sum()
            for s in spectra.values()
        )
        (slope,) = torch.autograd.grad(value, point)  # type: ignore[arg-type]
        gamma, tau = effective_parameters(spectra, math.exp(log_tau)), math.exp(log_tau)
        expected = 0.5 * sum(gamma[name] - tau * s.squared_norm for name, s in spectra.items())
        assert float(slope) == pytest.approx(expected, rel=1e-11)
        for name, s in spectra.items():
            assert gamma[name] == pytest.approx(float((s.eigenvalues / (s.eigenvalues + tau)).sum()), rel=1e-13)


def test_it_is_strictly_concave_in_log_tau() -> None:
    spectra, grid = spectra_of_layers(), np.linspace(-10, 15, 2001)
    values = np.array([log_marginal_likelihood(0.0, spectra, math.exp(u)) for u in grid])
    assert np.diff(values, 2).max() < 0
    best = optimal_prior_precision(spectra)
    assert isinstance(best, float)
    assert abs(math.log(best) - grid[values.argmax()]) <= grid[1] - grid[0]
    assert log_marginal_likelihood(0.0, spectra, best) >= values.max()


@pytest.mark.parametrize("scale", [1.0, 1e-3, 250.0])
def test_mackays_fixed_point_has_the_same_optimum(scale: float) -> None:
    """tau <- gamma / |theta|^2, whose error shrinks by h / gamma < 1 a step, until it no longer moves."""
    spectra, tau = spectra_of_layers(), 1.0
    norm = sum(s.squared_norm for s in spectra.values())
    for _ in range(500):
        tau = sum(effective_parameters(spectra, tau, scale=scale).values()) / norm
    best = optimal_prior_precision(spectra, scale=scale)
    assert isinstance(best, float)
    assert math.log(best) == pytest.approx(math.log(tau), abs=1e-10)


def test_layers_decouple() -> None:
    spectra = spectra_of_layers()
    best = optimal_prior_precision(spectra, per_layer=True, scale=0.7)
    assert isinstance(best, dict) and list(best) == list(spectra)
    for name, spectrum in spectra.items():
        alone = optimal_prior_precision({name: spectrum}, scale=0.7)
        assert best[name] == alone
        gamma = effective_parameters({name: spectrum}, best[name], scale=0.7)[name]
        assert gamma == pytest.approx(best[name] * spectrum.squared_norm, rel=1e-9)
    shared = optimal_prior_precision(spectra, scale=0.7)
    assert log_marginal_likelihood(0.0, spectra, best, scale=0.7) > log_marginal_likelihood(
        0.0, spectra, shared, scale=0.7
    )


def counted(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    calls: list[None] = []
    original: Callable[..., Any] = evidence.determined_weights

    def count(*args: Any) -> Any:
        calls.append(None)
        return original(*args)

    monkeypatch.setattr(evidence, "determined_weights", count)
    return calls


@pytest.mark.parametrize("norm", [1e-7, 1e-3, 1.0, 1e3, 1e6])
def test_few_passes_from_anywhere(norm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eigenvalues over 12 decades and optima over 10: Newton's slopes lie in [-2, -1], so 12 passes are plenty."""
    calls = counted(monkeypatch)
    values = torch.logspace(-6, 6, 1000, dtype=torch.float64)
    tau = optimal_prior_precision({"layer": Spectrum(values, norm)}, bounds=(1e-12, 1e12))
    assert isinstance(tau, float)
    gamma = float((values / (values + tau)).sum())
    assert math.log(gamma / norm) == pytest.approx(math.log(tau), abs=1e-10)
    assert len(calls) <= 12


ZERO, ONES = torch.zeros(3), torch.ones(3)


@pytest.mark.parametrize(
    ("spectrum", "expected"),
    [
        (Spectrum(ONES, 0.0), 10.0),  # all weights at the prior mean: the narrower the better
        (Spectrum(ZERO, 2.0), 0.1),  # no curvature: nothing is paid for a wide prior
        (Spectrum(ZERO, 0.0), 1.0),  # neither: the evidence is flat
        (Spectrum(ONES, 1e-9), 10.0),  # an optimum beyond the bounds
        (Spectrum(ONES, 1e9), 0.1),
        (Spectrum(torch.full((3,), 5e-324, dtype=torch.float64), 1.0), 0.1),
    ],
)
def test_optimum_at_a_bound(spectrum: Spectrum, expected: float) -> None:
    assert optimal_prior_precision({"layer": spectrum}, bounds=(0.1, 10.0)) == expected
    both = {"layer": spectrum, "other": Spectrum(ONES, 1.0)}
    best = optimal_prior_precision(both, per_layer=True, bounds=(0.1, 10.0))
    assert isinstance(best, dict) and best["layer"] == expected
    assert 0.1 < best["other"] < 10


def test_bounds_that_leave_one_value() -> None:
    for tau in (1e-3, 2.0, 1e3):
        assert optimal_prior_precision(spectra_of_layers(), bounds=(tau, tau)) == tau
    assert optimal_prior_precision({"layer": Spectrum(ZERO, 0.0)}, bounds=(3.0, 4.0)) == 3.0


# ---------------------------------------------------------------------------------------------------------------- noise


def joint(
    spectra: Mapping[str, Spectrum], squared_error: float, num_outputs: int, temperature: float
) -> Callable[[Precision, float], float]:
    """The evidence of a regression as a function of tau and s^2, the Gaussian's constant included."""

    def value(precision: Precision, variance: float) -> float:
        fit = -0.5 * (squared_error / variance + num_outputs * math.log(2 * math.pi * variance))
        return log_marginal_likelihood(fit / temperature, spectra, precision, scale=1 / (temperature * variance))

    return value


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("num_outputs", [30, 150, 4000])
@pytest.mark.parametrize("tau", [1e-4, 0.8, 1e3])
def test_noise_is_the_fixed_point_and_the_maximum(tau: float, num_outputs: int, temperature: float) -> None:
    """With 59 weights, N C = 30 has fewer numbers than weights."""
    spectra = spectra_of_layers()
    settings: dict[str, Any] = {"squared_error": 20.0, "num_outputs": num_outputs, "temperature": temperature}
    variance = optimal_noise_std(spectra, prior_precision=tau, **settings) ** 2
    gamma = sum(effective_parameters(spectra, tau, scale=1 / (temperature * variance)).values())
    assert variance == pytest.approx(20 / (num_outputs - temperature * gamma), rel=1e-8)
    value = joint(spectra, **settings)
    best = value(tau, variance)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert value(tau, factor * variance) < best


@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("num_outputs", [30, 150])
def test_precision_and_noise_maximise_the_joint_evidence(num_outputs: int, per_layer: bool, temperature: float) -> None:
    """Against scipy's Nelder-Mead over (log s^2, log tau...), which knows no derivative."""
    spectra = spectra_of_layers()
    value = joint(spectra, 20.0, num_outputs, temperature)
    precision, noise_std = optimal_precision_and_noise(
        spectra, squared_error=20.0, num_outputs=num_outputs, per_layer=per_layer, temperature=temperature
    )
    assert isinstance(precision, dict if per_layer else float)

    def negative(point: np.ndarray) -> float:
        taus = [math.exp(u) for u in point[1:]]
        return -value(dict(zip(spectra, taus, strict=True)) if per_layer else taus[0], math.exp(point[0]))

    start = np.zeros(1 + (len(spectra) if per_layer else 1))
    found = minimize(negative, start, method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-13, "maxiter": 4000})
    ours = [2 * math.log(noise_std)]
    ours += [math.log(tau) for tau in (precision.values() if isinstance(precision, dict) else [precision])]
    # a value known to 1e-13 places its maximum, of curvature above 0.1, to 1e-6
    np.testing.assert_allclose(ours, found.x, rtol=0, atol=1e-5)
    assert value(precision, noise_std**2) >= -found.fun - 1e-10


def test_noise_and_precision_of_simulated_regressions() -> None:
    """With 40,000 numbers the true noise 0.3 is found within 5 of its standard errors, 0.3 / sqrt(2 * 40000)."""
    inputs = torch.randn(20_000, 5, generator=generator(0), dtype=torch.float64)
    weight = torch.randn(2, 5, generator=generator(1), dtype=torch.float64)
    targets = inputs @ weight.T + 0.3 * torch.randn(20_000, 2, generator=generator(2), dtype=torch.float64)
    fitted = torch.linalg.lstsq(inputs, targets).solution.T
    values = torch.linalg.eigvalsh(inputs.T @ inputs).expand(2, 5)
    _, noise_std = optimal_precision_and_noise(
        {"layer": Spectrum(values, float(fitted.square().sum()))},
        squared_error=float((inputs @ fitted.T - targets).square().sum()),
        num_outputs=40_000,
    )
    assert abs(noise_std - 0.3) < 5 * 0.3 / math.sqrt(80_000)


# ------------------------------------------------------------------------------------------------ sums, wrong arguments


def test_sums_are_float64_whatever_the_eigenvalues_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million float32 eigenvalues, in chunks, not contiguous; and they are left as they were."""
    values = torch.rand(1000, 1000, generator=generator(0)).T
    kept, wide = values.clone(), values.double()
    found = log_marginal_likelihood(0.0, {"layer": Spectrum(values, 0.0)}, 0.1)
    assert found == pytest.approx(-0.5 * float((wide / 0.1).log1p().sum()), rel=1e-13)
    assert effective_parameters({"layer": Spectrum(values, 0.0)}, 0.1)["layer"] == pytest.approx(
        float((wide / (wide + 0.1)).sum()), rel=1e-13
    )
    assert torch.equal(values, kept)
    effective_parameters({"layer": Spectrum(wide, 0.0)}, 0.1)
    assert torch.equal(wide, kept.double())


@pytest.mark.parametrize(
    ("values", "norm", "message"),
    [
        (torch.tensor([1.0, -1e-9]), 1.0, "`eigenvalues` must be finite and >= 0, got values from -"),
        (torch.tensor([1.0, math.nan]), 1.0, "`eigenvalues` must be finite"),
        (torch.tensor([1.0, math.inf]), 1.0, "`eigenvalues` must be finite"),
        (torch.ones(0), 1.0, r"one per weight, got torch.float32 \(0,\)"),
        (torch.ones(2).long(), 1.0, "must be floating point"),
        (torch.ones(2), -1.0, "`squared_norm` must be finite and >= 0, got -1.0"),
        (torch.ones(2), math.nan, "`squared_norm` must be finite"),
    ],
)
def test_wrong_spectra(values: Tensor, norm: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Spectrum(values, norm)


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        (0.0, "`prior_precision` must be a finite number > 0, got 0.0"),
        (math.nan, "got nan"),
        ({"a": 1.0, "b": 1.0, "d": 1.0}, r"missing \['c'\], unknown \['d'\]"),
        ({"a": 1.0, "b": 1.0, "c": -1.0}, r"`prior_precision\['c'\]` must be a finite number > 0"),
    ],
)
def test_wrong_precisions(precision: Precision, message: str) -> None:
    spectra = spectra_of_layers()
    with pytest.raises(ValueError, match=message):
        log_marginal_likelihood(0.0, spectra, precision)
    with pytest.raises(ValueError, match=message):
        effective_parameters(spectra, precision)
    with pytest.raises(ValueError, match=message):
        optimal_noise_std(spectra, squared_error=1.0, num_outputs=2, prior_precision=precision)


def test_wrong_numbers() -> None:
    spectra = spectra_of_layers()
    with pytest.raises(ValueError, match="at least one layer"):
        optimal_prior_precision({})
    with pytest.raises(ValueError, match="`scale` must be a finite number > 0, got 0"):
        optimal_prior_precision(spectra, scale=0.0)
    with pytest.raises(ValueError, match="`log_likelihood` must be finite"):
        log_marginal_likelihood(math.nan, spectra, 1.0)
    for bounds in ((0.0, 1.0), (2.0, 1.0), (1.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="`bounds` must be two finite numbers"):
            optimal_prior_precision(spectra, bounds=bounds)
    for wrong, message in (
        ({"squared_error": 0.0}, "grows without end"),
        ({"num_outputs": 0}, "`num_outputs` must be the number N C"),
        ({"temperature": 0.0}, "`temperature` must be a finite number > 0"),
    ):
        settings: dict[str, Any] = {"squared_error": 1.0, "num_outputs": 9, **wrong}
        with pytest.raises(ValueError, match=message):
            optimal_precision_and_noise(spectra, **settings)
        with pytest.raises(ValueError, match=message):
            optimal_noise_std(spectra, prior_precision=1.0, **settings)
