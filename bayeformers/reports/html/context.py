"""What the sections of a page share: the results, their labelled test inputs, and numbers per input of each method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .results import HtmlResults
from .scores import Score, by_input, scores_of

__all__ = ["Context", "section"]


@dataclass(frozen=True, eq=False)
class Context:
    """Of one page.

    Attributes:
        results: on all inputs.
        num_resamples: of every bootstrap.
        seed: of the bootstraps, and of points left out of a picture.
    """

    results: HtmlResults
    num_resamples: int
    seed: int

    @cached_property
    def test_rows(self) -> NDArray[np.intp]:
        """The labelled inputs of the test set, which scores are about."""
        return np.flatnonzero(self.results.labelled & self.results.is_test)

    @cached_property
    def test(self) -> HtmlResults | None:
        """The results on these; None where there are none."""
        if not self.test_rows.size:
            return None
        mask = np.zeros(self.results.size, dtype=bool)
        mask[self.test_rows] = True
        return self.results.select(mask)

    @cached_property
    def numbers(self) -> dict[str, dict[str, NDArray[Any]]]:
        """By method, numbers per input of the test set."""
        if self.test is None or self.test.labels is None:
            return {}
        labels = self.test.labels
        return {name: by_input(of, labels) for name, of in self.test.methods.items()}

    @property
    def scores(self) -> Mapping[str, Score]:
        """The scores of this kind of head."""
        return scores_of(self.results.num_classes)

    @property
    def order(self) -> list[str]:
        """Methods, the one that is taken apart first."""
        focus = self.results.focus
        return [focus, *(name for name in self.results.methods if name != focus)]

    def colour(self, method: str) -> int:
        """Number of the method's colour and dashes."""
        return list(self.results.methods).index(method) % 6


def section(name: str, heading: str, *parts: str) -> str:
    """Return a part of the page under a heading; nothing where it has nothing to say.

    Args:
        name: an id of the page.
        heading: HTML.
        *parts: HTML, one below the other.
    """
    body = "\n".join(part for part in parts if part)
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{heading}</h2>\n{body}\n</section>' if body else ""
