"""Figures of predictions: reliability, risk against coverage, uncertainties by group. Needs the extra `plots`.

Each panel draws into a matplotlib `Axes` that it is given, says in its title what question it answers, and returns
nothing; `uncertainty_figure` puts four of them on one page, `comparison_figure` two more for each further posterior.
matplotlib is imported when a figure is made.
"""

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayeformers import metrics
from bayeformers.report import ClassPredictions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Wong 2011 (doi 10.1038/nmeth.1618): distinguishable with any colour vision.
METHOD_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#000000")
METHOD_LINES = ("-", "--", "-", "-.", "-", ":")
GROUP_COLOURS = ("#777777", "#CC79A7", "#D55E00", "#F0E442")
GREY = "#666666"


def reliability_diagram(
    axes: "Axes", methods: Mapping[str, ArrayLike], labels: ArrayLike, *, num_bins: int = 10
) -> None:
    """Accuracy against confidence in bins of equal numbers of examples, for each method's probabilities (N, C)."""
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="ideal: right as often as it says")
    lowest = 1.0
    for index, (name, probs) in enumerate(methods.items()):
        bins = metrics.reliability_bins(probs, labels, num_bins, "mass")
        ece = metrics.expected_calibration_error(probs, labels)
        filled = bins.counts > 0
        style = _method_style(index)
        axes.plot(bins.confidence[filled], bins.accuracy[filled], "o", label=f"{name} (ECE {ece:.3f})", **style)
        lowest = min(lowest, float(bins.confidence[filled].min()), float(bins.accuracy[filled].min()))
    low = max(0.0, lowest - 0.05)
    axes.set(
        xlim=(low, 1.01), ylim=(low, 1.01), xlabel="confidence: what the model says", ylabel="accuracy: what is true"
    )
    _title(axes, "Is it right as often as it says?", "Below the diagonal: too sure of itself.")
    axes.legend(loc="upper left", fontsize=8)


def risk_coverage(axes: "Axes", methods: Mapping[str, ArrayLike], errors: Mapping[str, ArrayLike]) -> None:
    """Error rate of the most confident share of examples, against that share; `methods` are confidences (N,)."""
    for index, (name, confidence) in enumerate(methods.items()):
        curve = metrics.risk_coverage_curve(confidence, errors[name])
        area = metrics.aurc(confidence, errors[name])
        label = f"{name} (AURC {area:.3f})"
        axes.plot(100 * curve.coverage, 100 * curve.risk, label=label, **_method_style(index))
    axes.set(xlim=(0, 100), xlabel="% of inputs answered, surest first", ylabel="% of these answers wrong")
    axes.set_ylim(bottom=0)
    _title(axes, "Does refusing unsure answers help?", "Lower is better; at 100 % nothing is refused.")
    axes.legend(loc="upper left", fontsize=8)


def group_histograms(
    axes: "Axes",
    groups: Mapping[str, ArrayLike],
    *,
    title: str,
    explanation: str,
    xlabel: str,
    upper: float | None = None,
    reference: tuple[float, str] | None = None,
) -> None:
    """Histograms of one quantity (N,) per group, as shares of the group; `reference` marks a value with a text."""
    values = {name: np.asarray(value, dtype=np.float64) for name, value in groups.items()}
    top = upper or max(float(np.quantile(value, 0.995)) for value in values.values()) or 1.0
    edges = np.linspace(0, top, 26).tolist()
    for index, (name, value) in enumerate(values.items()):
        colour = GROUP_COLOURS[index % len(GROUP_COLOURS)]
        weights = np.full(len(value), 100 / len(value))
        label = f"{name} (mean {value.mean():.3f})"
        clipped = value.clip(0, top)
        axes.hist(clipped, edges, weights=weights, color=colour, alpha=0.2)
        axes.hist(clipped, edges, weights=weights, histtype="step", color=colour, linewidth=1.5, label=label)
    if reference is not None:
        axes.axvline(reference[0], color="black", linestyle=":", label=reference[1])
    axes.set(xlim=(0, top), xlabel=xlabel, ylabel="% of the group's inputs")
    _title(axes, title, explanation)
    axes.legend(fontsize=8)


def uncertainty_figure(
    methods: Mapping[str, ClassPredictions],
    labels: ArrayLike,
    groups: Mapping[str, ClassPredictions],
    *,
    title: str,
    caption: str = "",
    aleatoric_reference: tuple[float, str] | None = None,
) -> "Figure":
    """Four panels on one page.

    Args:
        methods: predictions of each method on one labelled test set; the first two panels compare them.
        labels: that test set's labels, (N,).
        groups: predictions of one Bayesian method on each group of inputs; the last two panels show how it divides its
            uncertainty.
        title: heading of the page.
        caption: foot of the page; the place to say what the groups are.
        aleatoric_reference: a value to mark in the aleatoric panel, such as a known true entropy, and its description.
    """
    return comparison_figure(
        methods,
        labels,
        {"Bayesian model": groups},
        title=title,
        caption=caption,
        aleatoric_reference=aleatoric_reference,
    )


def comparison_figure(
    methods: Mapping[str, ClassPredictions],
    labels: ArrayLike,
    posteriors: Mapping[str, Mapping[str, ClassPredictions]],
    *,
    title: str,
    caption: str = "",
    aleatoric_reference: tuple[float, str] | None = None,
) -> "Figure":
    """Two panels that compare methods, and below them two for each posterior, all on the same scales.

    Args:
        methods: as in `uncertainty_figure`.
        labels: as in `uncertainty_figure`.
        posteriors: by name, a posterior's predictions on each group of inputs.
        title: as in `uncertainty_figure`.
        caption: as in `uncertainty_figure`.
        aleatoric_reference: as in `uncertainty_figure`.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no display needed

    figure = Figure(figsize=(12, 4.75 * (1 + len(posteriors))), layout="constrained")
    (reliability, risk), *rows = figure.subplots(1 + len(posteriors), 2)
    reliability_diagram(reliability, {name: method.probs for name, method in methods.items()}, labels)
    risk_coverage(
        risk,
        {name: method.confidence for name, method in methods.items()},
        {name: method.errors(labels) for name, method in methods.items()},
    )
    every_group = [group for groups in posteriors.values() for group in groups.values()]
    largest = max((float(np.quantile(_epistemic(group), 0.995)) for group in every_group), default=0.0)
    for (name, groups), (aleatoric, epistemic) in zip(posteriors.items(), rows, strict=True):
        group_histograms(
            aleatoric,
            {group: predictions.aleatoric for group, predictions in groups.items()},
            title="What cannot be known: aleatoric uncertainty",
            explanation=f"{name}: noise in the labels; more data would not help.",
            xlabel="mean entropy of the draws, in nats",
            upper=_max_entropy(groups),
            reference=aleatoric_reference,
        )
        group_histograms(
            epistemic,
            {group: _epistemic(predictions) for group, predictions in groups.items()},
            title="What it has not learned: epistemic uncertainty",
            explanation=f"{name}: its draws disagree; should be large on unfamiliar inputs.",
            xlabel="mutual information of prediction and weights, in nats",
            upper=largest,
        )
    figure.suptitle(title, fontsize=14)
    figure.supxlabel(caption, fontsize=9.5, color=GREY)
    return figure


def save_figure(figure: "Figure", path: str | PathLike[str], *, dpi: int = 130) -> None:
    """Write the figure as an image; the suffix of `path` decides the format."""
    figure.savefig(path, dpi=dpi)


def _title(axes: "Axes", question: str, explanation: str) -> None:
    axes.set_title(f"{question}\n", fontsize=12, fontweight="bold", loc="left")
    axes.text(0, 1.02, explanation, transform=axes.transAxes, fontsize=9.5, color=GREY)
    axes.grid(alpha=0.25)


def _epistemic(predictions: ClassPredictions) -> NDArray[np.floating]:
    return np.zeros(len(predictions.probs)) if predictions.epistemic is None else predictions.epistemic


def _max_entropy(groups: Mapping[str, ClassPredictions]) -> float:
    return float(np.log(max(group.probs.shape[1] for group in groups.values())))


def _method_style(index: int) -> dict[str, Any]:
    """Colour and dashes together: curves that lie on each other stay visible."""
    line = METHOD_LINES[index % len(METHOD_LINES)]
    return {"color": METHOD_COLOURS[index % len(METHOD_COLOURS)], "linestyle": line, "markersize": 4}
