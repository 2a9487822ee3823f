r"""The Laplace approximation of the log marginal likelihood, and the prior precision and noise that maximise it.

With the weights theta* of layer l, its prior N(mu0, I / tau_l) and the eigenvalues L of its GGN, `scale` times which
is the curvature of the likelihood (scale = 1 / (temperature s^2), s the noise of a regression, else 1),

    log p(D | tau) = log p(D | theta*) - 1/2 sum_l [tau_l |theta*_l - mu0|^2 + sum_i log(1 + scale L_i / tau_l)].

In log tau it is strictly concave, so its maximum is the one root of gamma(tau) - tau |theta* - mu0|^2, where
gamma = sum_i scale L_i / (scale L_i + tau) counts the weights that the data determine. For a linear Gaussian model at
its MAP the formula is the exact evidence; elsewhere theta* and L stay as they were trained, so a tau far from the one
that training implied is an extrapolation. MacKay 1992 (Neural Computation 4(3), 415-447); Immer et al. 2021
(arXiv 2104.04975).

No data is needed: an evaluation is one pass over the eigenvalues, of which a large model has 10^7 to 10^8, in chunks
that are accumulated in float64, without a float64 copy of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number

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

_TOLERANCE = 1e-11  # in log tau and log s^2
_CHUNK = 2**18  # eigenvalues at a time: 2 MiB in float64, about a processor's cache


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What the evidence needs to know of one layer.

    Attributes:
        eigenvalues: L >= 0 of the layer's GGN before any scaling, of any shape: one for each weight.
        squared_norm: |theta* - mu0|^2 of the layer's weights, mu0 their prior mean.

    Raises:
        ValueError: there is no eigenvalue, or one of the numbers is negative or not finite.
    """

    eigenvalues: Tensor
    squared_norm: float

    def __post_init__(self) -> None:
        values = self.eigenvalues
        if values.numel() == 0 or not values.is_floating_point():
            raise ValueError(
                f"`eigenvalues` must be floating point, one per weight, got {values.dtype} {tuple(values.shape)}."
            )
        low, high = (float(bound) for bound in values.aminmax())  # NaN propagates
        if not (low >= 0 and math.isfinite(high)):
            raise ValueError(f"`eigenvalues` must be finite and >= 0, got values from {low} to {high}.")
        if not (math.isfinite(self.squared_norm) and self.squared_norm >= 0):
            raise ValueError(f"`squared_norm` must be finite and >= 0, got {self.squared_norm!r}.")


def log_marginal_likelihood(
    log_likelihood: float, spectra: Mapping[str, Spectrum], prior_precision: Precision, *, scale: float = 1.0
) -> float:
    """Return log p(D | tau) in nats, by the formula above; the factors 2 pi of prior and posterior cancel.

    Args:
        log_likelihood: log p(D | theta*), the sum over the data. With a temperature T the likelihood is p^(1/T): divide
            it by T, as ``scale`` divides the curvature; this function sees only their results.
        spectra: by layer name.
        prior_precision: one tau > 0, or one per layer.
        scale: 1 / (temperature s^2), which multiplies all eigenvalues.

    Raises:
        ValueError: there is no layer, a precision misses a layer or names an unknown one, or a number is out of range.

    >>> spectra = {"layer": Spectrum(torch.tensor([3.0, 0.0]), squared_norm=1.0)}
    >>> log_marginal_likelihood(-10.0, spectra, 1.0)  # -10 - 1/2 - log(1 + 3) / 2
    -11.1931...
    """
    precisions = _by_layer(prior_precision, spectra)
    check_number("scale", scale, 0.0, strict=True)
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
    """Return gamma of each layer: sum_i scale L_i / (scale L_i + tau), between 0 and the number of its weights.

    Args:
        spectra: the eigenvalues L of each layer, by its name.
        prior_precision: one tau > 0, or one per layer.
        scale: 1 / (temperature s^2), which multiplies all eigenvalues.

    Raises:
        ValueError: as of :func:`log_marginal_likelihood`.

    >>> effective_parameters({"layer": Spectrum(torch.tensor([3.0, 0.0]), 1.0)}, 1.0)
    {'layer': 0.75}
    """
    precisions = _by_layer(prior_precision, spectra)
    check_number("scale", scale, 0.0, strict=True)
    return {name: determined_weights([s.eigenvalues], scale / precisions[name]) for name, s in spectra.items()}


def optimal_prior_precision(
    spectra: Mapping[str, Spectrum],
    *,
    per_layer: bool = False,
    scale: float = 1.0,
    bounds: Bounds = DEFAULT_BOUNDS,
) -> Precision:
    """Return the maximiser of the evidence over tau in ``bounds``, to 1e-10 in log tau.

    It is the root of log gamma(tau) - log(tau |theta|^2), which has the derivative's sign and, in log tau, a slope
    between -2 and -1: one value brackets the root, so Brent's method needs few passes from anywhere.

    Beyond the bounds: weights that are all at their prior mean put the optimum at infinity (the upper bound is
    returned), curvature that is zero everywhere at zero (the lower bound); with both the evidence does not depend
    on tau, and 1, or the bound next to it, is returned.

    Args:
        spectra: by layer name; at least one layer.
        per_layer: one tau per layer (the layers decouple) instead of one for all.
        scale: 1 / (temperature s^2).
        bounds: smallest and largest tau, 0 < smallest <= largest; others are refused with a ValueError.

    Returns:
        A float, or with ``per_layer`` a dict by layer name.

    >>> optimal_prior_precision({"layer": Spectrum(torch.tensor([3.0, 0.0]), 0.25)})  # 3 / (3 + tau) = tau / 4
    2.2749...
    """
    _check_spectra(spectra, bounds, scale)
    return _best_precisions(spectra, per_layer, scale, bounds)


def optimal_noise_std(
    spectra: Mapping[str, Spectrum],
    *,
    squared_error: float,
    num_outputs: int,
    prior_precision: Precision,
    temperature: float = 1.0,
) -> float:
    """Return the noise s that maximises a regression's evidence at given tau: s^2 = SSE / (N C - T gamma(s)).

    The evidence is strictly concave in log s^2 too, so this fixed point is unique: the root of the logarithm of
    (SSE / s^2 + T gamma(s)) / (N C), which falls in s, in a bracket that holds it. N C - T gamma > 0 there, even where
    the layers have more weights than there are data.

    Args:
        spectra: by layer name, for unit noise.
        squared_error: SSE > 0, of the trained network on the data; an exact fit has no best noise (a ValueError).
        num_outputs: N C, how many numbers were observed in all.
        prior_precision: one tau > 0, or one per layer.
        temperature: T, of the likelihood.

    >>> spectra = {"layer": Spectrum(torch.tensor([3.0, 0.0]), 0.25)}
    >>> optimal_noise_std(spectra, squared_error=4.0, num_outputs=10, prior_precision=1.0) ** 2  # 4 / (10 - gamma)
    0.4382...
    """
    precisions = _by_layer(prior_precision, spectra)
    _check_regression(squared_error, num_outputs, temperature)
    return _best_noise_std(spectra, lambda _: precisions, precisions, squared_error, num_outputs, temperature)


def optimal_precision_and_noise(
    spectra: Mapping[str, Spectrum],
    *,
    squared_error: float,
    num_outputs: int,
    per_layer: bool = False,
    temperature: float = 1.0,
    bounds: Bounds = DEFAULT_BOUNDS,
) -> tuple[Precision, float]:
    """Return the prior precision(s) and the noise s of a regression that together maximise its evidence.

    The evidence is jointly concave in log tau and log s^2, so its maximum over tau is concave in log s^2, with the
    derivative that :func:`optimal_noise_std` has at the best tau for that s.

    Args:
        spectra: by layer name, for unit noise.
        squared_error: SSE > 0, of the trained network on the data.
        num_outputs: N C, how many numbers were observed in all.
        per_layer: one tau per layer instead of one for all.
        temperature: T, of the likelihood.
        bounds: of tau.

    Returns:
        tau, as :func:`optimal_prior_precision` gives it for the scale 1 / (T s^2), and s.
    """
    _check_spectra(spectra, bounds)
    _check_regression(squared_error, num_outputs, temperature)

    def best_at(log_variance: float) -> Precision:
        return _best_precisions(spectra, per_layer, math.exp(-log_variance) / temperature, bounds)

    smallest = dict.fromkeys(spectra, bounds[0])
    noise_std = _best_noise_std(spectra, best_at, smallest, squared_error, num_outputs, temperature)
    return best_at(2 * math.log(noise_std)), noise_std


# -- solving ----------------------------------------------------------------------------------------------------------


def _best_precisions(spectra: Mapping[str, Spectrum], per_layer: bool, scale: float, bounds: Bounds) -> Precision:
    """`optimal_prior_precision` after its checks."""
    if per_layer:
        return {name: _best_precision([spectrum], scale, bounds) for name, spectrum in spectra.items()}
    return _best_precision(list(spectra.values()), scale, bounds)


def _best_precision(spectra: Sequence[Spectrum], scale: float, bounds: Bounds) -> float:
    """One tau for all of the given layers."""
    low, high = bounds
    eigenvalues = [spectrum.eigenvalues for spectrum in spectra]
    squared_norm = math.fsum(spectrum.squared_norm for spectrum in spectra)
    curved = any(bool(values.any()) for values in eigenvalues)
    if not curved or squared_norm == 0:
        return high if curved else low if squared_norm else min(max(1.0, low), high)

    @cache
    def balance(log_precision: float) -> float:
        gamma = determined_weights(eigenvalues, scale * math.exp(-log_precision))
        # curvature may underflow at this precision
        return math.log(gamma / squared_norm) - log_precision if gamma else -math.inf

    ends = {math.log(low): low, math.log(high): high}  # given back as they came
    start = min(max(0.0, math.log(low)), math.log(high))
    value = balance(start)
    bracket = sorted(min(max(start + value / slope, math.log(low)), math.log(high)) for slope in (1, 2))
    root = _falling_root(balance, *(bracket if value > -math.inf else (math.log(low), start)))
    return ends.get(root, math.exp(root))


def _best_noise_std(
    spectra: Mapping[str, Spectrum],
    precision_at: Callable[[float], Precision],
    smallest: Mapping[str, float],
    squared_error: float,
    num_outputs: int,
    temperature: float,
) -> float:
    """The noise whose prior precision is ``precision_at(log s^2)``, of which ``smallest`` are lower bounds."""

    @cache
    def balance(log_variance: float) -> float:
        precise, precisions = math.exp(-log_variance), _by_layer(precision_at(log_variance), spectra)
        gammas = [
            determined_weights([s.eigenvalues], precise / (temperature * precisions[n])) for n, s in spectra.items()
        ]
        return math.log((squared_error * precise + temperature * sum(gammas)) / num_outputs)

    # gamma >= 0 gives the lower end, gamma <= sum L / (T tau s^2) the upper one
    most = squared_error + sum(trace(spectrum.eigenvalues) / smallest[name] for name, spectrum in spectra.items())
    root = _falling_root(balance, math.log(squared_error / num_outputs), math.log(most / num_outputs))
    return math.exp(0.5 * root)


def _falling_root(function: Callable[[float], float], low: float, high: float) -> float:
    """The root in [low, high] of a strictly decreasing function that remembers its values; else the end next to it."""
    from scipy.optimize import brentq  # here: importing it takes longer than most fits of a posterior

    if function(low) <= 0:
        return low
    if function(high) >= 0:
        return high
    return float(brentq(function, low, high, xtol=_TOLERANCE))


# -- sums over eigenvalues --------------------------------------------------------------------------------------------


def trace(eigenvalues: Tensor) -> float:
    """Return sum_i L_i."""
    return math.fsum(float(chunk.sum()) for chunk in _chunks(eigenvalues))


def log_determinant_ratio(eigenvalues: Tensor, ratio: float) -> float:
    """Return sum_i log(1 + ratio L_i), which is log det P - p log tau without its cancellation."""
    return math.fsum(float(chunk.mul_(ratio).log1p_().sum()) for chunk in _chunks(eigenvalues))


def determined_weights(eigenvalues: Iterable[Tensor], ratio: float) -> float:
    """Return gamma = sum_i ratio L_i / (1 + ratio L_i), of all the tensors together."""
    chunks = (chunk for values in eigenvalues for chunk in _chunks(values))
    return math.fsum(float(chunk.div_(chunk + 1 / ratio).sum()) for chunk in chunks)


def _chunks(eigenvalues: Tensor) -> Iterator[Tensor]:
    """New float64 tensors; the whole is never copied."""
    for chunk in torch.split(eigenvalues.detach().reshape(-1), _CHUNK):
        yield chunk.to(torch.float64, copy=True)


# -- checks -----------------------------------------------------------------------------------------------------------


def checked_precision(prior_precision: Any, names: Collection[str]) -> float | dict[str, float]:
    """Return one tau, or one for each of the layers ``names``.

    Raises:
        ValueError: a tau is no finite number > 0, or the layers are not exactly these.
    """
    if not isinstance(prior_precision, Mapping):
        check_number("prior_precision", prior_precision, 0.0, strict=True)
        return float(prior_precision)
    missing, unknown = sorted(set(names) - set(prior_precision)), sorted(set(prior_precision) - set(names))
    if missing or unknown:
        raise ValueError(
            f"`prior_precision` by layer must name each of the {len(names)} layers once: "
            f"missing {missing[:3]}, unknown {unknown[:3]}."
        )
    for name in names:
        check_number(f"prior_precision[{name!r}]", prior_precision[name], 0.0, strict=True)
    return {name: float(prior_precision[name]) for name in names}


def _by_layer(prior_precision: Precision, spectra: Mapping[str, Spectrum]) -> dict[str, float]:
    _check_spectra(spectra)
    checked = checked_precision(prior_precision, spectra)
    return checked if isinstance(checked, dict) else dict.fromkeys(spectra, checked)


def _check_spectra(spectra: Mapping[str, Spectrum], bounds: Bounds = DEFAULT_BOUNDS, scale: float = 1.0) -> None:
    if not spectra:
        raise ValueError("`spectra` must hold at least one layer, got none.")
    if not 0 < bounds[0] <= bounds[1] < math.inf:
        raise ValueError(f"`bounds` must be two finite numbers, 0 < smallest <= largest, got {bounds!r}.")
    check_number("scale", scale, 0.0, strict=True)


def _check_regression(squared_error: float, num_outputs: int, temperature: float) -> None:
    if not (math.isfinite(squared_error) and squared_error > 0):
        raise ValueError(
            f"`squared_error` must be finite and > 0, got {squared_error!r}: the evidence of an exact fit grows "
            "without end as the noise goes to 0."
        )
    if num_outputs < 1:
        raise ValueError(f"`num_outputs` must be the number N C >= 1 of observed outputs, got {num_outputs!r}.")
    check_number("temperature", temperature, 0.0, strict=True)
