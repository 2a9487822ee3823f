"""Figures of predictions: reliability, risk against coverage, uncertainties by group. Needs the extra `plots`.

Each panel draws into a matplotlib `Axes` that it is given, says in its title what question it answers, and returns
nothing; `uncertainty_figure` puts four of them on one page, `comparison_figure` two more for each further posterior.
matplotlib is imported when a figure is made.
"""

import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bayeformers import metrics

from .report import ClassPredictions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Wong 2011 (doi 10.1038/nmeth.1618): distinguishable with any colour vision.
METHOD_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#000000")
METHOD_LINES = ("-", "--", "-", "-.", "-", ":")
GROUP_COLOURS = ("#777777", "#CC79A7", "#D55E00", "#F0E442")
GREY = "#666666"
WARNING_COLOUR = "#D55E00"
MEANINGLESS = "no meaning here, as the other panel says why."
ALEATORIC, EPISTEMIC = "What cannot be known: aleatoric uncertainty", "What it has not learned: epistemic uncertainty"


def page(
    title: str, *shape: int, figsize: tuple[float, float], caption: str = "", **options: Any
) -> tuple["Figure", list["Axes"]]:
    """Return a figure with a heading and a foot, and its panels row by row.

    Args:
        title: the heading.
        *shape: how many rows and columns of panels, if any.
        figsize: width and height, in inches.
        caption: the foot.
        **options: of matplotlib's ``Figure``; ``sharex`` and ``sharey`` are those of its ``subplots``.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no display needed

    share = {name: options.pop(name) for name in ("sharex", "sharey") if name in options}
    figure = Figure(**{"figsize": figsize, "layout": "constrained", **options})
    panels = list(figure.subplots(*shape, squeeze=False, **share).flat) if shape else []
    figure.suptitle(title, fontsize=14)
    if caption:
        figure.supxlabel(caption, fontsize=9.5, color=GREY)
    return figure, panels


def reliability_diagram(
    axes: "Axes", methods: Mapping[str, ArrayLike], labels: ArrayLike, *, num_bins: int | None = None
) -> None:
    """Draw accuracy against confidence in bins of equal numbers of examples.

    Bars are 95 % intervals of each bin's accuracy (Wilson 1927).

    Args:
        axes: the panel.
        methods: by name, a method's probabilities, (N, C).
        labels: the right classes, (N,).
        num_bins: number of bins, by default ten, fewer below 250 examples.
    """
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="ideal: right as often as it says")
    lowest = 1.0
    num_bins = min(10, max(3, len(np.asarray(labels)) // 25)) if num_bins is None else num_bins
    for index, (name, probs) in enumerate(methods.items()):
        bins = metrics.reliability_bins(probs, labels, num_bins, "mass")
        ece = metrics.expected_calibration_error(probs, labels)
        filled = bins.counts > 0
        style = method_style(index)
        confidence, accuracy = bins.confidence[filled], bins.accuracy[filled]
        axes.plot(confidence, accuracy, "o", label=f"{name} (ECE {ece:.3f})", **style)
        lower, upper = wilson_interval(accuracy, bins.counts[filled])
        axes.vlines(confidence, lower, upper, color=style["color"], linewidth=1, alpha=0.5)
        lowest = min(lowest, float(confidence.min()), float(lower.min()))
    low = max(0.0, lowest - 0.05)
    axes.set(xlim=(low, 1.01), ylim=(low, 1.01))
    axes.set(xlabel="confidence: what the model says", ylabel="accuracy: what is true")
    caption = "Below the diagonal: too sure of itself. Bars: 95 % intervals."
    panel_title(axes, "Is it right as often as it says?", caption)
    legend_below(axes)


def wilson_interval(share: NDArray[Any], counts: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """95 % intervals of a share seen among ``counts`` trials, both (B,); neither empty at 0 or 1, nor beyond them."""
    z = 1.96
    centre = (share + z**2 / (2 * counts)) / (1 + z**2 / counts)
    half = z / (1 + z**2 / counts) * np.sqrt(share * (1 - share) / counts + z**2 / (4 * counts**2))
    return (centre - half).clip(0, 1), (centre + half).clip(0, 1)


def risk_coverage(axes: "Axes", methods: Mapping[str, ArrayLike], errors: Mapping[str, ArrayLike]) -> None:
    """Draw the error rate of the most confident share of examples, against that share.

    Args:
        axes: the panel.
        methods: by name, a method's confidences, (N,).
        errors: by method, the error of each example in [0, 1], (N,).
    """
    for index, (name, confidence) in enumerate(methods.items()):
        curve = metrics.risk_coverage_curve(confidence, errors[name])
        area = metrics.aurc(confidence, errors[name])
        label = f"{name} (AURC {area:.3f})"
        axes.plot(100 * curve.coverage, 100 * curve.risk, label=label, **method_style(index))
    axes.set(xlim=(0, 100), xlabel="% of inputs answered, surest first", ylabel="% of these answers wrong")
    axes.set_ylim(bottom=0)
    panel_title(axes, "Does refusing unsure answers help?", "Lower is better; at 100 % nothing is refused.")
    legend_below(axes)


def group_histograms(
    axes: "Axes",
    groups: Mapping[str, ArrayLike],
    *,
    title: str,
    explanation: str,
    xlabel: str,
    upper: float | None = None,
    reference: tuple[float, str] | None = None,
    beware: bool = False,
) -> None:
    """Draw histograms of one quantity per group, as shares of the group.

    Args:
        axes: the panel.
        groups: by name, the quantity of each of a group's inputs, (N,).
        title: the question that the panel answers.
        explanation: small letters below the title.
        xlabel: the quantity's name, with its unit.
        upper: end of the axis, by default the largest of the groups' 99.5 % quantiles; values above it are drawn there.
        reference: a value to mark, and its description.
        beware: whether the explanation is a warning, in another colour.
    """
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
    panel_title(axes, title, explanation, beware=beware)
    legend_below(axes)


def uncertainty_figure(
    methods: Mapping[str, ClassPredictions],
    labels: ArrayLike,
    groups: Mapping[str, ClassPredictions],
    *,
    title: str,
    caption: str = "",
    aleatoric_reference: tuple[float, str] | None = None,
) -> "Figure":
    """Return four panels on one page.

    Args:
        methods: predictions of each method on one labelled test set; the first two panels compare them.
        labels: that test set's labels, (N,).
        groups: predictions of one Bayesian method on each group of inputs; the last two panels show how it divides its
            uncertainty.
        title: heading of the page.
        caption: foot of the page; the place to say what the groups are.
        aleatoric_reference: a value to mark in the aleatoric panel, such as a known true entropy, and its description.
    """
    text: dict[str, Any] = {"title": title, "caption": caption, "aleatoric_reference": aleatoric_reference}
    return comparison_figure(methods, labels, {"Bayesian model": groups}, **text)


def comparison_figure(
    methods: Mapping[str, ClassPredictions],
    labels: ArrayLike,
    posteriors: Mapping[str, Mapping[str, ClassPredictions]],
    *,
    title: str,
    caption: str = "",
    aleatoric_reference: tuple[float, str] | None = None,
    caveats: Mapping[str, Sequence[str]] | None = None,
) -> "Figure":
    """Return a page of two panels that compare methods, and below them two for each posterior, on the same scales.

    Args:
        methods: as in `uncertainty_figure`.
        labels: as in `uncertainty_figure`.
        posteriors: by name, a posterior's predictions on each group of inputs.
        title: as in `uncertainty_figure`.
        caption: as in `uncertainty_figure`.
        aleatoric_reference: as in `uncertainty_figure`.
        caveats: by posterior, why its division of the uncertainty means nothing; said in its panels.
    """
    height = 5.25 * (1 + len(posteriors)) + 0.15 * len(methods)
    figure, panels = page(title, 1 + len(posteriors), 2, figsize=(12, height), caption=caption)
    reliability_diagram(panels[0], {name: method.probs for name, method in methods.items()}, labels)
    confidence = {name: method.confidence for name, method in methods.items()}
    risk_coverage(panels[1], confidence, {name: method.errors(labels) for name, method in methods.items()})
    every_group = [group for groups in posteriors.values() for group in groups.values()]
    largest = max((float(np.quantile(_epistemic(group), 0.995)) for group in every_group), default=0.0)
    for (name, groups), aleatoric, epistemic in zip(posteriors.items(), panels[2::2], panels[3::2], strict=True):
        beware = "; ".join((caveats or {}).get(name, ()))
        says = MEANINGLESS if beware else "noise in the labels; more data would not help."
        group_histograms(
            aleatoric, {group: of.aleatoric for group, of in groups.items()}, title=ALEATORIC,
            explanation=f"{name}: {says}", beware=bool(beware), xlabel="mean entropy of the draws, in nats",
            upper=_max_entropy(groups), reference=aleatoric_reference,
        )  # fmt: skip
        says = f"{beware}." if beware else "its draws disagree; more data would help there."
        group_histograms(
            epistemic, {group: _epistemic(of) for group, of in groups.items()}, title=EPISTEMIC,
            explanation=f"{name}: {says}", beware=bool(beware), upper=largest,
            xlabel="mutual information of prediction and weights, in nats",
        )  # fmt: skip
    return figure


def save_figure(figure: "Figure", path: str | PathLike[str], *, dpi: int = 130) -> None:
    """Write the figure as an image.

    Args:
        figure: what to write.
        path: of the file; its suffix decides the format.
        dpi: pixels per inch.
    """
    figure.savefig(path, dpi=dpi)


def panel_title(axes: "Axes", question: str, explanation: str, *, beware: bool = False) -> None:
    """Write a panel's question in bold, and its explanation in small letters below.

    Args:
        axes: the panel.
        question: what the panel answers, in one line.
        explanation: of any length; it is wrapped.
        beware: whether the explanation is a warning, in another colour.
    """
    colour, size, width = (WARNING_COLOUR, 8, 84) if beware else (GREY, 9.5, 80)
    lines = textwrap.wrap(explanation, width)
    axes.set_title(question + "\n" * len(lines), fontsize=12, fontweight="bold", loc="left")
    text = axes.text(0, 1.02, "\n".join(lines), transform=axes.transAxes, fontsize=size, color=colour)
    text.set_in_layout(False)  # the title makes its room; a long line would narrow the panel
    axes.grid(alpha=0.25)


def legend_below(axes: "Axes") -> None:
    """Under the axis' label, so that it hides no data."""
    labels = axes.get_legend_handles_labels()[1]
    columns = 2 if len(labels) > 1 and max(map(len, labels)) <= 36 else 1
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (0, -0.12), "borderaxespad": 0}
    axes.legend(**place, ncols=columns, fontsize=8, frameon=False, columnspacing=1, labelspacing=0.3)


def _epistemic(predictions: ClassPredictions) -> NDArray[np.floating]:
    return np.zeros(len(predictions.probs)) if predictions.epistemic is None else predictions.epistemic


def _max_entropy(groups: Mapping[str, ClassPredictions]) -> float:
    return float(np.log(max(group.probs.shape[1] for group in groups.values())))


def method_style(index: int) -> dict[str, Any]:
    """Colour and dashes together: curves that lie on each other stay visible."""
    line = METHOD_LINES[index % len(METHOD_LINES)]
    return {"color": METHOD_COLOURS[index % len(METHOD_COLOURS)], "linestyle": line, "markersize": 4}
