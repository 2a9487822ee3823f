"""Bands of a regression on one input: mean, noise and doubt of several methods as numbers, as CSV and as a picture."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..predictive import Predictive
from .comparison import csv_prefix, write_rows
from .plots import GREY, METHOD_COLOURS, page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BAND", "Bands", "bands_figure", "write_bands"]

Array = NDArray[np.float64]

BAND = 1.959964
"""Standard deviations of a central 95 % interval of a Gaussian."""
_BLUE, _ORANGE, _RED = METHOD_COLOURS[0], METHOD_COLOURS[1], METHOD_COLOURS[4]


@dataclass(frozen=True)
class Bands:
    """One method at N inputs, in the data's units.

    Attributes:
        mean: of a new observation, (N,).
        epistemic: standard deviation of the mean function, (N,).
        aleatoric: standard deviation of the noise, (N,).
        log_prob: log density of the observations, (N,), where there are any.
        functions: some drawn mean functions, (S, N).
    """

    mean: Array
    epistemic: Array
    aleatoric: Array
    log_prob: Array | None = None
    functions: Array | None = None

    @classmethod
    def from_predictive(
        cls,
        predictive: Predictive,
        *,
        targets: Tensor | None = None,
        functions: Tensor | None = None,
        centre: float = 0.0,
        scale: float = 1.0,
    ) -> "Bands":
        """Return the bands, in the data's units, of a model of standardised targets: y = centre + scale * target.

        Args:
            predictive: of a regression, in standardised units.
            targets: standardised observations, (N,).
            functions: drawn mean functions, standardised, (S, N).
            centre: of the data.
            scale: of the data.
        """
        log_prob = None if targets is None else _array(predictive.log_prob(targets)) - np.log(scale)
        return cls(
            scale * _array(predictive.mean) + centre,
            scale * np.sqrt(_array(predictive.epistemic_variance)),
            scale * np.sqrt(_array(predictive.aleatoric_variance)),
            log_prob,
            None if functions is None else scale * _array(functions) + centre,
        )

    @classmethod
    def of_truth(cls, mean: Array, noise_std: Array, y: Array) -> "Bands":
        """Return what a method says that knows the truth, N(mean, noise_std^2).

        Args:
            mean: the true mean, (N,).
            noise_std: the true noise's standard deviation, (N,).
            y: the observations, (N,).
        """
        log_prob = -0.5 * (((y - mean) / noise_std) ** 2 + np.log(2 * np.pi * noise_std**2))
        return cls(mean, np.zeros_like(mean), noise_std, log_prob)

    @property
    def total(self) -> Array:
        """Standard deviation of a new observation."""
        return np.sqrt(self.epistemic**2 + self.aleatoric**2)

    def __getitem__(self, index: NDArray[Any]) -> "Bands":
        """The bands at some inputs, by a mask or by positions, without the functions."""
        log_prob = None if self.log_prob is None else self.log_prob[index]
        return Bands(self.mean[index], self.epistemic[index], self.aleatoric[index], log_prob)

    def covers(self, y: Array) -> Array:
        """1 where y lies in the 95 % band mean -+ 1.96 total, else 0; (N,)."""
        return (np.abs(y - self.mean) <= BAND * self.total).astype(np.float64)

    def report(
        self, y: Array, groups: NDArray[Any], *, noise_std: Array | None = None, reference: "Bands | None" = None
    ) -> dict[str, dict[str, float]]:
        """Return ``nll`` (if ``log_prob`` is known), ``coverage`` of the 95 % band, ``rmse`` and root mean variances.

        Args:
            y: the observations, (N,).
            groups: the name of the group that each belongs to, (N,); each is scored, in order of appearance.
            noise_std: the true noise, (N,), for ``noise_error``: the mean of |aleatoric / true noise - 1|.
            reference: bands of the right posterior at the same inputs, for ``epistemic_ratio`` (of root mean epistemic
                variances) and ``mean_gap`` (root mean square difference of the means).
        """
        reports = {}
        for name in dict.fromkeys(groups.tolist()):
            mask = groups == name
            bands = self[mask]
            report = {} if bands.log_prob is None else {"nll": -float(bands.log_prob.mean())}
            report |= {"coverage": float(bands.covers(y[mask]).mean()), "rmse": _rms(bands.mean - y[mask])}
            report |= {"epistemic_std": _rms(bands.epistemic), "aleatoric_std": _rms(bands.aleatoric)}
            if noise_std is not None:
                report["noise_error"] = float(np.mean(np.abs(bands.aleatoric / noise_std[mask] - 1)))
            if reference is not None:
                report["epistemic_ratio"] = report["epistemic_std"] / _rms(reference.epistemic[mask])
                report["mean_gap"] = _rms(bands.mean - reference.mean[mask])
            reports[name] = report
        return reports


def _array(values: Tensor) -> Array:
    array: Array = values.detach().cpu().double().numpy()
    return array


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2)))


def write_bands(path: str | Path, x: Array, methods: Mapping[str, Bands]) -> None:
    """Write the bands of every method along the axis as CSV: a row for each input, three columns for each method.

    Args:
        path: of the file.
        x: the inputs along the axis, (N,).
        methods: each method's bands there.
    """
    columns: dict[str, Array] = {"x": x}
    for name, bands in methods.items():
        parts = {"mean": bands.mean, "epistemic_std": bands.epistemic, "aleatoric_std": bands.aleatoric}
        columns |= {f"{csv_prefix(name)}:{part}": values for part, values in parts.items()}
    write_rows(path, ({key: f"{values[row]:.6g}" for key, values in columns.items()} for row in range(len(x))))


def bands_figure(
    x: Array,
    methods: Mapping[str, Bands],
    points: tuple[Array, Array],
    *,
    title: str,
    reports: Mapping[str, Mapping[str, Mapping[str, float]]],
    truth: tuple[Array, Array] | None = None,
    observations: Array | None = None,
    columns: int = 3,
) -> "Figure":
    """Draw a panel for each method, all on the same axes.

    Args:
        x: the inputs along the axis, (N,).
        methods: each method's bands there.
        points: inputs and observations of the training set.
        title: heading of the page.
        reports: by method `Bands.report` on groups of test points, whose coverage stands above the panel.
        truth: the true mean and noise at x, (N,) each.
        observations: what the vertical axis must show, with a margin, by default those of the training set; bands that
            leave it are cut.
        columns: panels in a row.

    Returns:
        The figure, for `save_figure`.
    """
    rows = -(-len(methods) // columns)
    figure, axes = page(title, rows, columns, figsize=(13, 0.9 + 3.2 * rows), sharex=True, sharey=True)
    for panel, (name, bands) in zip(axes, methods.items(), strict=False):
        _panel(panel, x, bands, points, truth)
        panel.set_title(f"{name}\n", fontsize=11, fontweight="bold", loc="left")
        covered = ", ".join(f"{100 * report['coverage']:.0f} % {group}" for group, report in reports[name].items())
        panel.text(0, 1.02, f"covers {covered}", transform=panel.transAxes, fontsize=8.5, color=GREY)
    for panel in axes[len(methods) :]:
        panel.set_visible(False)
    low, high = np.quantile(points[1] if observations is None else observations, [0.002, 0.998])
    margin = 0.4 * (high - low)
    axes[0].set(xlim=(x[0], x[-1]), ylim=(low - margin, high + margin))
    handles, labels = axes[min(1, len(methods) - 1)].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    return figure


def _panel(
    axes: "Axes", x: Array, bands: Bands, points: tuple[Array, Array], truth: tuple[Array, Array] | None
) -> None:
    shades = (
        (bands.total, _BLUE, 0.18, "95 % band of a new point"),
        (bands.epistemic, _ORANGE, 0.45, "95 % band of the curve (epistemic)"),
    )
    for std, colour, alpha, label in shades:
        low, high = bands.mean - BAND * std, bands.mean + BAND * std
        axes.fill_between(x, low, high, color=colour, alpha=alpha, linewidth=0, label=label)
    for index, line in enumerate(() if bands.functions is None else bands.functions):
        axes.plot(x, line, color="black", linewidth=0.5, alpha=0.4, label=None if index else "drawn functions")
    axes.plot(x, bands.mean, color=_BLUE, linewidth=1.5, label="mean")
    axes.plot(*points, ".", color=GREY, markersize=2.5, alpha=0.7, label="training points")
    if truth is not None:
        mean, width = truth[0], BAND * truth[1]
        axes.plot(x, mean, color=_RED, linestyle="--", linewidth=1.2, label="truth, and its 95 %")
        for edge in (mean - width, mean + width):
            axes.plot(x, edge, color=_RED, linestyle=":", linewidth=1)
    axes.grid(alpha=0.25)
