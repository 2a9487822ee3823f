"""What a search of hyperparameters found: tables, and a figure of its course, each searched number, the confirmation.

A row is a trial: ``number``, ``state`` ("complete", "pruned"), ``is_default``, ``validation_nll``, ``steps`` and
``setting``, its hyperparameters by name.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from .plots import GREY, METHOD_COLOURS, page, panel_title
from .report import format_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TrialRow = Mapping[str, Any]
DEFAULTS, BEST = "defaults", "best found"
BLUE, ORANGE, GREEN = METHOD_COLOURS[:3]
NAMES = {
    "delta": "δ, initial scale relative to |weight|", "prior": "kind of prior", "prior_std": "τ: the prior's std",
    "prior_relative_scale": "τ: moped's relative scale", "learning_rate": "learning rate of the means",
    "rho_learning_rate": "learning rate of ρ", "kl_weight": "λ, weight of the KL",
}  # fmt: skip
"""Of the hyperparameters in tables' order, what the figure calls them."""
_COLUMNS_OF_PAGE = 3


def setting_text(value: Any) -> str:
    """A hyperparameter's value, short."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def trials_table(rows: Sequence[TrialRow]) -> str:
    """All trials, best first, those without an end last."""
    shown = {}
    for row in sorted(rows, key=lambda row: (row["state"] != "complete", row["validation_nll"])):
        note = "pruned" if row["state"] == "pruned" else "defaults" if row["is_default"] else ""
        setting = {name: setting_text(row["setting"][name]) for name in NAMES if name in row["setting"]}
        numbers = {"validation NLL": f"{row['validation_nll']:.4f}", "steps": str(row["steps"])}
        shown[f"{row['number']} {note}".strip()] = {**numbers, **setting}
    return format_table(shown, corner="trial")


def paired_difference(
    first: Sequence[Mapping[str, float | None]], second: Sequence[Mapping[str, float | None]]
) -> dict[str, dict[str, float]]:
    """The difference first - second per metric: its mean over the seeds, and that mean's standard error."""
    differences = {}
    for name in first[0]:
        pairs = [(one[name], other[name]) for one, other in zip(first, second, strict=True)]
        values = [one - other for one, other in pairs if one is not None and other is not None]
        if len(values) == len(pairs):
            error = statistics.stdev(values) / math.sqrt(len(values))
            differences[name] = {"mean": statistics.fmean(values), "standard_error": error}
    return differences


def verdict(difference: Mapping[str, float]) -> str:
    """What a difference in NLL, best - defaults, says at two standard errors."""
    mean, error = difference["mean"], difference["standard_error"]
    if abs(mean) <= 2 * error:
        return "the defaults hold: no difference beyond two standard errors"
    return "the setting found is better" if mean < 0 else "the setting found is worse"


def confirmation_text(results: Mapping[str, Any]) -> str:
    """Means over the fresh seeds, and what the search promised beside what the test data say."""
    confirmed, rows = results["confirmation"], {}
    for method, reports in confirmed["methods"].items():
        names = [name for name in ("nll", "ece", "brier", "accuracy", "rmse", "validation_nll") if name in reports[0]]
        values = {name: [report[name] for report in reports] for name in names}
        rows[method] = {name: statistics.fmean(of) for name, of in values.items() if None not in of}
    difference = confirmed["difference"]["nll"]
    table = format_table(rows, corner=f"test data, mean of {len(confirmed['seeds'])} fresh seeds", digits=4)
    return (
        f"{table}\n\nNLL, best found - defaults: {promised(results):+.4f} on the validation data of the search, "
        f"{difference['mean']:+.4f} ± {difference['standard_error']:.4f} on test data: {results['verdict']}."
    )


def promised(results: Mapping[str, Any]) -> float:
    """By how much the best trial's validation NLL differs from that of the defaults."""
    return float(results["best"]["validation_nll"] - results["defaults"]["validation_nll"])


def search_figure(results: Mapping[str, Any]) -> Figure:
    """One page, from ``task``, ``trials``, ``space``, ``importances``, and with a confirmation what belongs to it."""
    rows: list[TrialRow] = results["trials"]
    searched = [name for name in NAMES if results["space"].get(name)]
    panels = 1 + len(searched) + ("confirmation" in results)
    lines = math.ceil(panels / _COLUMNS_OF_PAGE)
    caption = (
        "NLL in nats, lower is better.  star: the defaults, as the flags give them.  cross: pruned, at the least NLL "
        "that it reported.  arrow: above the panel."
    )
    title = f"Which setting predicts best? Task {results['task']}, {len(rows)} trials"
    figure, grid = page(title, lines, _COLUMNS_OF_PAGE, figsize=(13, 4.1 * lines + 0.5), caption=caption)
    limits = _limits(rows)
    _history(grid[0], rows, limits)
    for axes, name in zip(grid[1:], searched, strict=False):
        _against(axes, name, results["space"][name], rows, limits, results["importances"].get(name))
    if "confirmation" in results:
        _confirmation(grid[panels - 1], results)
    for axes in grid[panels:]:
        axes.set_axis_off()
    return figure


def _limits(rows: Sequence[TrialRow]) -> tuple[float, float]:
    """The ends of the NLL axis in every panel: bad trials must not flatten the rest."""
    values = sorted(row["validation_nll"] for row in rows if math.isfinite(row["validation_nll"]))
    low, middle = values[0], values[len(values) // 2]
    own = next((row["validation_nll"] for row in rows if row["is_default"]), middle)
    return float(low), float(max(low + 2.5 * (middle - low), own + 0.25 * (own - low), low * 1.02))


def _points(axes: Axes, rows: Sequence[TrialRow], places: Sequence[Any], limits: tuple[float, float]) -> None:
    """Each trial by its end: complete, pruned, or the defaults."""
    low, top = limits
    for row, place in zip(rows, places, strict=True):
        pruned, inside = row["state"] == "pruned", row["validation_nll"] <= top
        marker = "*" if row["is_default"] else ("x" if pruned else "o") if inside else "^"
        colour = ORANGE if row["is_default"] else GREY if pruned else BLUE
        size = 220 if row["is_default"] else 36
        axes.scatter([place], [min(row["validation_nll"], top)], marker=marker, color=colour, s=size, zorder=3)
    axes.set_ylim(low - 0.06 * (top - low), top + 0.06 * (top - low))
    axes.set_ylabel("validation NLL")


def _history(axes: Axes, rows: Sequence[TrialRow], limits: tuple[float, float]) -> None:
    """The objective against the order of the trials, and the best so far."""
    order = [row["number"] for row in rows]
    best = list(accumulate((row["validation_nll"] if row["state"] == "complete" else math.inf for row in rows), min))
    own = next(row["validation_nll"] for row in rows if row["is_default"])
    axes.axhline(own, color=ORANGE, linestyle="--", linewidth=1, label=f"defaults ({own:.4f})")
    axes.step(order, best, where="post", color=GREEN, linewidth=2, label=f"best so far ({best[-1]:.4f})")
    _points(axes, rows, order, limits)
    axes.set_xlabel("number of the trial")
    axes.locator_params(axis="x", integer=True)
    axes.legend(fontsize=8, loc="upper right")
    panel_title(axes, "Does the search get anywhere?", "NLL of each trial's best epoch, on validation data.")


def _against(
    axes: Axes,
    name: str,
    searched: Sequence[Any],
    rows: Sequence[TrialRow],
    limits: tuple[float, float],
    importance: float | None,
) -> None:
    """The objective against one hyperparameter over all that was searched, of the trials that have it."""
    having = [row for row in rows if name in row["setting"]]
    places = [row["setting"][name] for row in having]
    if name == "prior":
        places = [searched.index(place) for place in places]
        axes.set_xticks(range(len(searched)), list(searched))
        axes.set_xlim(-0.6, len(searched) - 0.4)
        explanation = "normal: N(0, τ²).  moped: N(w₀, (τ δ w₀)²)."
    else:
        low, high = searched
        ticks = [low, math.sqrt(low * high), high]
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlim(low * (low / high) ** 0.05, high * (high / low) ** 0.05)
        explanation = "" if importance is None else f"Importance {100 * importance:.0f} % (PED-ANOVA)."
    _points(axes, having, places, limits)
    axes.set_xlabel(NAMES[name])
    panel_title(axes, f"Which {name.replace('_', ' ')}?", explanation)


def _confirmation(axes: Axes, results: Mapping[str, Any]) -> None:
    """What the search promised, and each fresh seed's difference on test data."""
    confirmed = results["confirmation"]
    pairs = zip(confirmed["methods"][BEST], confirmed["methods"][DEFAULTS], strict=True)
    values = [best["nll"] - own["nll"] for best, own in pairs]
    difference = confirmed["difference"]["nll"]
    axes.axhline(0, color=GREY, linestyle="--", linewidth=1)
    axes.scatter([0], [promised(results)], marker="D", color=GREEN, s=70, zorder=3)
    axes.scatter([1] * len(values), values, color=BLUE, alpha=0.6, zorder=3, label="a seed")
    axes.errorbar(
        [1.25], [difference["mean"]], yerr=[2 * difference["standard_error"]], fmt="s", color="black", capsize=5,
        label="mean ± 2 standard errors",
    )  # fmt: skip
    axes.set_xticks([0, 1.12], ["promised:\nvalidation, search's seed", "confirmed:\ntest data, fresh seeds"])
    axes.set_xlim(-0.5, 1.7)
    axes.set_ylabel("NLL, best found − defaults")
    axes.legend(fontsize=8)
    panel_title(axes, "Is the best one better?", "Below the dashed line: yes.")
