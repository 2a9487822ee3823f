"""What a conversion costs and buys: numbers and bytes of what is stored, and where training begins and goes."""

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
from .plots import METHOD_COLOURS, METHOD_LINES, legend_below, panel_title, reliability_diagram, risk_coverage
from .report import ClassPredictions, format_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Sizes", "size_figure", "size_table", "start_figure"]


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
        weights = sum(counts.values()) - scales
        files = sorted(Path(folder).glob("*.safetensors"))
        stored = sum(_numbers(file) for file in files)
        return cls(weights, scales, stored - weights - scales, sum(file.stat().st_size for file in files))


def _numbers(file: Path) -> int:
    with safe_open(file, framework="pt") as tensors:
        return sum(int(np.prod(tensors.get_slice(name).get_shape())) for name in tensors.keys())  # noqa: SIM118


def size_table(sizes: Mapping[str, Sizes], milliseconds: Mapping[str, float]) -> str:
    """Numbers and bytes by method, and milliseconds for an input."""
    rows = {
        method: {
            "weights": f"{of.weights:,}",
            "scales": f"{of.scales:,}",
            "other numbers": f"{of.other:,}",
            "bytes of files": f"{of.bytes:,}",
            "ms per image": f"{milliseconds[method]:.3f}",
        }
        for method, of in sizes.items()
    }
    return format_table(rows, corner="size and speed")


def size_figure(
    methods: Mapping[str, ClassPredictions],
    labels: NDArray[Any],
    sizes: Mapping[str, Sizes],
    *,
    title: str,
) -> "Figure":
    """Calibration, selective prediction, and likelihood against the size of the files.

    Args:
        methods: predictions of each on one test set.
        labels: of that set, (N,).
        sizes: by method.
        title: heading of the page.

    Returns:
        The figure, for `save_figure`.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no display needed
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(16, 6.2), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    reliability_diagram(first, {name: one.probs for name, one in methods.items()}, labels)
    confidence = {name: one.confidence for name, one in methods.items()}
    errors = {name: one.errors(labels) for name, one in methods.items()}
    risk_coverage(second, confidence, errors)
    second.set_xlim(left=min(_errorless(confidence[name], errors[name]) for name in methods) - 5)
    for index, (name, marker) in enumerate(zip(methods, "oDs^v", strict=False)):  # hollow: two may coincide
        style: dict[str, Any] = {"fillstyle": "none", "markersize": 10, "markeredgewidth": 2, "linestyle": "none"}
        nll = negative_log_likelihood(methods[name].probs, labels)
        third.plot(sizes[name].bytes / 1000, nll, marker=marker, color=METHOD_COLOURS[index], label=name, **style)
    third.set(xscale="log", xlabel="kB of the files", ylabel="NLL of the test images, in nats")
    ticks = sorted({of.bytes / 1000 for of in sizes.values()})
    third.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    third.xaxis.set_minor_locator(NullLocator())
    third.margins(x=0.3, y=0.3)
    panel_title(third, "What does it weigh, and what does that buy?", "Low and left is good.")
    legend_below(third)
    figure.suptitle(title, fontsize=14)
    return figure


def _errorless(confidence: NDArray[Any], errors: NDArray[Any]) -> float:
    """% of the inputs, surest first, before the first wrong one; at least 5."""
    wrong = errors[np.argsort(-confidence, kind="stable")] > 0
    return max(5.0, 100 * float(wrong.argmax() if wrong.any() else len(wrong) - 1) / len(wrong))


def start_figure(
    curves: Mapping[str, Sequence[float]],
    point_nll: float,
    accuracies: Mapping[str, float],
    count: int,
    *,
    title: str,
) -> "Figure":
    """Validation NLL by epoch from the converted network on, and test accuracies against the pretrained one's.

    Args:
        curves: by method, the NLL at the start and after each epoch.
        point_nll: of the pretrained network.
        accuracies: on the test inputs by method, in [0, 1], the pretrained network's first.
        count: number of test inputs, which sets the standard error.
        title: heading of the page.

    Returns:
        The figure, for `save_figure`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhline(point_nll, color=METHOD_COLOURS[5], linestyle=":", label=f"pretrained, no noise ({point_nll:.4f})")
    for index, (name, values) in enumerate(curves.items()):
        colour = METHOD_COLOURS[index]
        left.plot(range(len(values)), values, "o", ms=4, label=name, color=colour, linestyle=METHOD_LINES[index])
        best = 1 + int(np.argmin(values[1:]))
        left.plot(best, values[best], "o", markersize=11, fillstyle="none", color=colour)
    left.set(xlabel="epoch of the ELBO (0: converted, not yet trained)", ylabel="NLL of the validation images, in nats")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel_title(left, "Does training the noise help?", "Averaged over draws; a ring marks the epoch that is kept.")
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    _accuracies(right, accuracies, count)
    figure.suptitle(title, fontsize=14)
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
