"""What a run leaves behind: two tables, and two pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bayeformers.reports import (
    GREY,
    METHOD_COLOURS,
    METHOD_LINES,
    ClassPredictions,
    Row,
    format_table,
    reliability_diagram,
    risk_coverage,
)
from examples.images.pictures import heading
from examples.mlp.removal import Curve

FIGURES = ("uncertainty.png", "pruning.png")
DECIBELS = (-60, 45)  # MOPED's least delta is 0.01: 40 dB
MARKED = 75.0  # % of the weights: the line of figure 4 of Blundell et al. 2015


def scores_table(methods: Mapping[str, Row]) -> str:
    """Accuracy, likelihood, calibration and selective prediction by method."""
    columns = ("accuracy", "nll", "ece", "aurc", "epistemic")
    rows = {name: {column: row[column] for column in columns} for name, row in methods.items()}
    return format_table(rows, corner="test images", digits=4)


def removal_table(curves: Mapping[str, Curve]) -> str:
    """Accuracy by share of the weights that is removed: table 2 of Blundell et al. 2015."""
    rows = {
        name: {f"{100 * point['share']:g} %": 100 * point["accuracy"] for point in curve}
        for name, curve in curves.items()
    }
    return format_table(rows, corner="accuracy in %, weights removed", digits=2)


def uncertainty_figure(methods: Mapping[str, ClassPredictions], labels: np.ndarray, *, title: str) -> Figure:
    """Calibration and selective prediction of every method."""
    figure = Figure(figsize=(12, 5.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    reliability_diagram(left, {name: one.probs for name, one in methods.items()}, labels)
    confidence = {name: one.confidence for name, one in methods.items()}
    risk_coverage(right, confidence, {name: one.errors(labels) for name, one in methods.items()})
    figure.suptitle(title, fontsize=14)
    return figure


def pruning_figure(
    ratios: Mapping[str, np.ndarray], curves: Mapping[str, Curve], *, title: str, caption: str
) -> Figure:
    """Density and distribution of the ratios in dB, and accuracy against the share of removed weights.

    Args:
        ratios: by posterior, of every weight that may be removed.
        curves: by method, the first without noise.
        title: heading of the page.
        caption: foot of the page.
    """
    figure = Figure(figsize=(16, 5.2), layout="constrained")
    density, distribution, accuracy = figure.subplots(1, 3)
    for index, (name, values) in enumerate(ratios.items(), start=1):
        clipped = np.sort(values.clip(*DECIBELS))
        weights = np.full(len(clipped), 100 / len(clipped))
        shown: dict[str, Any] = {"label": name, "linewidth": 1.5, **_style(index)}
        density.hist(clipped, DECIBELS[1] - DECIBELS[0], range=DECIBELS, weights=weights, histtype="step", **shown)
        step = max(1, len(clipped) // 2000)
        distribution.plot(clipped[::step], np.cumsum(weights)[::step], **shown)
    for axes in (density, distribution):
        axes.set(xlim=DECIBELS, xlabel="signal-to-noise ratio |μ| / σ, in dB (20 log10)")
    density.set(ylabel="% of the weights in each dB", yscale="log", ylim=(0.01, 100))
    density.yaxis.set_major_formatter("{x:g}")
    heading(density, "How much of it is signal?", "At 0 dB the mean is as large as σ. At the left edge: all below.")
    distribution.axhline(MARKED, color=GREY, linestyle=":", linewidth=1, label=f"{MARKED:g} % of the weights")
    distribution.set(ylabel="% of the weights below", ylim=(0, 100))
    heading(distribution, "What does a threshold remove?", "Read upwards: the share of weights left of a ratio.")
    _accuracy(accuracy, curves)
    for axes in (density, distribution, accuracy):
        axes.legend(fontsize=8, loc="lower left" if axes is accuracy else "upper left")
    figure.suptitle(title, fontsize=14)
    figure.supxlabel(caption, fontsize=9.5, color=GREY)
    return figure


def _accuracy(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """Shares at equal distances: what matters happens between 90 and 98 %."""
    shares: Sequence[float] = [point["share"] for point in next(iter(curves.values()))]
    places = range(len(shares))
    for index, (name, curve) in enumerate(curves.items()):
        axes.plot(places, [100 * p["accuracy"] for p in curve], "o", markersize=4, label=name, **_style(index))
    axes.set_xticks(places, [f"{100 * share:g}" for share in shares])
    axes.set(xlabel="% of the weights removed (not to scale)", ylabel="accuracy on test images, %")
    axes.set(ylim=(-30, 104), yticks=range(0, 101, 20))  # room for the legend
    heading(axes, "Which weights does it need?", "Higher is better; nothing is trained after the removal.")


def _style(index: int) -> dict[str, str]:
    """Of network `index`, as in the other picture, where the second method is the first network's temperature."""
    place = index and index + 1
    return {"color": METHOD_COLOURS[place], "linestyle": METHOD_LINES[place]}
