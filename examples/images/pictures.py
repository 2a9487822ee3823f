"""One picture per question of ``python -m examples.image_classification``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from bayeformers.reports import (
    GREY,
    METHOD_COLOURS,
    METHOD_LINES,
    ClassPredictions,
    legend_below,
    reliability_diagram,
    risk_coverage,
)
from examples.images.rotation import RotationCurve

EPISTEMIC, ALEATORIC, ERROR = METHOD_COLOURS[4], METHOD_COLOURS[0], METHOD_COLOURS[5]


def accuracy_figure(
    methods: Mapping[str, ClassPredictions],
    labels: np.ndarray,
    kilobytes: Mapping[str, float],
    nll: Mapping[str, float],
    *,
    title: str,
) -> Figure:
    """Calibration, selective prediction, and likelihood against the size of the files."""
    figure = Figure(figsize=(16, 6.2), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    reliability_diagram(first, {name: one.probs for name, one in methods.items()}, labels)
    confidence = {name: one.confidence for name, one in methods.items()}
    errors = {name: one.errors(labels) for name, one in methods.items()}
    risk_coverage(second, confidence, errors)
    second.set_xlim(left=min(_errorless(confidence[name], errors[name]) for name in methods) - 5)
    for index, (name, marker) in enumerate(zip(methods, "oDs^v", strict=False)):  # hollow: two may coincide
        style = {"marker": marker, "fillstyle": "none", "markersize": 10, "markeredgewidth": 2, "linestyle": "none"}
        third.plot(kilobytes[name], nll[name], color=METHOD_COLOURS[index], label=name, **style)
    third.set(xscale="log", xlabel="kB of the files", ylabel="NLL of the test images, in nats")
    ticks = sorted(set(kilobytes.values()))
    third.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    third.xaxis.set_minor_locator(NullLocator())
    third.margins(x=0.3, y=0.3)
    heading(third, "What does it weigh, and what does that buy?", "Low and left is good.")
    legend_below(third)
    figure.suptitle(title, fontsize=14)
    return figure


def _errorless(confidence: np.ndarray, errors: np.ndarray) -> float:
    """% of the images, surest first, before the first wrong one; at least 5."""
    wrong = errors[np.argsort(-confidence, kind="stable")] > 0
    return max(5.0, 100 * float(wrong.argmax() if wrong.any() else len(wrong) - 1) / len(wrong))


def start_figure(
    curves: Mapping[str, Sequence[float]],
    point_nll: float,
    accuracies: Mapping[str, float],
    count: int,
    *,
    title: str,
) -> Figure:
    """Validation NLL by epoch from the converted network on, and test accuracies against the pretrained one's.

    Args:
        curves: by method, the NLL at the start and after each epoch.
        point_nll: of the pretrained network.
        accuracies: on the test images by method, in [0, 1], the pretrained network's first.
        count: number of test images, which sets the standard error.
        title: heading of the page.
    """
    figure = Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhline(point_nll, color=METHOD_COLOURS[5], linestyle=":", label=f"pretrained, no noise ({point_nll:.4f})")
    for index, (name, values) in enumerate(curves.items()):
        style = {"color": METHOD_COLOURS[index], "linestyle": METHOD_LINES[index]}
        left.plot(range(len(values)), values, "o", markersize=4, label=name, **style)
        best = 1 + int(np.argmin(values[1:]))
        left.plot(best, values[best], "o", markersize=11, fillstyle="none", color=METHOD_COLOURS[index])
    left.set(xlabel="epoch of the ELBO (0: converted, not yet trained)", ylabel="NLL of the validation images, in nats")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    heading(left, "Does training the noise help?", "Averaged over draws; a ring marks the epoch that is kept.")
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    _accuracies(right, accuracies, count)
    figure.suptitle(title, fontsize=14)
    return figure


def _accuracies(axes: Axes, accuracies: Mapping[str, float], count: int) -> None:
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
    heading(axes, "Does it start where training ended?", "The conversion must not lose what the network knew.")
    axes.legend(fontsize=8, loc="lower left")


def rotation_figure(
    angles: Sequence[float],
    curves: Mapping[str, RotationCurve],
    strip: np.ndarray,
    probs: np.ndarray,
    class_names: Sequence[str],
    *,
    title: str,
    strip_title: str,
    caption: str = "",
) -> Figure:
    """Curves against the angle for each method, and below them one image at each angle with its probabilities.

    Args:
        angles: in degrees, (A,).
        curves: by method.
        strip: one image at each angle, (A, H, W) or (A, H, W, 3), in [0, 1].
        probs: its predicted probabilities, (A, C).
        class_names: of the C classes.
        title: heading of the page.
        strip_title: what the strip shows.
        caption: foot of the page.
    """
    figure = Figure(figsize=(5 * len(curves) + 1, 9.5), layout="constrained")
    pages: Any = figure.subfigures(2, 1, height_ratios=(1, 1.05))
    upper, lower = pages
    top = 1.05 * max(float(curve.entropy.max()) for curve in curves.values())
    for axes, (name, curve) in zip(np.atleast_1d(upper.subplots(1, len(curves))), curves.items(), strict=True):
        _curve(axes, angles, name, curve, top)
    _strip(lower, angles, strip, probs, class_names, strip_title)
    figure.suptitle(title, fontsize=14)
    figure.supxlabel(caption, fontsize=9.5, color=GREY)
    return figure


def _curve(axes: Axes, angles: Sequence[float], name: str, curve: RotationCurve, top: float) -> None:
    """Uncertainties on the left axis, the share of errors on the right one."""
    has_posterior = bool(curve.epistemic.any())
    shown: list[Any] = []
    if has_posterior:
        shown += axes.plot(angles, curve.epistemic, "o-", markersize=4, color=EPISTEMIC, label="epistemic")
        shown += axes.plot(angles, curve.aleatoric, "s--", markersize=4, color=ALEATORIC, label="aleatoric")
    else:
        shown += axes.plot(angles, curve.entropy, "s--", markersize=4, color=ALEATORIC, label="entropy")
    axes.set(xlabel="rotation in degrees", ylabel="mean uncertainty, in nats", ylim=(0, top), xticks=range(0, 181, 30))
    right = axes.twinx()
    shown += right.plot(angles, 100 * curve.error, ":", linewidth=2, color=ERROR, label="error (right axis)")
    right.set(ylim=(0, 100), ylabel="% of test images wrong")
    score = "epistemic" if has_posterior else "entropy"
    heading(axes, name, f"{score} and error: rank correlation {curve.agreement[score]['angles']:.2f}")
    axes.legend(
        handles=shown, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3
    )  # clear of the curves


def _strip(
    figure: Any,
    angles: Sequence[float],
    strip: np.ndarray,
    probs: np.ndarray,
    class_names: Sequence[str],
    title: str,
) -> None:
    count = len(angles)
    grid = figure.add_gridspec(2, count, height_ratios=(1, 2.6))
    for index in range(count):
        axes = figure.add_subplot(grid[0, index])
        axes.imshow(strip[index], cmap="gray", vmin=0, vmax=1)
        axes.set_title(f"{angles[index]:g}°", fontsize=9)
        axes.axis("off")
    axes = figure.add_subplot(grid[1, :])
    image = axes.imshow(probs.T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (angle, label), value in np.ndenumerate(probs):
        if value >= 0.05:
            colour = "white" if value > 0.6 else "black"
            axes.text(angle, label, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set(xticks=range(count), xticklabels=[f"{angle:g}°" for angle in angles])
    axes.set(yticks=range(len(class_names)), yticklabels=class_names, ylabel="class")
    figure.colorbar(image, ax=axes, label="predicted probability", pad=0.01)
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")


def heading(axes: Axes, question: str, explanation: str) -> None:
    """A panel's question, and below it how to read the panel."""
    axes.set_title(f"{question}\n", fontsize=12, fontweight="bold", loc="left")
    axes.text(0, 1.02, explanation, transform=axes.transAxes, fontsize=9.5, color=GREY)
    axes.grid(alpha=0.25)
