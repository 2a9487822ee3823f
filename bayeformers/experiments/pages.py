"""The page of an experiment: all methods and sets, and the words of the inputs that it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..ood import word_attributions
from ..posteriors import PointPosterior, Posterior
from ..reports import Comparison, html, rows_with_words

__all__ = ["write_page"]


def write_page(
    path: str | Path,
    comparison: Comparison,
    *,
    title: str,
    about: str = "",
    texts: Sequence[str] = (),
    shown: tuple[str, Posterior, Any] | None = None,
    **options: Any,
) -> Path:
    """Write a comparison as a page, the words of at most 40 inputs coloured by what they add to the epistemic part.

    Args:
        path: of the file.
        comparison: with its methods.
        title: of the page.
        about: a sentence on the inputs.
        texts: columns of the sets that hold the inputs in words.
        shown: the method that is taken apart, its posterior and its tokenizer; a point estimate has no such words.
        options: of `word_attributions`.

    Returns:
        The path.
    """
    results = comparison.page(title=title, about=about, texts=texts)
    if shown is None or isinstance(shown[1], PointPosterior) or not texts:
        return html(results, path)
    method, posterior, tokenizer = shown
    results = replace(results, shown=method)
    rows = rows_with_words(results)
    inputs = [tuple(str(columns[row]) for columns in _columns(comparison, texts)) for row in rows]
    found = word_attributions(posterior, inputs, tokenizer, **options)
    return html(replace(results, words=dict(zip(rows, found, strict=True))), path)


def _columns(comparison: Comparison, texts: Sequence[str]) -> list[list[Any]]:
    """The columns of all sets, one set after the other."""
    return [[value for part in comparison.sets.values() for value in part.columns[name]] for name in texts]
