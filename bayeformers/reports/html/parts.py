"""What cannot be known, and what was not learned: the two parts of a method's uncertainty, by right and wrong."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ... import metrics
from .context import Context, section
from .results import HtmlResults
from .svg import Panel, grid
from .tables import Cell, interval, number, table

__all__ = ["parts"]

DRAWN = 1200
"""Points of a picture; of more inputs as many are drawn at random."""
_SCORES = {"max_probability": "1 − confidence"}
Array = NDArray[Any]


def parts(context: Context) -> str:
    """Both parts against each other, the distribution of each, and which of them tells errors and other groups."""
    results = context.test if context.test is not None else context.results
    shown: Any = results.methods[context.results.focus]
    heading = "What cannot be known, what was not learned"
    if shown.epistemic is None:
        how = (
            f"{escape(results.focus)} is a point estimate: it cannot say which part of its doubt more data would mend."
        )
        return section("parts", heading, f"<p>{how}</p>", _tables(context))
    regression = results.is_regression
    aleatoric = np.broadcast_to(np.asarray(shown.aleatoric), (results.size,))
    pair = [np.sqrt(part) if regression else np.asarray(part) for part in (aleatoric, np.maximum(shown.epistemic, 0))]
    groups = _right_and_wrong(context, results)
    unit = "std" if regression else "nats"
    names = (f"aleatoric, {unit}", f"epistemic, {unit}")
    tops = [float(np.quantile(values, 0.998)) or 1.0 for values in pair]
    panels = [_scatter(context, pair, groups, names, tops)]
    panels += [_density(index, pair[index], groups, names[index], tops[index]) for index in (0, 1)]
    how = (
        f"{escape(results.focus)}: the aleatoric part is noise that more data would not take away; the epistemic part "
        "is where networks that fit the training data differ, and more data would help."
    )
    beware = results.caveats.get(results.focus)
    warned = f'<p class="caveat"><strong>Not to be believed.</strong> {escape(beware)}</p>' if beware else ""
    drawn = f" {DRAWN:,} of {results.size:,} inputs, drawn at random, are points." if results.size > DRAWN else ""
    end = "Values beyond the 99.8&#8239;% quantile stand at the edge."
    note = f'<p class="note">{end}{drawn}</p>'
    return section("parts", heading, f"<p>{how}</p>", warned, grid(panels), note, _tables(context))


def _right_and_wrong(context: Context, results: HtmlResults) -> dict[str, Array]:
    """By name, a mask of inputs: right and wrong ones; of a regression those within its 95 % interval and beyond."""
    if context.test is None:
        return {"all": np.ones(results.size, dtype=bool)}
    numbers = context.numbers[results.focus]
    good = numbers["covered"] > 0.5 if results.is_regression else numbers["wrong"] < 0.5
    first, second = ("within", "beyond") if results.is_regression else ("right", "wrong")
    return {first: good, second: ~good}


def _kinds(groups: dict[str, Array]) -> list[tuple[str, Array, str]]:
    return [(name, mask, kind) for (name, mask), kind in zip(groups.items(), ("right", "wrong"), strict=False)]


def _scatter(
    context: Context, pair: list[Array], groups: dict[str, Array], names: tuple[str, str], tops: list[float]
) -> tuple[str, str]:
    size = len(pair[0])
    drawn = np.zeros(size, dtype=bool)
    chosen = np.random.default_rng(context.seed).permutation(size)[:DRAWN]
    drawn[chosen] = True
    medians = "; ".join(
        f"{name}: median aleatoric {np.median(pair[0][mask]):.3g}, epistemic {np.median(pair[1][mask]):.3g}"
        for name, mask in groups.items()
        if mask.any()
    )
    panel = Panel("parts-0", "Epistemic against aleatoric part", f"{medians}.", (0, tops[0]), (0, tops[1]), names)
    for _, mask, kind in _kinds(groups):
        x, y = (values[mask & drawn].clip(0, top) for values, top in zip(pair, tops, strict=True))
        (panel.dots if kind == "right" else panel.crosses)(x, y, kind)
    return f"<strong>Both parts</strong>{_legend(groups)}", panel.render()


def _density(index: int, values: Array, groups: dict[str, Array], name: str, top: float) -> tuple[str, str]:
    edges = np.linspace(0, top, 26)
    shares = {
        key: np.histogram(values[mask].clip(0, top), edges)[0] / max(int(mask.sum()), 1) for key, mask in groups.items()
    }
    highest = max(float(of.max()) for of in shares.values()) or 1.0
    means = "; ".join(f"{key}: mean {values[mask].mean():.3g}" for key, mask in groups.items() if mask.any())
    title = name.partition(",")[0].capitalize()
    panel = Panel(
        f"parts-{index + 1}", f"{title} part", f"{means}.", (0, top), (0, 1.05 * highest),
        (name, "share of each, %"), (False, True),
    )  # fmt: skip
    for key, _, kind in _kinds(groups):
        panel.steps(edges, shares[key], kind)
    return f"<strong>{title}</strong><small>{means}</small>", panel.render()


def _legend(groups: dict[str, Array]) -> str:
    marks = {"right": "●", "wrong": "✕"}
    return "<small>" + " ".join(
        f'<span class="k-{kind}">{marks[kind]}</span> {name} ({int(mask.sum()):,})'
        for name, mask, kind in _kinds(groups)
    ) + "</small>"  # fmt: skip


def _tables(context: Context) -> str:
    found = [_errors_table(context)]
    found += [_apart_table(context, group) for group in context.results.apart]
    return "".join(found)


def _errors_table(context: Context) -> str:
    """Which score tells wrong answers, for every method."""
    if context.test is None or context.results.is_regression:
        return ""
    rows: dict[str, dict[str, Cell]] = {}
    for name in context.order:
        of: Any = context.test.methods[name]
        doubts = {"1 − confidence": 1 - of.confidence, "entropy": of.total, "aleatoric": of.aleatoric}
        doubts |= {} if of.epistemic is None else {"epistemic": of.epistemic}
        rows[name] = {key: _auroc(context, values, context.numbers[name]["wrong"]) for key, values in doubts.items()}
    caption = "AUROC of telling wrong answers from right ones, by"
    return table("telling-errors", caption, "method", rows)


def _apart_table(context: Context, group: str) -> str:
    """Which score tells the inputs of a group from the test set."""
    results = context.results
    inside, outside = results.is_test, np.asarray(results.groups) == group
    rows = {}
    for name in context.order:
        scores = {_SCORES.get(key, key): of for key, of in results.methods[name].ood_scores.items()}
        if name == results.focus and results.unfamiliarity is not None:
            scores["unfamiliarity"] = np.asarray(results.unfamiliarity, dtype=np.float64)
        told = np.repeat([0.0, 1.0], [inside.sum(), outside.sum()])
        rows[name] = {
            key: _auroc(context, np.concatenate([values[inside], values[outside]]), told)
            for key, values in scores.items()
        }
    caption = f"AUROC of telling the group <em>{escape(group)}</em> from the test set, by"
    return table(f"telling-{results.apart.index(group)}", caption, "method", rows)


def _auroc(context: Context, score: ArrayLike, truth: Array) -> Cell:
    try:
        found = metrics.bootstrap_ci(
            metrics.ood_auroc, np.asarray(score, dtype=np.float64), truth,
            num_resamples=context.num_resamples, seed=context.seed,
        )  # fmt: skip
    except metrics.UndefinedMetricError:
        return number(None)
    return interval(found.estimate, found.low, found.high)
