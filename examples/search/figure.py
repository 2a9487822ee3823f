"""The figure: the search's course, each searched number against the objective, and the confirmation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeformers.reports import GREY, METHOD_COLOURS, save_figure
from examples.search.confirm import BEST, DEFAULTS
from examples.search.outputs import COLUMNS, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURE = "search.png"
BLUE, ORANGE, GREEN = METHOD_COLOURS[:3]
NAMES = {
    "delta": "δ, initial scale relative to |weight|", "prior": "kind of prior", "prior_std": "τ: the prior's std",
    "prior_relative_scale": "τ: moped's relative scale", "learning_rate": "learning rate of the means",
    "rho_learning_rate": "learning rate of ρ", "kl_weight": "λ, weight of the KL",
}  # fmt: skip
COLUMNS_OF_PAGE = 3


def write_figure(path: Path, results: Mapping[str, Any]) -> None:
    """One page, from the content of results.json."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display needed

    rows: list[Row] = results["trials"]
    searched = [name for name in COLUMNS if name in results["space"] and results["space"][name]]
    panels = 1 + len(searched) + ("confirmation" in results)
    lines = math.ceil(panels / COLUMNS_OF_PAGE)
    figure = Figure(figsize=(13, 4.1 * lines + 0.5), layout="constrained")
    grid = figure.subplots(lines, COLUMNS_OF_PAGE, squeeze=False).flatten().tolist()
    top = _top(rows)
    history(grid[0], rows, top)
    for axes, name in zip(grid[1:], searched, strict=False):
        importance = results["importances"].get(name)
        against(axes, name, results["space"][name], rows, top, importance)
    if "confirmation" in results:
        confirmation(grid[panels - 1], results)
    for axes in grid[panels:]:
        axes.set_axis_off()
    figure.suptitle(f"Which setting predicts best? Task {results['task']}, {len(rows)} trials", fontsize=14)
    figure.supxlabel(
        "NLL in nats, lower is better.  star: the defaults, as the flags give them.  cross: pruned, at the least NLL "
        "that it reported.  arrow: above the panel.",
        fontsize=9.5,
        color=GREY,
    )
    save_figure(figure, path, dpi=85)


def _top(rows: Sequence[Row]) -> float:
    """Upper end of the NLL axes: bad trials must not flatten the rest."""
    values = sorted(row["validation_nll"] for row in rows if math.isfinite(row["validation_nll"]))
    low, middle = values[0], values[len(values) // 2]
    own = next((row["validation_nll"] for row in rows if row["is_default"]), middle)
    return max(low + 2.5 * (middle - low), own + 0.25 * (own - low), low * 1.02)


def _points(axes: Axes, rows: Sequence[Row], places: Sequence[Any], top: float) -> None:
    """Each trial by its end: complete, pruned, or the defaults."""
    for row, place in zip(rows, places, strict=True):
        inside = row["validation_nll"] <= top
        pruned = row["state"] == "pruned"
        marker = "*" if row["is_default"] else ("x" if pruned else "o") if inside else "^"
        colour = ORANGE if row["is_default"] else GREY if pruned else BLUE
        size = 220 if row["is_default"] else 36
        axes.scatter([place], [min(row["validation_nll"], top)], marker=marker, color=colour, s=size, zorder=3)


def _limit(axes: Axes, rows: Sequence[Row], top: float) -> None:
    """The same NLL axis in every panel."""
    low = min(row["validation_nll"] for row in rows)
    axes.set_ylim(low - 0.06 * (top - low), top + 0.06 * (top - low))


def history(axes: Axes, rows: Sequence[Row], top: float) -> None:
    """The objective against the order of the trials, and the best so far."""
    order = [row["number"] for row in rows]
    best, least = [], math.inf
    for row in rows:
        least = min(least, row["validation_nll"]) if row["state"] == "complete" else least
        best.append(least)
    own = next(row["validation_nll"] for row in rows if row["is_default"])
    axes.axhline(own, color=ORANGE, linestyle="--", linewidth=1, label=f"defaults ({own:.4f})")
    axes.step(order, best, where="post", color=GREEN, linewidth=2, label=f"best so far ({least:.4f})")
    _points(axes, rows, order, top)
    _limit(axes, rows, top)
    axes.set(xlabel="number of the trial", ylabel="validation NLL")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8, loc="upper right")
    _title(axes, "Does the search get anywhere?", "NLL of each trial's best epoch, on validation data.")


def against(
    axes: Axes, name: str, searched: Sequence[Any], rows: Sequence[Row], top: float, importance: float | None
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
    _points(axes, having, places, top)
    _limit(axes, rows, top)
    axes.set(xlabel=NAMES[name], ylabel="validation NLL")
    _title(axes, f"Which {name.replace('_', ' ')}?", explanation)


def confirmation(axes: Axes, results: Mapping[str, Any]) -> None:
    """What the search promised, and each fresh seed's difference on test data."""
    confirmed = results["confirmation"]
    pairs = zip(confirmed["methods"][BEST], confirmed["methods"][DEFAULTS], strict=True)
    values = [best["nll"] - own["nll"] for best, own in pairs]
    promised = results["best"]["validation_nll"] - results["defaults"]["validation_nll"]
    difference = confirmed["difference"]["nll"]
    axes.axhline(0, color=GREY, linestyle="--", linewidth=1)
    axes.scatter([0], [promised], marker="D", color=GREEN, s=70, zorder=3)
    axes.scatter([1] * len(values), values, color=BLUE, alpha=0.6, zorder=3, label="a seed")
    axes.errorbar(
        [1.25], [difference["mean"]], yerr=[2 * difference["standard_error"]], fmt="s", color="black", capsize=5,
        label="mean ± 2 standard errors",
    )  # fmt: skip
    axes.set_xticks([0, 1.12], ["promised:\nvalidation, search's seed", "confirmed:\ntest data, fresh seeds"])
    axes.set_xlim(-0.5, 1.7)
    axes.set_ylabel("NLL, best found − defaults")
    axes.legend(fontsize=8)
    _title(axes, "Is the best one better?", "Below the dashed line: yes.")


def _title(axes: Axes, question: str, explanation: str) -> None:
    axes.set_title(f"{question}\n", fontsize=12, fontweight="bold", loc="left")
    axes.text(0, 1.02, explanation, transform=axes.transAxes, fontsize=9.5, color=GREY)
    axes.grid(alpha=0.25)
