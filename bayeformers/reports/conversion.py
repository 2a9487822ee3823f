"""What a conversion costs and buys: what is stored, where training begins and goes, how many weights are needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from torch import nn

from ..metrics import negative_log_likelihood
from .plots import (
    GREY,
    METHOD_COLOURS,
    METHOD_LINES,
    legend_below,
    page,
    panel_title,
    reliability_diagram,
    risk_coverage,
)
from .report import ClassPredictions, format_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Sizes", "pruning_figure", "size_figure", "size_table", "start_figure"]

_DECIBELS = (-60, 45)  # MOPED's least delta is 0.01: 40 dB
_MARKED = 75.0  # % of the weights: the line of figure 4 of Blundell et al. 2015


@dataclass(frozen=True)
class Sizes:
    """What a method keeps, counted from its tensors and its files.

    Attributes:
        weights: parameters of the network; of a Bayesian one, the means.
        scales: parameters that set the standard deviations.
        other: further numbers in the files: a prior's centres, curvature, running statistics.
        bytes: of the safetensors files.
    """

    weights: int
    scales: int
    other: int
    bytes: int

    @classmethod
    def of(cls, model: nn.Module, folder: str | PathLike[str]) -> "Sizes":
        """The sizes of a model that was saved to `folder`."""
        counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
        scales = sum(count for name, count in counts.items() if name.endswith("_rho"))
        weights, stored = sum(counts.values()) - scales, 0
        files = sorted(Path(folder).glob("*.safetensors"))
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                stored += sum(int(np.prod(tensors.get_slice(name).get_shape())) for name in tensors.keys())  # noqa: SIM118
        return cls(weights, scales, stored - weights - scales, sum(file.stat().st_size for file in files))


def size_table(sizes: Mapping[str, Sizes], milliseconds: Mapping[str, float]) -> str:
    """Numbers and bytes by method, and milliseconds for an input."""
    columns = {"weights": "weights", "scales": "scales", "other": "other numbers", "bytes": "bytes of files"}
    rows = {
        method: {
            **{column: f"{getattr(of, name):,}" for name, column in columns.items()},
            "ms per image": f"{milliseconds[method]:.3f}",
        }
        for method, of in sizes.items()
    }
    return format_table(rows, corner="size and speed")


def size_figure(
    methods: Mapping[str, ClassPredictions], labels: NDArray[Any], sizes: Mapping[str, Sizes], *, title: str
) -> "Figure":
    """Draw calibration, selective prediction, and likelihood against the size of the files.

    Args:
        methods: predictions of each on one test set.
        labels: of that set, (N,).
        sizes: by method.
        title: heading of the page.

    Returns:
        The figure, for `save_figure`.
    """
    from matplotlib.ticker import NullLocator

    figure, (first, second, third) = page(title, 1, 3, figsize=(16, 6.2))
    reliability_diagram(first, {name: one.probs for name, one in methods.items()}, labels)
    confidence = {name: one.confidence for name, one in methods.items()}
    errors = {name: one.errors(labels) for name, one in methods.items()}
    risk_coverage(second, confidence, errors)
    second.set_xlim(left=min(_errorless(confidence[name], errors[name]) for name in methods) - 5)
    style: dict[str, Any] = {"fillstyle": "none", "markersize": 10, "markeredgewidth": 2, "linestyle": "none"}
    for name, marker, colour in zip(methods, "oDs^v", METHOD_COLOURS, strict=False):  # hollow: two may coincide
        nll = negative_log_likelihood(methods[name].probs, labels)
        third.plot(sizes[name].bytes / 1000, nll, marker=marker, color=colour, label=name, **style)
    third.set(xscale="log", xlabel="kB of the files", ylabel="NLL of the test images, in nats")
    ticks = sorted({of.bytes / 1000 for of in sizes.values()})
    third.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    third.xaxis.set_minor_locator(NullLocator())
    third.margins(x=0.3, y=0.3)
    panel_title(third, "What does it weigh, and what does that buy?", "Low and left is good.")
    legend_below(third)
    return figure


def _errorless(confidence: NDArray[Any], errors: NDArray[Any]) -> float:
    """% of the inputs, surest first, before the first wrong one; at least 5."""
    wrong = errors[np.argsort(-confidence, kind="stable")] > 0
    return max(5.0, 100 * float(wrong.argmax() if wrong.any() else len(wrong) - 1) / len(wrong))


def start_figure(
    curves: Mapping[str, Sequence[float]], point_nll: float, accuracies: Mapping[str, float], count: int, *, title: str
) -> "Figure":
    """Draw validation NLL by epoch from the converted network on, and test accuracies against the pretrained one's.

    Args:
        curves: by method, the NLL at the start and after each epoch.
        point_nll: of the pretrained network.
        accuracies: on the test inputs by method, in [0, 1], the pretrained network's first.
        count: number of test inputs, which sets the standard error.
        title: heading of the page.

    Returns:
        The figure, for `save_figure`.
    """
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = page(title, 1, 2, figsize=(13, 5))
    left.axhline(point_nll, color=METHOD_COLOURS[5], linestyle=":", label=f"pretrained, no noise ({point_nll:.4f})")
    for (name, values), colour, line in zip(curves.items(), METHOD_COLOURS, METHOD_LINES, strict=False):
        left.plot(range(len(values)), values, "o", ms=4, label=name, color=colour, linestyle=line)
        best = 1 + int(np.argmin(values[1:]))
        left.plot(best, values[best], "o", markersize=11, fillstyle="none", color=colour)
    left.set(xlabel="epoch of the ELBO (0: converted, not yet trained)", ylabel="NLL of the validation images, in nats")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel_title(left, "Does training the noise help?", "Averaged over draws; a ring marks the epoch that is kept.")
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    _accuracies(right, accuracies, count)
    return figure


def _accuracies(axes: "Axes", accuracies: Mapping[str, float], count: int) -> None:
    names, values = list(accuracies), 100 * np.array(list(accuracies.values()))
    error = np.sqrt(values * (100 - values) / count)
    rows = np.arange(len(names))[::-1]
    text: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 9}
    text["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.6, "pad": 0.5}  # above the dashed line
    axes.axvspan(values[0] - 0.5, values[0] + 0.5, color=METHOD_COLOURS[2], alpha=0.15, label="pretrained ± 0.5 points")
    axes.axvline(values[0], color=METHOD_COLOURS[2], linestyle="--", linewidth=1)
    axes.errorbar(values, rows, xerr=error, fmt="o", color=METHOD_COLOURS[0], capsize=3, label="± 1 standard error")
    for row, value in zip(rows, values, strict=True):
        axes.annotate(f"{value:.2f}", (value, row), xytext=(0, 8), **text)
    axes.set(yticks=rows, yticklabels=names, ylim=(-1.4, len(names) - 0.4))  # below them, room for the legend
    axes.set_xlabel(f"accuracy on {count:,} test images, %")
    panel_title(axes, "Does it start where training ended?", "The conversion must not lose what the network knew.")
    axes.legend(fontsize=8, loc="lower left")


def pruning_figure(
    decibels: Mapping[str, NDArray[Any]],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    title: str,
    caption: str = "",
) -> "Figure":
    """Draw density and distribution of signal-to-noise ratios, and accuracy against the share of removed weights.

    Args:
        decibels: by posterior, 20 log10(|mu| / sigma) of every weight that may be removed.
        curves: by method, the first without noise: of each removed share its "share" and "accuracy", both in [0, 1].
        title: heading of the page.
        caption: foot of the page.

    Returns:
        The figure, for `save_figure`.
    """
    figure, panels = page(title, 1, 3, figsize=(16, 5.2), caption=caption)
    density, distribution, accuracy = panels
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
    shares = [point["share"] for point in next(iter(curves.values()))]
    for index, (name, curve) in enumerate(curves.items()):
        percent = [100 * point["accuracy"] for point in curve]
        accuracy.plot(range(len(percent)), percent, "o", markersize=4, label=name, **_style(index))
    # at equal distances: what matters happens between 90 and 98 %
    accuracy.set_xticks(range(len(shares)), [f"{100 * share:g}" for share in shares])
    accuracy.set(xlabel="% of the weights removed (not to scale)", ylabel="accuracy on test images, %")
    accuracy.set(ylim=(-30, 104), yticks=range(0, 101, 20))  # room for the legend
    panel_title(accuracy, "Which weights does it need?", "Higher is better; nothing is trained after the removal.")
    for axes in panels:
        axes.legend(fontsize=8, loc="lower left" if axes is accuracy else "upper left")
    return figure


def _style(index: int) -> dict[str, Any]:
    """Of network `index`, as in a comparison whose second method is the first network's temperature."""
    place = index and index + 1
    return {"color": METHOD_COLOURS[place], "linestyle": METHOD_LINES[place]}
