"""What each method says on the test points and along the axis, in the data's units, and the numbers that judge it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from examples.curves.data import Array, CurveData, Points, Scaling, Truth
from examples.curves.fitting import Fitted

BAND = 1.959964
"""Standard deviations of a central 95 % interval of a Gaussian."""
GRID_POINTS = 241


@dataclass(frozen=True)
class Bands:
    """One method at some x: mean, the two standard deviations, log p(y) where there is a y, and drawn functions."""

    mean: Array
    epistemic: Array
    aleatoric: Array
    log_prob: Array | None = None
    functions: Array | None = None

    @property
    def total(self) -> Array:
        """Standard deviation of a new observation."""
        return np.sqrt(self.epistemic**2 + self.aleatoric**2)

    def covers(self, y: Array) -> Array:
        """1 where y lies in the 95 % band mean -+ 1.96 total."""
        return (np.abs(y - self.mean) <= BAND * self.total).astype(np.float64)


def bands(fitted: Fitted, scaling: Scaling, x: Array, y: Array | None = None, *, functions: bool = False) -> Bands:
    """What ``fitted`` says at ``x``, in the data's units."""
    inputs = torch.as_tensor(scaling.x(x), dtype=torch.float32)
    predictive, size = fitted.predict(inputs), scaling.y_scale
    log_prob = None
    if y is not None:
        log_prob = _array(predictive.log_prob(torch.as_tensor(scaling.y(y), dtype=torch.float32))) - np.log(size)
    lines = None
    if functions and fitted.functions is not None:
        lines = size * _array(fitted.functions(inputs)) + scaling.y_centre
    return Bands(
        size * _array(predictive.mean) + scaling.y_centre,
        size * np.sqrt(_array(predictive.epistemic_variance)),
        size * np.sqrt(_array(predictive.aleatoric_variance)),
        log_prob,
        lines,
    )


def _array(values: Tensor) -> Array:
    found: Array = values.detach().cpu().double().numpy()
    return found


def region_report(found: Bands, points: Points, truth: Truth | None, reference: Bands | None) -> dict[str, float]:
    """Scores on some test points.

    ``coverage`` of the 95 % band; ``noise_error`` mean |aleatoric / true noise - 1|; ``epistemic_ratio`` and
    ``mean_gap`` against the reference: the ratio of root mean epistemic variances, and the root mean square of the
    difference of the means.
    """
    assert found.log_prob is not None  # `bands` had y
    report = {
        "nll": -float(found.log_prob.mean()),
        "coverage": float(found.covers(points.y).mean()),
        "rmse": _rms(found.mean - points.y),
        "epistemic_std": _rms(found.epistemic),
        "aleatoric_std": _rms(found.aleatoric),
    }
    if truth is not None:
        report["noise_error"] = float(np.mean(np.abs(found.aleatoric / truth.noise_std(points.x) - 1)))
    if reference is not None:
        report["epistemic_ratio"] = report["epistemic_std"] / _rms(reference.epistemic)
        report["mean_gap"] = _rms(found.mean - reference.mean)
    return report


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2)))


def method_report(found: Bands, data: CurveData, reference: Bands | None) -> dict[str, dict[str, float]]:
    """Region -> `region_report`, of bands at the test points."""
    report = {}
    for region in dict.fromkeys(data.test.region.tolist()):
        mask = data.test.region == region
        inside = Points(data.test.x[mask], data.test.y[mask], data.test.region[mask])
        compared = None if reference is None else _masked(reference, mask)
        report[region] = region_report(_masked(found, mask), inside, data.truth, compared)
    return report


def truth_bands(data: CurveData) -> Bands | None:
    """What a method that knows the truth would say at the test points."""
    if data.truth is None:
        return None
    x, y = data.test.x, data.test.y
    mean, noise_std = data.truth.mean(x), data.truth.noise_std(x)
    log_prob = -0.5 * (((y - mean) / noise_std) ** 2 + np.log(2 * np.pi * noise_std**2))
    return Bands(mean, np.zeros_like(x), noise_std, log_prob)


def _masked(found: Bands, mask: Array) -> Bands:
    log_prob = None if found.log_prob is None else found.log_prob[mask]
    return Bands(found.mean[mask], found.epistemic[mask], found.aleatoric[mask], log_prob)
