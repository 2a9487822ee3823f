"""Single inputs: the surest mistakes and the most unfamiliar ones, with their words; and all predictions as a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .context import Context, section
from .frame import WORD_SHARE
from .results import HtmlResults
from .tables import Cell, csv_link, number, percent, table, text

__all__ = ["everything", "mistakes", "mistaken_rows", "strange", "strange_rows"]

SHOWN = 20
LETTERS = 400
"""Of a text in the page; the rest is cut."""
CSV_LETTERS = 300
"""Of a text in the file of all predictions."""


def mistaken_rows(context: Context) -> list[int]:
    """The inputs, by their rows, whose wrong answers the method is surest of; of a regression those furthest off."""
    if context.test is None:
        return []
    numbers = context.numbers[context.results.focus]
    if context.results.is_regression:
        of: Any = context.test.methods[context.results.focus]
        surprise = np.sqrt(numbers["squared"] / of.total)
        order = np.argsort(-surprise, kind="stable")
    else:
        order = np.argsort(-numbers["confidence"], kind="stable")
        order = order[numbers["wrong"][order] > 0.5]
    return [int(row) for row in context.test_rows[order[:SHOWN]]]


def strange_rows(context: Context) -> list[int]:
    """The inputs, by their rows, that are the least familiar."""
    return [int(row) for row in np.argsort(-context.results.strangeness[1], kind="stable")[:SHOWN]]


def mistakes(context: Context) -> str:
    """The surest mistakes of the method that is taken apart."""
    rows, results = mistaken_rows(context), context.results
    heading = "Furthest from what it said" if results.is_regression else "Its surest mistakes"
    if context.test is None:
        return ""
    if not rows:
        return section("mistakes", heading, f"<p>{escape(results.focus)} makes none on these inputs.</p>")
    all_wrong = len(rows) if results.is_regression else int(context.numbers[results.focus]["wrong"].sum())
    what = f"{len(rows)} of {all_wrong:,} wrong answers of" if not results.is_regression else f"{len(rows)} answers of"
    how = "the errors are counted in predicted standard deviations" if results.is_regression else "surest first"
    caption = f"{what} {escape(results.focus)}: {how}"
    return section("mistakes", heading, _legend(results, rows), _rows(context, "mistakes", caption, rows))


def strange(context: Context) -> str:
    """The least familiar inputs."""
    results, rows = context.results, strange_rows(context)
    caption = f"{len(rows)} of {results.size:,} inputs, by {results.strangeness[0]}"
    return section(
        "strange", "Its most unfamiliar inputs", _legend(results, rows), _rows(context, "strange", caption, rows)
    )


def _legend(results: HtmlResults, rows: Sequence[int]) -> str:
    if not any(row in results.words for row in rows):
        return ""
    return (
        f'<p class="note">A word’s ground is the bluer the more the epistemic part falls without it: '
        f'<mark style="--a:{WORD_SHARE // 3}%">a little</mark>, <mark style="--a:{WORD_SHARE}%">{results.top:.2g} or '
        "more</mark>. Words without which it rises have none.</p>"
    )


def _rows(context: Context, name: str, caption: str, rows: list[int]) -> str:
    results, names = context.results, context.results.names
    shown: Any = results.methods[results.focus]
    strangeness = results.strangeness[1]
    found: dict[str, dict[str, Cell]] = {}
    for row in rows:
        cells = {} if results.texts is None else {"text": _text(results, row)}
        if results.is_regression:
            cells |= _numbers(results, shown, row)
        else:
            decided = int(shown.probs[row].argmax())
            cells["says"] = text(names[decided])
            cells["how sure"] = percent(float(shown.probs[row, decided]))
            if results.labelled[rows].any():
                cells["is"] = text(_label(results, row))
            if shown.epistemic is not None:
                cells["epistemic"] = number(float(shown.epistemic[row]))
        if name == "strange" and results.unfamiliarity is not None:
            cells["unfamiliarity"] = number(float(strangeness[row]))
        if results.groups is not None:
            cells["group"] = text(results.groups[row])
        found[f"{row:,}"] = cells
    return table(name, caption, "input", found)


def _numbers(results: HtmlResults, shown: Any, row: int) -> dict[str, Cell]:
    cells = {"says": number(float(shown.mean[row])), "std": number(float(np.sqrt(shown.total[row])))}
    if results.labelled[row]:
        truth = float(np.asarray(results.labels)[row])
        cells["is"] = number(truth)
        cells["off by std"] = number((truth - float(shown.mean[row])) / float(np.sqrt(shown.total[row])), 1)
    return cells


def _label(results: HtmlResults, row: int) -> str:
    return results.names[int(np.asarray(results.labels)[row])] if results.labelled[row] else "–"


def _text(results: HtmlResults, row: int) -> Cell:
    assert results.texts is not None  # the caller's
    whole = str(results.texts[row])
    if row not in results.words:
        cut = whole if len(whole) <= LETTERS else f"{whole[:LETTERS]} …"
        return Cell(f'<span class="words">{escape(cut)}</span>', {"": whole}, is_text=True)
    words = results.words[row]
    parts, length = [], 0
    for word, value in words:
        share = min(max(value, 0.0) / results.top, 1.0)
        inner = escape(word)
        if share > 0.02:
            stripped = word.strip()
            tail = escape(word[len(word.rstrip()) :])
            mark = f'<mark style="--a:{WORD_SHARE * share:.0f}%" title="{value:+.4f}">{escape(stripped)}</mark>'
            inner = mark + tail
        parts.append(inner)
        length += len(word)
        if length > LETTERS:
            parts.append(" …")
            break
    return Cell(f'<span class="words">{"".join(parts)}</span>', {"": whole}, is_text=True)


def everything(context: Context) -> str:
    """All predictions as one file, up to its bytes; of up to four classes all probabilities are in it."""
    link = csv_link("predictions", _records(context))
    said = f"Every input and what each method says of it: {link}. Texts are cut after {CSV_LETTERS} letters there."
    return section("everything", "All predictions", f"<p>{said}</p>")


def _records(context: Context) -> Iterator[dict[str, Any]]:
    results = context.results
    columns: dict[str, Sequence[Any] | NDArray[Any]] = {"input": range(results.size)}
    if results.groups is not None:
        columns["group"] = results.groups
    if results.labels is not None:
        truth = np.asarray(results.labels)
        columns["label"] = [
            ("" if not known else value if results.is_regression else results.names[int(value)])
            for value, known in zip(truth.tolist(), results.labelled, strict=True)
        ]
    if results.unfamiliarity is not None:
        columns["unfamiliarity"] = _short(np.asarray(results.unfamiliarity))
    for name, of in results.methods.items():
        columns |= {f"{name}: {key}": values for key, values in _columns(results, of).items()}
    if results.texts is not None:
        columns["text"] = [str(value)[:CSV_LETTERS] for value in results.texts]
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def _columns(results: HtmlResults, of: Any) -> dict[str, Any]:
    if results.is_regression:
        found: dict[str, Any] = {"mean": _short(of.mean), "variance": _short(of.total)}
    else:
        decided = of.probs.argmax(1)
        found = {"says": [results.names[index] for index in decided], "confidence": _short(of.confidence)}
        if results.num_classes <= 4:
            found |= {f"p({name})": _short(of.probs[:, index]) for index, name in enumerate(results.names)}
        found["entropy"] = _short(of.total)
    return found if of.epistemic is None else {**found, "epistemic": _short(of.epistemic)}


def _short(values: NDArray[Any]) -> list[str]:
    return [f"{value:.5g}" for value in np.asarray(values).tolist()]
