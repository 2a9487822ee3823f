r"""The Laplace approximation of the log marginal likelihood, and the prior precision and noise that maximise it.

With the weights theta* of layer l, its prior N(mu0, I / tau_l) and the eigenvalues L of its GGN, `scale` times which
is the curvature of the likelihood (scale = 1 / (temperature s^2), s the noise of a regression, else 1),

    log p(D | tau) = log p(D | theta*) - 1/2 sum_l [tau_l |theta*_l - mu0|^2 + sum_i log(1 + scale L_i / tau_l)].

In log tau it is strictly concave, so its maximum is the one root of gamma(tau) - tau |theta* - mu0|^2, where
gamma = sum_i scale L_i / (scale L_i + tau) counts the weights that the data determine. For a linear Gaussian model at
its MAP the formula is the exact evidence; elsewhere theta* and L stay as they were trained, so a tau far from the one
that training implied is an extrapolation. MacKay 1992 (Neural Computation 4(3), 415-447); Immer et al. 2021
(arXiv 2104.04975).

Every evaluation is one pass over the eigenvalues, in float64; no data is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from .analysis.spectrum import Spectrum, determined_weights, log_determinant_ratio, trace

__all__ = [
    "Precision",
    "Spectrum",
    "effective_parameters",
    "log_marginal_likelihood",
    "optimal_noise_std",
    "optimal_precision_and_noise",
    "optimal_prior_precision",
]

Precision = float | Mapping[str, float]
"""One prior precision tau for all layers, or one per layer, by name."""

Bounds = tuple[float, float]
DEFAULT_BOUNDS: Bounds = (1e-6, 1e8)

_TOLERANCE = 1e-10  # in log tau and log s^2
_MAX_STEPS = 200  # bisection alone needs 40 of them


def log_marginal_likelihood(
    log_likelihood: float, spectra: Mapping[str, Spectrum], prior_precision: Precision, *, scale: float = 1.0
) -> float:
    """log p(D | tau) in nats, by the formula above; the factors 2 pi of prior and posterior cancel.

    Args:
        log_likelihood: log p(D | theta*), the sum over the data. With a temperature T the likelihood is p^(1/T): divide
            it by T, as ``scale`` divides the curvature; this function sees only their results.
        spectra: by layer name.
        prior_precision: one tau > 0, or one per layer.
        scale: 1 / (temperature s^2), which multiplies all eigenvalues.

    Raises:
        ValueError: no layer, a precision that misses a layer or names an unknown one, or a number out of range.

    >>> import torch
    >>> spectra = {"layer": Spectrum(torch.tensor([3.0, 0.0]), squared_norm=1.0)}
    >>> log_marginal_likelihood(-10.0, spectra, 1.0)  # -10 - 1/2 - log(1 + 3) / 2
    -11.1931...
    """
    precisions = _by_layer(prior_precision, spectra)
    _check_positive(scale, "scale")
    if not math.isfinite(log_likelihood):
        raise ValueError(f"`log_likelihood` must be finite, got {log_likelihood!r}.")
    penalty = sum(
        precisions[name] * spectrum.squared_norm + log_determinant_ratio(spectrum.eigenvalues, scale / precisions[name])
        for name, spectrum in spectra.items()
    )
    return log_likelihood - 0.5 * penalty


def effective_parameters(
    spectra: Mapping[str, Spectrum], prior_precision: Precision, *, scale: float = 1.0
) -> dict[str, float]:
    """gamma of each layer: sum_i scale L_i / (scale L_i + tau), between 0 and the number of its weights.

    Raises:
        ValueError: as for :func:`log_marginal_likelihood`.

    >>> import torch
    >>> effective_parameters({"layer": Spectrum(torch.tensor([3.0, 0.0]), 1.0)}, 1.0)
    {'layer': 0.75}
    """
    precisions = _by_layer(prior_precision, spectra)
    _check_positive(scale, "scale")
    return {name: determined_weights([s.eigenvalues], scale / precisions[name])[0] for name, s in spectra.items()}


def optimal_prior_precision(
    spectra: Mapping[str, Spectrum],
    *,
    per_layer: bool = False,
    scale: float = 1.0,
    bounds: Bounds = DEFAULT_BOUNDS,
) -> Precision:
    """The maximiser of the evidence over tau in ``bounds``, to 1e-10 in log tau.

    Newton's method in log tau on log gamma(tau) - log(tau |theta|^2), which has the derivative's sign and root and a
    slope between -2 and -1, so it needs few passes from anywhere; bisection where a step would leave the bracket.

    Beyond the bounds: weights that are all at their prior mean put the optimum at infinity (the upper bound is
    returned), curvature that is zero everywhere at zero (the lower bound); with both the evidence does not depend
    on tau, and 1, or the bound next to it, is returned.

    Args:
        spectra: by layer name.
        per_layer: one tau per layer (the layers decouple) instead of one for all.
        scale: 1 / (temperature s^2).
        bounds: smallest and largest tau, 0 < smallest <= largest.

    Returns:
        A float, or with ``per_layer`` a dict by layer name.

    Raises:
        ValueError: no layer, a ``scale`` or ``bounds`` out of range.

    >>> import torch
    >>> optimal_prior_precision({"layer": Spectrum(torch.tensor([3.0, 0.0]), 0.25)})  # 3 / (3 + tau) = tau / 4
    2.2749...
    """
    _check_spectra(spectra)
    _check_positive(scale, "scale")
    return _best_precisions(spectra, per_layer, scale, _check_bounds(bounds), start=1.0)


def optimal_noise_std(
    spectra: Mapping[str, Spectrum],
    *,
    squared_error: float,
    num_outputs: int,
    prior_precision: Precision,
    temperature: float = 1.0,
) -> float:
    """The noise s that maximises a regression's evidence at given tau: s^2 = SSE / (N C - T gamma(s)).

    The evidence is strictly concave in log s^2 too, so this fixed point is unique; Newton on the logarithm of
    (SSE / s^2 + T gamma(s)) / (N C), which falls in s, in a bracket that holds it. N C - T gamma > 0 there, even where
    the layers have more weights than there are data.

    Args:
        spectra: by layer name, for unit noise.
        squared_error: SSE > 0, of the trained network on the data.
        num_outputs: N C, how many numbers were observed in all.
        prior_precision: one tau > 0, or one per layer.
        temperature: T, of the likelihood.

    Raises:
        ValueError: as for :func:`log_marginal_likelihood`; SSE = 0 has no best noise.

    >>> import torch
    >>> spectra = {"layer": Spectrum(torch.tensor([3.0, 0.0]), 0.25)}
    >>> optimal_noise_std(spectra, squared_error=4.0, num_outputs=10, prior_precision=1.0) ** 2  # 4 / (10 - gamma)
    0.4382...
    """
    precisions = _by_layer(prior_precision, spectra)
    _check_regression(squared_error, num_outputs, temperature)
    start = math.sqrt(squared_error / num_outputs)
    return _best_noise_std(spectra, precisions, squared_error, num_outputs, temperature, start)


def optimal_precision_and_noise(
    spectra: Mapping[str, Spectrum],
    *,
    squared_error: float,
    num_outputs: int,
    per_layer: bool = False,
    temperature: float = 1.0,
    bounds: Bounds = DEFAULT_BOUNDS,
) -> tuple[Precision, float]:
    """The prior precision(s) and the noise s of a regression that together maximise its evidence.

    Alternates :func:`optimal_prior_precision` and :func:`optimal_noise_std` until log s^2 moves by less than 1e-10. The
    evidence is jointly concave in log tau and log s^2, so the limit is its one maximum. Near it a round shrinks the
    error by h^2 / ((gamma + h) (SSE / (T s^2) + h)) <= 1/2, h = sum_i r_i (1 - r_i) <= gamma the spread of the shares
    r_i = scale L_i / (scale L_i + tau): far less where there are more data than determined weights.

    Args:
        spectra: by layer name, for unit noise.
        squared_error: SSE > 0, of the trained network on the data.
        num_outputs: N C, how many numbers were observed in all.
        per_layer: one tau per layer instead of one for all.
        temperature: T, of the likelihood.
        bounds: of tau.

    Returns:
        tau, as :func:`optimal_prior_precision` gives it for the scale 1 / (T s^2), and s.

    Raises:
        ValueError: as for the two functions.
    """
    _check_spectra(spectra)
    _check_regression(squared_error, num_outputs, temperature)
    bounds = _check_bounds(bounds)
    precision: Precision = 1.0
    noise_std = math.sqrt(squared_error / num_outputs)
    for _ in range(_MAX_STEPS):
        last = noise_std
        precision = _best_precisions(spectra, per_layer, 1 / (temperature * last**2), bounds, start=precision)
        noise_std = _best_noise_std(
            spectra, _by_layer(precision, spectra), squared_error, num_outputs, temperature, start=last
        )
        if abs(2 * math.log(noise_std / last)) < _TOLERANCE:
            break
    return precision, noise_std


# -------------------------------------------------------------------------------------------------------------- solving


def _best_precisions(
    spectra: Mapping[str, Spectrum], per_layer: bool, scale: float, bounds: Bounds, start: Precision
) -> Precision:
    """:func:`optimal_prior_precision` after its checks, from a guess."""
    if not per_layer:
        assert not isinstance(start, Mapping)
        return _best_precision(list(spectra.values()), scale, bounds, start)
    starts = start if isinstance(start, Mapping) else dict.fromkeys(spectra, start)
    return {name: _best_precision([spectrum], scale, bounds, starts[name]) for name, spectrum in spectra.items()}


def _best_precision(spectra: Sequence[Spectrum], scale: float, bounds: Bounds, start: float) -> float:
    """One tau for all of the given layers."""
    low, high = bounds
    eigenvalues = [spectrum.eigenvalues for spectrum in spectra]
    squared_norm = math.fsum(spectrum.squared_norm for spectrum in spectra)
    curved = any(bool(values.any()) for values in eigenvalues)
    if not curved and squared_norm == 0:
        return min(max(1.0, low), high)
    if not curved or squared_norm == 0:
        return high if curved else low

    def balance(log_precision: float) -> tuple[float, float]:
        gamma, change = determined_weights(eigenvalues, scale * math.exp(-log_precision))
        if gamma == 0:  # curvature that underflows at this precision
            return -math.inf, -1.0
        return math.log(gamma / squared_norm) - log_precision, -change / gamma - 1

    ends = {math.log(high): high, math.log(low): low}  # given back as they came
    root = _falling_root(balance, math.log(low), math.log(high), start=math.log(start))
    return ends.get(root, math.exp(root))


def _best_noise_std(
    spectra: Mapping[str, Spectrum],
    precisions: Mapping[str, float],
    squared_error: float,
    num_outputs: int,
    temperature: float,
    start: float,
) -> float:
    """:func:`optimal_noise_std` after its checks, from a guess."""
    layers = [(spectrum, temperature * precisions[name]) for name, spectrum in spectra.items()]

    def balance(log_variance: float) -> tuple[float, float]:
        precise = math.exp(-log_variance)
        pairs = [determined_weights([spectrum.eigenvalues], precise / tau) for spectrum, tau in layers]
        gamma, change = (temperature * sum(column) for column in zip(*pairs, strict=True))
        total = squared_error * precise + gamma
        return math.log(total / num_outputs), -(squared_error * precise + change) / total

    # gamma >= 0 gives the lower end, gamma <= sum L / (T tau s^2) the upper one
    most = squared_error + temperature * sum(trace(spectrum.eigenvalues) / tau for spectrum, tau in layers)
    low, high = math.log(squared_error / num_outputs), math.log(most / num_outputs)
    return math.exp(0.5 * _falling_root(balance, low, high, start=2 * math.log(start)))


def _falling_root(function: Callable[[float], tuple[float, float]], low: float, high: float, *, start: float) -> float:
    """The root in [low, high] of a strictly decreasing function that gives (value, slope); else the end next to it."""
    point, left, right = min(max(start, low), high), -math.inf, math.inf  # left, right: where its sign is known
    for _ in range(_MAX_STEPS):
        value, slope = function(point)
        if value == 0 or (value > 0 and point >= high) or (value < 0 and point <= low):
            break
        left, right = (point, right) if value > 0 else (left, point)
        target = min(max(point - value / slope, low), high)
        if not left < target < right:
            target = 0.5 * (max(left, low) + min(right, high))
        step, point = abs(target - point), target
        if step < _TOLERANCE and low < point < high:
            break
    return point


# --------------------------------------------------------------------------------------------------------------- checks


def _check_positive(value: float, name: str) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` must be finite and > 0, got {value!r}.")


def _check_spectra(spectra: Mapping[str, Spectrum]) -> None:
    if not spectra:
        raise ValueError("`spectra` must hold at least one layer, got none.")


def _check_bounds(bounds: Bounds) -> Bounds:
    low, high = bounds
    if not 0 < low <= high < math.inf:
        raise ValueError(f"`bounds` must be two finite numbers, 0 < smallest <= largest, got {bounds!r}.")
    return low, high


def _check_regression(squared_error: float, num_outputs: int, temperature: float) -> None:
    if not (math.isfinite(squared_error) and squared_error > 0):
        raise ValueError(
            f"`squared_error` must be finite and > 0, got {squared_error!r}: the evidence of an exact fit grows "
            "without end as the noise goes to 0."
        )
    if num_outputs < 1:
        raise ValueError(f"`num_outputs` must be the number N C >= 1 of observed outputs, got {num_outputs!r}.")
    _check_positive(temperature, "temperature")


def _by_layer(prior_precision: Precision, spectra: Mapping[str, Spectrum]) -> dict[str, float]:
    _check_spectra(spectra)
    if not isinstance(prior_precision, Mapping):
        _check_positive(prior_precision, "prior_precision")
        return dict.fromkeys(spectra, float(prior_precision))
    missing, unknown = spectra.keys() - prior_precision.keys(), prior_precision.keys() - spectra.keys()
    if missing or unknown:
        raise ValueError(
            "`prior_precision` by layer must name exactly the layers of the curvature: "
            f"missing {sorted(missing)}, unknown {sorted(unknown)}."
        )
    for name, precision in prior_precision.items():
        _check_positive(precision, f"prior_precision[{name!r}]")
    return {name: float(prior_precision[name]) for name in spectra}
