"""What a run leaves behind: tables, results.json, predictions.csv and the picture with a panel per method."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayeformers.reports import GREY, METHOD_COLOURS, format_table, save_figure
from examples.curves.data import Array, CurveData, Truth
from examples.curves.evaluation import BAND, Bands

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIGURE = "bands.png"
COLUMNS = 3
BLUE, ORANGE = METHOD_COLOURS[:2]


def format_results(results: Mapping[str, Any]) -> str:
    """A table of scores per region of the axis."""
    methods = results["methods"]
    regions = list(next(iter(methods.values()))["regions"])
    return "\n\n".join(
        format_table({name: report["regions"][region] for name, report in methods.items()}, corner=f"{region} points")
        for region in regions
    )


def write_predictions(path: Path, grid: Array, methods: Mapping[str, Bands]) -> None:
    """The bands of every method along the axis: a row per x."""
    columns: dict[str, Array] = {"x": grid}
    for name, found in methods.items():
        prefix = name.replace(", ", "_").replace(" ", "_")
        parts = {"mean": found.mean, "epistemic_std": found.epistemic, "aleatoric_std": found.aleatoric}
        columns |= {f"{prefix}:{part}": values for part, values in parts.items()}
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([f"{value:.6g}" for value in row] for row in zip(*columns.values(), strict=True))


def write_figure(
    path: Path, data: CurveData, grid: Array, methods: Mapping[str, Bands], reports: Mapping[str, Any]
) -> None:
    """A panel per method on the same axes."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display needed

    rows = -(-len(methods) // COLUMNS)
    figure = Figure(figsize=(13, 0.9 + 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flat
    for panel, (name, found) in zip(axes, methods.items(), strict=False):
        _panel(panel, name, data, grid, found, _coverage(reports[name]["regions"]))
    for panel in list(axes)[len(methods) :]:
        panel.set_visible(False)
    axes[0].set(xlim=(grid[0], grid[-1]), ylim=_heights(data))
    handles, labels = axes[min(1, len(methods) - 1)].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    figure.suptitle(_question(data), fontsize=14)
    save_figure(figure, path, dpi=90)


def _question(data: CurveData) -> str:
    points = f"{len(data.train.x)} training points"
    if data.truth is None:
        return f"What does each method say about {points}?"
    return f"Which band is right? {points}, none in the middle, with noise that grows to the right"


def _panel(axes: Axes, name: str, data: CurveData, grid: Array, found: Bands, subtitle: str) -> None:
    total, epistemic = BAND * found.total, BAND * found.epistemic
    axes.fill_between(
        grid, found.mean - total, found.mean + total, color=BLUE, alpha=0.18, linewidth=0,
        label="95 % band of a new point",
    )  # fmt: skip
    axes.fill_between(
        grid, found.mean - epistemic, found.mean + epistemic, color=ORANGE, alpha=0.45, linewidth=0,
        label="95 % band of the curve (epistemic)",
    )  # fmt: skip
    for index, line in enumerate(() if found.functions is None else found.functions):
        axes.plot(grid, line, color="black", linewidth=0.5, alpha=0.4, label=None if index else "drawn functions")
    axes.plot(grid, found.mean, color=BLUE, linewidth=1.5, label="mean")
    axes.plot(data.train.x, data.train.y, ".", color=GREY, markersize=2.5, alpha=0.7, label="training points")
    if data.truth is not None:
        _draw_truth(axes, data.truth, grid)
    axes.set_title(f"{name}\n", fontsize=11, fontweight="bold", loc="left")
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=8.5, color=GREY)
    axes.grid(alpha=0.25)


def _draw_truth(axes: Axes, truth: Truth, grid: Array) -> None:
    mean, width = truth.mean(grid), BAND * truth.noise_std(grid)
    axes.plot(grid, mean, color="#D55E00", linestyle="--", linewidth=1.2, label="truth, and its 95 %")
    for edge in (mean - width, mean + width):
        axes.plot(grid, edge, color="#D55E00", linestyle=":", linewidth=1)


def _coverage(regions: Mapping[str, Mapping[str, float]]) -> str:
    """What the 95 % band covers, by region."""
    return "covers " + ", ".join(f"{100 * report['coverage']:.0f} % {region}" for region, report in regions.items())


def _heights(data: CurveData) -> tuple[float, float]:
    """The data with a margin of half their range: bands that leave it are cut."""
    y = np.concatenate([data.train.y, data.test.y])
    low, high = np.quantile(y, [0.002, 0.998])
    return float(low - 0.4 * (high - low)), float(high + 0.4 * (high - low))
