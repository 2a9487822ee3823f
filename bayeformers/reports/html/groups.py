"""Where it is good and where not: a table of classes, the pairs it mixes up, and a table of groups."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .context import Context, section
from .results import HtmlResults
from .scores import by_input, clopper_pearson
from .tables import Cell, interval, number, percent, table, text

__all__ = ["classes", "groups"]

MANY = 12
"""Classes of a table that stands open; of more, the rest is one step away."""
CONFUSED = 10
Array = NDArray[Any]


def classes(context: Context) -> str:
    """Each class of the test set: how often it is found, how often its name is right; and what is mixed up most."""
    results = context.test
    if results is None or results.is_regression or results.labels is None:
        return ""
    of: Any = results.methods[results.focus]
    labels, decided = np.asarray(results.labels), of.probs.argmax(1)
    rows = _class_rows(results, of, labels, decided)
    order = sorted(rows, key=lambda name: float(rows[name]["found"].values[""] or 2))
    who = escape(results.focus)
    if len(rows) <= MANY:
        body = table("classes", f"Classes, by {who}", "class", {name: rows[name] for name in order})
    else:
        worst = table(
            "classes-worst", f"The {MANY} classes that {who} finds the least often, of {len(rows)}", "class",
            {name: rows[name] for name in order[:MANY]},
        )  # fmt: skip
        every = table("classes", f"All classes, by {who}", "class", {name: rows[name] for name in order})
        body = f"{worst}<details><summary>All {len(rows)} classes</summary>{every}</details>"
    missing = results.num_classes - len(rows)
    note = f'<p class="note">{missing} of {results.num_classes} classes have no test input.</p>' if missing else ""
    return section("classes", "Class by class", body, note, _confusions(results, labels, decided))


def _class_rows(results: HtmlResults, of: Any, labels: Array, decided: Array) -> dict[str, dict[str, Cell]]:
    rows = {}
    for index, name in enumerate(results.names):
        inside, called = labels == index, decided == index
        size, hits = int(inside.sum()), int((inside & called).sum())
        if size == 0:
            continue
        low, high = (float(end) for end in clopper_pearson(hits, size))
        row = {
            "inputs": number(size, 0),
            "found": interval(hits / size, low, high, digits=1, is_share=True),
            "right when said": percent(hits / int(called.sum()) if called.any() else None),
            "confidence": percent(float(of.confidence[inside].mean())),
        }
        if of.epistemic is not None:
            row["epistemic"] = number(float(of.epistemic[inside].mean()), 4)
        rows[f"{name} ({index})" if name in rows else name] = row
    return rows


def _confusions(results: HtmlResults, labels: Array, decided: Array) -> str:
    if results.num_classes < 3:
        return ""
    pairs, counts = np.unique(np.stack([labels, decided])[:, labels != decided], axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:CONFUSED]
    names, rows = results.names, {}
    for rank, index in enumerate(order, start=1):
        truth, said = (int(value) for value in pairs[:, index])
        times, size = int(counts[index]), int((labels == truth).sum())
        rows[str(rank)] = {
            "is": text(names[truth]), "says": text(names[said]), "times": number(times, 0),
            "of the class": percent(times / size),
        }  # fmt: skip
    return table("confusions", "What it mixes up most", "rank", rows) if rows else ""


def groups(context: Context) -> str:
    """Each group of inputs: errors where there are labels, and how sure it is."""
    results = context.results
    if results.groups is None or len(set(results.groups)) < 2:
        return ""
    member, rows = np.asarray(results.groups), {}
    names = sorted(set(results.groups), key=lambda name: (name in results.apart, name))
    for name in names:
        row = _group_row(results.select(member == name))
        rows[f"{name} (apart)" if name in results.apart else name] = row
    note = ""
    if results.apart:
        note = '<p class="note">Groups that stand apart count in no other number of this page.</p>'
    caption = f"Groups of inputs, by {escape(results.focus)}"
    return section("groups", "Group by group", table("groups", caption, "group", rows), note)


def _group_row(part: HtmlResults) -> dict[str, Cell]:
    shown: Any = part.methods[part.focus]
    row = {"inputs": number(part.size, 0)}
    known = part.labelled
    if known.any():
        of = shown[np.flatnonzero(known)]
        found = by_input(of, np.asarray(part.labels)[known])
        key, share = ("in the 95 % interval", "covered") if part.is_regression else ("accuracy", "right")
        low, high = (float(end) for end in clopper_pearson(found[share].sum(), int(known.sum())))
        if part.is_regression:
            row["RMSE"] = number(float(np.sqrt(found["squared"].mean())))
        row[key] = interval(float(found[share].mean()), low, high, digits=1, is_share=True)
        row["NLL"] = number(float(found["nll"].mean()))
    if part.is_regression:
        row["mean std"] = number(float(np.sqrt(shown.total).mean()))
    else:
        row["confidence"] = percent(float(shown.confidence.mean()))
        row["aleatoric"] = number(float(shown.aleatoric.mean()))
    if shown.epistemic is not None:
        row["epistemic"] = number(float(shown.epistemic.mean()), 4)
    return row
