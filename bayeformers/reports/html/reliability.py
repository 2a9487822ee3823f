"""Is it right as often as it says? Accuracy against confidence, or intervals that hold what they promise."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from ...metrics.calibration import bins_of
from .context import Context, section
from .scores import clopper_pearson
from .svg import Panel, grid
from .tables import csv_link

__all__ = ["SHOWN", "reliability"]

SHOWN = 6
"""Methods with a picture of their own; tables hold all."""
LEVELS = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99])
"""Of central intervals that a regression's predictions promise."""
Array = NDArray[Any]


def reliability(context: Context) -> str:
    """A picture for each method, and its bins as a file."""
    if context.test is None:
        return ""
    rows = {name: (_intervals if context.results.is_regression else _bins)(context, name) for name in context.order}
    ends = (0.0, 0.0)
    if not context.results.is_regression:
        ends = _floor([says for says, *_ in rows.values()]), _floor([low for _, _, low, *_ in rows.values()])
    panels = [_panel(context, name, index, rows[name], ends) for index, name in enumerate(context.order[:SHOWN])]
    records = (
        {"method": name, "says": f"{a:.6g}", "right": f"{b:.6g}", "low": f"{c:.6g}", "high": f"{d:.6g}", "inputs": n}
        for name, of in rows.items()
        for a, b, c, d, n in zip(*(part.tolist() for part in of), strict=True)
    )
    more = "" if len(rows) <= SHOWN else f" The pictures show {SHOWN} of {len(rows)} methods, the file all."
    if context.results.is_regression:
        how = (
            "Each point is a central interval of the prediction: what share of the numbers it promises to hold, and "
            "what share it holds. Below the dashed line: too sure of itself."
        )
    else:
        how = (
            "Inputs in bins of equal numbers, by what the method says. Below the dashed line: too sure of itself. The "
            "columns at the foot show how many inputs each confidence has."
        )
    note = (
        f'<p class="note">Bars: exact 95&#8239;% intervals (Clopper and Pearson), each of its own point; one of twenty '
        f"misses by chance.{more} {csv_link('reliability', records)}</p>"
    )
    return section("reliability", "Is it right as often as it says?", f"<p>{how}</p>", grid(panels), note)


def _floor(values: Sequence[Array]) -> float:
    """Where an axis begins: a multiple of 5 % below all values."""
    return max(0.0, float(np.floor(20 * (min(of.min() for of in values) - 0.02)) / 20))


def _bins(context: Context, method: str) -> tuple[Array, ...]:
    """Of each filled bin: mean confidence, accuracy, the ends of its interval, and how many inputs; (K,) each."""
    numbers = context.numbers[method]
    count = min(10, max(3, len(numbers["right"]) // 25))
    bins = bins_of(numbers["confidence"], numbers["right"] > 0.5, count, "mass")
    filled = bins.counts > 0
    says, right, counts = bins.confidence[filled], bins.accuracy[filled], bins.counts[filled]
    return says, right, *clopper_pearson(np.round(right * counts), counts), counts


def _intervals(context: Context, method: str) -> tuple[Array, ...]:
    """Of each level: the level, the share of numbers in its interval, the ends of that, and N; (K,) each."""
    assert context.test is not None  # the caller's
    of: Any = context.test.methods[method]
    errors = np.abs(of.mean - np.asarray(context.test.labels)) / np.sqrt(of.total)
    hits = (errors[None] <= norm.ppf(0.5 + LEVELS / 2)[:, None]).sum(1)
    counts = np.full(len(LEVELS), len(errors))
    return LEVELS, hits / counts, *clopper_pearson(hits, counts), counts


def _panel(
    context: Context, name: str, index: int, rows: tuple[Array, ...], ends: tuple[float, float]
) -> tuple[str, str]:
    says, right, bottom, top, counts = rows
    off = int(((says < bottom) | (says > top)).sum())
    many = "interval" if context.results.is_regression else "bin"
    told = f"{name}: the {many}s promise " + ", ".join(
        f"{100 * a:.0f} % and hold {100 * b:.0f} %" for a, b in zip(says, right, strict=True)
    )
    axes = ("what the interval promises, %", "what it holds, %")
    if not context.results.is_regression:
        axes = ("confidence: what it says, %", "accuracy: what is true, %")
    panel = Panel(
        f"reliability-{index}", f"Reliability of {name}", f"{told}.", (ends[0], 1.0), (ends[1], 1.0), axes,
        (True, True), height=310,
    )  # fmt: skip
    kind = f"m{context.colour(name)}"
    if not context.results.is_regression:
        edges = np.linspace(ends[0], 1.0, 31)
        shares = np.histogram(context.numbers[name]["confidence"], edges)[0] / counts.sum()
        panel.steps(edges, ends[1] + 0.18 * (1 - ends[1]) * shares / max(shares.max(), 1e-12), "n")
    panel.line([max(ends), 1.0], [max(ends), 1.0], "ideal")
    panel.whiskers(says, bottom, top, kind)
    panel.line(says, right, f"{kind} thin")
    panel.dots(says, right, kind)
    judged = f"{off} of {len(says)} {many}s are off the line, beyond their bars"
    return f"<strong>{escape(name)}</strong><small>{judged}</small>", panel.render()
