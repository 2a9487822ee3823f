"""The top of a page: what was found, the main numbers with intervals, and methods against the first."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from ..report import ClassPredictions
from .context import Context, section
from .scores import estimate, paired
from .tables import Cell, interval, number, percent, table

__all__ = ["comparison", "headline", "summary"]


def summary(context: Context) -> str:
    """The title, what the page is about, and its first finding."""
    results = context.results
    tested = int(context.test_rows.size)
    what = "numbers" if results.is_regression else f"{results.num_classes:,} class{'es' * (results.num_classes != 1)}"
    facts = [f"{results.size:,} inputs", what]
    if 0 < tested < results.size:
        facts.insert(1, f"{tested:,} of them test inputs with a label")
    count = len(results.methods)
    facts.append(f"{count} method{'s' * (count != 1)}")
    about = f"<p>{escape(results.about)}</p>" if results.about else ""
    return (
        f'<header><h1>{escape(results.title)}</h1><p class="facts">{" · ".join(facts)}</p>{about}'
        f'<p class="finding">{_finding(context)}</p></header>'
    )


def _finding(context: Context) -> str:
    results, focus = context.results, f"<strong>{escape(context.results.focus)}</strong>"
    if context.test is None:
        return f"No input has a label: what {focus} says cannot be checked here, only how sure it is."
    numbers, size = context.numbers[results.focus], f"{context.test_rows.size:,}"
    if results.is_regression:
        share, low, high = estimate(context.scores["in the 95 % interval"], numbers, num_resamples=1, seed=0)
        return (
            f"{focus}’s 95&#8239;% intervals hold {_percent(share)} of {size} test numbers "
            f"({_percent(low)} to {_percent(high)})."
        )
    share, low, high = estimate(context.scores["accuracy"], numbers, num_resamples=1, seed=0)
    says = float(numbers["confidence"].mean())
    assert share is not None and low is not None and high is not None  # a share of at least one input
    gap = f"{100 * abs(says - share):.1f} points"
    judged = "as often as it says, within the interval of its accuracy"
    if not low <= says <= high:
        judged = f"it is too {'sure of itself' if says > share else 'cautious'} by {gap}"
    return (
        f"{focus} is right on {_percent(share)} of {size} test inputs ({_percent(low)} to {_percent(high)}) and says "
        f"{_percent(says)} on average: {judged}."
    )


def _percent(value: float | None) -> str:
    return percent(value).shown


def headline(context: Context) -> str:
    """One table: every score of every method with its interval; without labels how sure each method is."""
    rows, inside = {}, np.flatnonzero(context.results.is_test)  # groups that stand apart have numbers of their own
    for name, every in context.results.methods.items():
        of = every[inside]
        row: dict[str, Cell] = {}
        if context.test is not None:
            for key, score in context.scores.items():
                found = estimate(score, context.numbers[name], num_resamples=context.num_resamples, seed=context.seed)
                row[key] = interval(*found, digits=1 if score.is_share else 3, is_share=score.is_share)
        if context.results.is_regression:
            row["mean std"] = number(float((of.total**0.5).mean()))
        elif context.test is None and isinstance(of, ClassPredictions):
            row["says on average"] = percent(float(of.confidence.mean()))
        row["epistemic"] = number(None if of.epistemic is None else float(of.epistemic.mean()), 4)
        rows[name] = row
    unit = "variance, in squared units" if context.results.is_regression else "part of the entropy, in nats"
    caption = "The main numbers, with 95&#8239;% intervals" if context.test is not None else "How sure each method is"
    note = f'<p class="note">Epistemic: mean {unit}, that comes of not knowing the weights.</p>'
    return section("numbers", "In numbers", table("numbers", caption, "method", rows, arrows=_better(context)), note)


def _better(context: Context) -> dict[str, str]:
    return {key: score.better for key, score in context.scores.items()}


def comparison(context: Context) -> str:
    """Each method against the first, both on the same resamples of the inputs."""
    if context.test is None or len(context.numbers) < 2:
        return ""
    first, *others = context.numbers
    rows: dict[str, dict[str, Cell]] = {}
    for name in others:
        rows[name] = {}
        for key, score in context.scores.items():
            found = paired(
                score, context.numbers[name], context.numbers[first],
                num_resamples=context.num_resamples, seed=context.seed,
            )  # fmt: skip
            if found is None:
                rows[name][key] = Cell("–", {"": "", "_low": "", "_high": ""})
                continue
            sign = _sign(found.estimate, found.excludes_zero, score.better)
            how: dict[str, Any] = {"digits": 1 if score.is_share else 3, "is_share": score.is_share, "sign": sign}
            rows[name][key] = interval(found.estimate, found.low, found.high, **how)
    caption = f"Difference from <em>{escape(first)}</em>, with paired 95&#8239;% intervals"
    note = (
        '<p class="note">Both methods are scored on the same resamples of the inputs, so that how hard an input is '
        "cancels: these intervals are much narrower than two separate ones. ▲ better and ▼ worse stand where the "
        "interval excludes zero. Differences of shares are in percentage points.</p>"
    )
    compared = table("comparison", caption, "method", rows, arrows=_better(context))
    return section("comparison", "What one method adds to another", compared, note)


def _sign(value: float, is_settled: bool, better: str) -> str:
    """An arrow before a difference whose interval excludes zero, and room where it does not."""
    if not (is_settled and better):
        return " "
    good = (value > 0) == (better == "higher")
    return '<span class="good" title="better">▲</span> ' if good else '<span class="bad" title="worse">▼</span> '
