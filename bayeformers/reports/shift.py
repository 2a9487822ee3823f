"""Does uncertainty rise with the error as inputs are shifted further and further? Curves, correlations, a figure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from ..metrics import UndefinedMetricError, error_auroc
from .plots import METHOD_COLOURS, page, panel_title
from .report import ClassPredictions, format_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["ShiftCurve", "rank_agreement", "shift_figure", "shift_tables"]

_EPISTEMIC, _ALEATORIC, _ERROR = METHOD_COLOURS[4], METHOD_COLOURS[0], METHOD_COLOURS[5]
CAPTION = (
    "epistemic: mutual information of label and weights, the draws disagree.  aleatoric: mean entropy of a draw.  "
    "A deterministic network has one entropy only."
)


@dataclass(frozen=True)
class ShiftCurve:
    """One method's predictions at A sizes of the shift: means over the inputs, and how they go with the error.

    Attributes:
        error: share of inputs whose most probable class is wrong, (A,).
        epistemic: mean mutual information of label and weights, in nats, (A,); 0 of a point estimate.
        aleatoric: mean expected entropy of a draw's probabilities, in nats, (A,).
        entropy: mean entropy of the averaged probabilities, in nats, (A,): the sum of the two.
        agreement: by uncertainty its `rank_agreement` with the error.
    """

    error: NDArray[Any]
    epistemic: NDArray[Any]
    aleatoric: NDArray[Any]
    entropy: NDArray[Any]
    agreement: dict[str, dict[str, float]]

    @classmethod
    def from_predictions(cls, predictions: Sequence[ClassPredictions], labels: NDArray[Any]) -> "ShiftCurve":
        """The predictions at each size of the shift, on the same inputs with `labels` (N,), as one curve."""
        zeros = np.zeros(len(labels))
        error = np.stack([one.errors(labels) for one in predictions])
        spreads = {
            "entropy": np.stack([one.total for one in predictions]),
            "epistemic": np.stack([zeros if one.epistemic is None else one.epistemic for one in predictions]),
            "aleatoric": np.stack([one.aleatoric for one in predictions]),
        }
        means = {name: values.mean(1) for name, values in spreads.items()}
        told = spreads if predictions[0].epistemic is not None else {"entropy": spreads["entropy"]}
        agreement = {name: rank_agreement(values, error) for name, values in told.items()}
        return cls(error.mean(1), agreement=agreement, **means)


def shift_tables(degrees: Sequence[float], curves: Mapping[str, ShiftCurve]) -> list[str]:
    """A table for each method by angle, without an epistemic part of a point estimate; one of all rank correlations."""
    tables = []
    for method, curve in curves.items():
        names = ["error", "entropy", *(["epistemic", "aleatoric"] if "epistemic" in curve.agreement else [])]
        values = zip(*(getattr(curve, name).tolist() for name in names), strict=True)
        rows = {f"{angle:g}": dict(zip(names, of, strict=True)) for angle, of in zip(degrees, values, strict=True)}
        tables.append(format_table(rows, corner=f"{method}: degrees"))
    scores = {f"{method}: {score}": of for method, curve in curves.items() for score, of in curve.agreement.items()}
    return [*tables, format_table(scores, corner="rank correlation with the error, between")]


def rank_agreement(uncertainty: NDArray[Any], error: NDArray[Any]) -> dict[str, float]:
    """Whether uncertainty rises with the error, both (A sizes of a shift, N inputs).

    Returns:
        ``angles``: Spearman's rank correlation of the means over inputs, between sizes of the shift;
        ``images``: the same between all A x N shifted inputs, whose errors are 0 or 1;
        ``auroc``: the probability that a wrongly classified input is the more uncertain one of a wrong and a right.
        NaN where one of the two is constant.
    """
    try:
        auroc = error_auroc(-uncertainty.ravel(), error.ravel())
    except UndefinedMetricError:
        auroc = math.nan
    return {
        "angles": _spearman(uncertainty.mean(1), error.mean(1)),
        "images": _spearman(uncertainty.ravel(), error.ravel()),
        "auroc": auroc,
    }


def _spearman(first: NDArray[Any], second: NDArray[Any]) -> float:
    """NaN without scipy's warning where an array is constant."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(spearmanr(first, second).statistic)


def shift_figure(
    degrees: Sequence[float],
    curves: Mapping[str, ShiftCurve],
    strip: NDArray[Any],
    probs: NDArray[Any],
    class_names: Sequence[str],
    *,
    title: str,
    strip_title: str,
    caption: str = CAPTION,
) -> "Figure":
    """Draw curves against the angle for each method, and below them one image at each angle with its probabilities.

    Args:
        degrees: angles, (A,).
        curves: by method.
        strip: one image at each angle, (A, H, W) or (A, H, W, 3), in [0, 1].
        probs: its predicted probabilities, (A, C).
        class_names: of the C classes.
        title: heading of the page.
        strip_title: what the strip shows.
        caption: foot of the page.

    Returns:
        The figure, for `save_figure`.
    """
    figure, _ = page(title, figsize=(5 * len(curves) + 1, 9.5), caption=caption)
    upper, lower = np.asarray(figure.subfigures(2, 1, height_ratios=(1, 1.05)))
    top = 1.05 * max(float(curve.entropy.max()) for curve in curves.values())
    panels = upper.subplots(1, len(curves), squeeze=False)[0]
    for axes, (name, curve) in zip(panels, curves.items(), strict=True):
        _curve(axes, degrees, name, curve, top)
    _strip(lower, [f"{angle:g}°" for angle in degrees], strip, probs, class_names)
    lower.suptitle(strip_title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    return figure


def _curve(axes: "Axes", degrees: Sequence[float], name: str, curve: ShiftCurve, top: float) -> None:
    """Uncertainties on the left axis, the share of errors on the right one."""
    score = "epistemic" if "epistemic" in curve.agreement else "entropy"
    shown: list[Any] = []
    if score == "epistemic":
        shown += axes.plot(degrees, curve.epistemic, "o-", markersize=4, color=_EPISTEMIC, label="epistemic")
    rest = "aleatoric" if score == "epistemic" else "entropy"
    shown += axes.plot(degrees, getattr(curve, rest), "s--", markersize=4, color=_ALEATORIC, label=rest)
    axes.set(xlabel="rotation in degrees", ylabel="mean uncertainty, in nats", ylim=(0, top), xticks=range(0, 181, 30))
    right = axes.twinx()
    shown += right.plot(degrees, 100 * curve.error, ":", linewidth=2, color=_ERROR, label="error (right axis)")
    right.set(ylim=(0, 100), ylabel="% of test images wrong")
    panel_title(axes, name, f"{score} and error: rank correlation {curve.agreement[score]['angles']:.2f}")
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14)}  # clear of the curves
    axes.legend(handles=shown, fontsize=8, ncols=3, **place)


def _strip(
    figure: Any, angles: Sequence[str], strip: NDArray[Any], probs: NDArray[Any], class_names: Sequence[str]
) -> None:
    grid = figure.add_gridspec(2, len(angles), height_ratios=(1, 2.6))
    for index, angle in enumerate(angles):
        axes = figure.add_subplot(grid[0, index])
        axes.imshow(strip[index], cmap="gray", vmin=0, vmax=1)
        axes.set_title(angle, fontsize=9)
        axes.axis("off")
    axes = figure.add_subplot(grid[1, :])
    image = axes.imshow(probs.T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (column, label), value in np.ndenumerate(probs):
        if value >= 0.05:
            colour = "white" if value > 0.6 else "black"
            axes.text(column, label, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set(xticks=range(len(angles)), xticklabels=angles)
    axes.set(yticks=range(len(class_names)), yticklabels=class_names, ylabel="class")
    figure.colorbar(image, ax=axes, label="predicted probability", pad=0.01)
