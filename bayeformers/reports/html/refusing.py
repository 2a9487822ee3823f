"""What refusing buys: the errors that remain among the surest answers, and how much to refuse for a target."""

from __future__ import annotations

from html import escape
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ... import metrics
from .context import Context, section
from .reliability import SHOWN
from .scores import clopper_pearson
from .svg import Panel, grid
from .tables import Cell, csv_link, number, percent, table

__all__ = ["refusing"]

TARGETS = (0.8, 0.9, 0.95, 0.99)
POINTS = 101
"""Of a curve."""
MOST_RESAMPLES = 200
"""Of a curve's band."""
SHARES = (1.0, 0.9, 0.8, 0.7, 0.5)
"""Of answered inputs, in a regression's table."""
Array = NDArray[Any]


class Curve(NamedTuple):
    """Risk of the surest inputs, at most `POINTS` values each; the risk of a regression is its RMSE."""

    coverage: Array
    risk: Array
    low: Array
    high: Array

    def at(self, share: float) -> float:
        """The risk where so large a share is answered."""
        return float(self.risk[min(int(np.searchsorted(self.coverage, share - 1e-9)), len(self.risk) - 1)])


def refusing(context: Context) -> str:
    """The curves with a band, a table of targets, and the policy's words."""
    policy = context.results.policy
    said = f'<p class="policy"><strong>The policy.</strong> {escape(policy)}</p>' if policy else ""
    heading = "What refusing buys"
    if context.test is None:
        return section("refusing", heading, said)
    curves = {name: _curve(context, name) for name in context.order}
    records = (
        {"method": name, "answered": f"{a:.6g}", "risk": f"{b:.6g}", "low": f"{c:.6g}", "high": f"{d:.6g}"}
        for name, of in curves.items()
        for a, b, c, d in zip(*(part.tolist() for part in of), strict=True)
    )
    how = "The inputs that a method is surest of come first; what is left of them is refused. Lower is better."
    if context.results.is_regression:
        note = "Band: 95&#8239;% of resamples of the inputs."
        risks = table("refusing", "Root mean squared error of the surest", "method", _rmse_rows(curves))
    else:
        note = (
            "Band: exact 95&#8239;% interval of the error rate at each point, the order being taken as it is. A "
            "threshold read off this picture promises nothing for new inputs: fit a policy for that."
        )
        risks = table(
            "refusing", "How much to refuse for a target accuracy, on these inputs", "method", _target_rows(context)
        )
    note = f'<p class="note">{note} {csv_link("risk-coverage", records)}</p>'
    return section("refusing", heading, said, f"<p>{how}</p>", grid(_panels(context, curves)), note, risks)


def _order(context: Context, method: str) -> tuple[Array, Array]:
    """How sure, and the error, of each test input."""
    numbers = context.numbers[method]
    if context.results.is_regression:
        assert context.test is not None  # the caller's
        return -np.asarray(context.test.methods[method].total), numbers["squared"]
    return numbers["confidence"], numbers["wrong"]


def _curve(context: Context, method: str) -> Curve:
    sure, errors = _order(context, method)
    curve = metrics.risk_coverage_curve(sure, errors)
    size = len(errors)
    kept = np.unique(np.linspace(0, size - 1, min(size, POINTS)).round().astype(int))
    coverage, risk = curve.coverage[kept], curve.risk[kept]
    if not context.results.is_regression:
        return Curve(coverage, risk, *clopper_pearson((risk * (kept + 1)).clip(0, kept + 1), kept + 1))
    generator = np.random.default_rng(context.seed)
    indices = (generator.integers(size, size=size) for _ in range(min(context.num_resamples, MOST_RESAMPLES)))
    drawn = [metrics.risk_coverage_curve(sure[index], errors[index]).risk[kept] for index in indices]
    low, high = np.sqrt(np.quantile(drawn, [0.025, 0.975], axis=0))
    return Curve(coverage, np.sqrt(risk), low, high)


def _panels(context: Context, curves: dict[str, Curve]) -> list[tuple[str, str]]:
    """One picture for the method that is taken apart, with its band and the others as lines behind it."""
    focus, size = context.results.focus, context.test_rows.size
    starts = {
        name: int(np.searchsorted(of.coverage, 0.05)) for name, of in curves.items()
    }  # before it bands say little
    top = max(float(of.high[starts[name] :].max()) for name, of in curves.items()) or 1.0
    unit = "root mean squared error" if context.results.is_regression else "of these answers wrong, %"
    panels = []
    for index, name in enumerate(context.order[:SHOWN]):
        curve = curves[name]
        told = ", ".join(f"{100 * share:.0f} % answered: {curve.at(share):.3g}" for share in (0.25, 0.5, 0.75, 1.0))
        panel = Panel(
            f"refusing-{index}", f"Risk against coverage of {name}", f"Risk of {name} at {told}.", (0.0, 1.0),
            (0.0, 1.02 * top), ("inputs answered, surest first, %", unit), (True, not context.results.is_regression),
        )  # fmt: skip
        kind = f"m{context.colour(name)}"
        start = int(np.searchsorted(curve.coverage, min(5 / size, 0.5)))  # of fewer inputs a risk says nothing
        if name != focus:
            panel.line(curves[focus].coverage[start:], curves[focus].risk[start:], "ideal")
        panel.band(curve.coverage[start:], curve.low[start:], curve.high[start:], kind)
        panel.line(curve.coverage[start:], curve.risk[start:], kind)
        area = metrics.aurc(*_order(context, name))
        beside = "" if name == focus else f"; dashed: {escape(focus)}"
        panels.append((f"<strong>{escape(name)}</strong><small>AURC {area:.4f}{beside}</small>", panel.render()))
    return panels


def _target_rows(context: Context) -> dict[str, dict[str, Cell]]:
    rows: dict[str, dict[str, Cell]] = {}
    for name in context.order:
        found = metrics.refusal_table(*_order(context, name), TARGETS)
        row = {"accuracy, refusing nothing": percent(1 - float(context.numbers[name]["wrong"].mean()))}
        for one in found:
            reached = one.refused < 1
            cell = percent(one.refused if reached else None)
            row[f"refuse for {100 * one.target_accuracy:.0f} %"] = cell if reached else Cell("never", {"": ""})
        rows[name] = row
    return rows


def _rmse_rows(curves: dict[str, Curve]) -> dict[str, dict[str, Cell]]:
    return {
        name: {f"{100 * share:.0f} %": number(curve.at(share)) for share in SHARES} for name, curve in curves.items()
    }
