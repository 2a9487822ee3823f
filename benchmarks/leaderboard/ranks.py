"""Which methods differ over several tasks: mean ranks, Friedman's test, Nemenyi's critical difference.

Demšar 2006 (jmlr.org/papers/v7/demsar06a.html). Two methods differ at the 5 % level where their mean ranks over N tasks
are further apart than CD = q sqrt(k (k + 1) / (6 N)), q of the Studentized range of k methods, divided by sqrt(2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import friedmanchisquare, rankdata, studentized_range

LEVEL = 0.05


@dataclass(frozen=True)
class Ranking:
    """Mean ranks of k methods over N tasks, 1 the best.

    Attributes:
        tasks: what the methods were ranked on.
        ranks: mean rank by method, best first.
        p_value: Friedman's, of all methods being equal; NaN where all have the same values everywhere.
        difference: Nemenyi's critical difference.
        least_tasks: the smallest N at which it is below k - 1, the largest difference that mean ranks can have.
    """

    tasks: tuple[str, ...]
    ranks: Mapping[str, float]
    p_value: float
    difference: float
    least_tasks: int

    @property
    def is_informative(self) -> bool:
        """Whether there are tasks enough for any two methods to differ."""
        return len(self.tasks) >= self.least_tasks

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The largest runs of methods, best first, whose mean ranks lie within the critical difference."""
        names, found = list(self.ranks), list[tuple[str, ...]]()
        for i, first in enumerate(names):
            run = tuple(name for name in names[i:] if self.ranks[name] - self.ranks[first] <= self.difference)
            if len(run) > 1 and not (found and set(run) <= set(found[-1])):
                found.append(run)
        return found


def rank(
    values: Mapping[str, Sequence[float]], tasks: Sequence[str], *, lower_is_better: bool = True
) -> Ranking | None:
    """Rank methods by their values, one per task; None with fewer than three methods or two tasks.

    Raises:
        ValueError: a method has another number of values than there are tasks.
    """
    for name, row in values.items():
        if len(row) != len(tasks):
            raise ValueError(f"`values` of {name} must be one per task, got {len(row)} for {len(tasks)} tasks.")
    k, n = len(values), len(tasks)
    if k < 3 or n < 2:
        return None
    table = np.array(list(values.values())) * (1 if lower_is_better else -1)
    means = rankdata(table, axis=0).mean(1)
    p_value = float(friedmanchisquare(*table).pvalue) if np.ptp(table, axis=0).any() else math.nan
    named = sorted(zip(means.tolist(), values, strict=True))
    return Ranking(
        tasks=tuple(tasks),
        ranks={name: mean for mean, name in named},
        p_value=p_value,
        difference=critical_difference(k, n),
        least_tasks=next(count for count in range(1, 10_000) if critical_difference(k, count) < k - 1),
    )


def critical_difference(num_methods: int, num_tasks: int, level: float = LEVEL) -> float:
    """Nemenyi's, of mean ranks.

    >>> round(critical_difference(4, 14), 2)  # Demšar's example: q = 2.569
    1.25
    """
    q = studentized_range.ppf(1 - level, num_methods, math.inf) / math.sqrt(2)
    return float(q * math.sqrt(num_methods * (num_methods + 1) / (6 * num_tasks)))
