"""How many weights does a network need? A figure of signal-to-noise ratios, and of accuracy as weights go."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .plots import GREY, METHOD_COLOURS, METHOD_LINES, panel_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Curve", "pruning_figure"]

Curve = Sequence[Mapping[str, Any]]
"""By share of the weights that is removed: "share" and "accuracy", both in [0, 1]."""

_DECIBELS = (-60, 45)  # MOPED's least delta is 0.01: 40 dB
_MARKED = 75.0  # % of the weights: the line of figure 4 of Blundell et al. 2015


def pruning_figure(
    decibels: Mapping[str, NDArray[Any]], curves: Mapping[str, Curve], *, title: str, caption: str = ""
) -> "Figure":
    """Density and distribution of the ratios, and accuracy against the share of removed weights.

    Args:
        decibels: by posterior, 20 log10(|mu| / sigma) of every weight that may be removed.
        curves: by method, the first without noise.
        title: heading of the page.
        caption: foot of the page.

    Returns:
        The figure, for `save_figure`.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no display needed

    figure = Figure(figsize=(16, 5.2), layout="constrained")
    density, distribution, accuracy = figure.subplots(1, 3)
    for index, (name, values) in enumerate(decibels.items(), start=1):
        clipped = np.sort(values.clip(*_DECIBELS))
        weights = np.full(len(clipped), 100 / len(clipped))
        shown: dict[str, Any] = {"label": name, "linewidth": 1.5, **_style(index)}
        density.hist(clipped, _DECIBELS[1] - _DECIBELS[0], range=_DECIBELS, weights=weights, histtype="step", **shown)
        step = max(1, len(clipped) // 2000)
        distribution.plot(clipped[::step], np.cumsum(weights)[::step], **shown)
    for axes in (density, distribution):
        axes.set(xlim=_DECIBELS, xlabel="signal-to-noise ratio |μ| / σ, in dB (20 log10)")
    density.set(ylabel="% of the weights in each dB", yscale="log", ylim=(0.01, 100))
    density.yaxis.set_major_formatter("{x:g}")
    panel_title(density, "How much of it is signal?", "At 0 dB the mean is as large as σ. At the left edge: all below.")
    distribution.axhline(_MARKED, color=GREY, linestyle=":", linewidth=1, label=f"{_MARKED:g} % of the weights")
    distribution.set(ylabel="% of the weights below", ylim=(0, 100))
    panel_title(distribution, "What does a threshold remove?", "Read upwards: the share of weights left of a ratio.")
    _accuracy(accuracy, curves)
    for axes in (density, distribution, accuracy):
        axes.legend(fontsize=8, loc="lower left" if axes is accuracy else "upper left")
    figure.suptitle(title, fontsize=14)
    figure.supxlabel(caption, fontsize=9.5, color=GREY)
    return figure


def _accuracy(axes: "Axes", curves: Mapping[str, Curve]) -> None:
    """Shares at equal distances: what matters happens between 90 and 98 %."""
    shares: list[float] = [point["share"] for point in next(iter(curves.values()))]
    places = range(len(shares))
    for index, (name, curve) in enumerate(curves.items()):
        axes.plot(places, [100 * p["accuracy"] for p in curve], "o", markersize=4, label=name, **_style(index))
    axes.set_xticks(places, [f"{100 * share:g}" for share in shares])
    axes.set(xlabel="% of the weights removed (not to scale)", ylabel="accuracy on test images, %")
    axes.set(ylim=(-30, 104), yticks=range(0, 101, 20))  # room for the legend
    panel_title(axes, "Which weights does it need?", "Higher is better; nothing is trained after the removal.")


def _style(index: int) -> dict[str, Any]:
    """Of network `index`, as in a comparison whose second method is the first network's temperature."""
    place = index and index + 1
    return {"color": METHOD_COLOURS[place], "linestyle": METHOD_LINES[place]}
