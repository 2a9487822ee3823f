r"""Thresholds of split conformal prediction, one per group of rows, and the law of the coverage that they give.

Of n calibration scores exchangeable with a new one, the threshold q is the k-th smallest, k = ceil((n + 1)(1 - alpha)):

    1 - alpha  <=  P(score <= q)  <=  1 - alpha + 1/(n + 1)

over both draws, the upper bound where no two scores are equal (Vovk et al. 2005; Lei et al. 2018, theorem 2.2). Given
the calibration rows the coverage is a random number: without ties its law is Beta(k, n + 1 - k), with ties it lies
above (Vovk 2012, arXiv 1209.2673). Where k > n no score is high enough, and q is infinite. Within groups that are fixed
before the scores are seen (a class, a value of a column) all this holds group by group ("Mondrian", Vovk et al. 2005,
section 4.5).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check_count, check_number, is_real, plain
from ..metrics.conformal import conformal_rank, least_rows

__all__ = ["Cutoff", "Cutoffs", "check_alpha", "conformal_quantile", "coverage_interval", "group_keys", "real_vector"]

logger = logging.getLogger(__name__)

ALL = "all"
"""The key of the one group where rows are not told apart."""


def conformal_quantile(scores: Tensor | Sequence[float], alpha: float) -> float:
    """Return the ceil((n + 1)(1 - alpha))-th smallest of n scores; infinity where n is below 1/alpha - 1.

    Args:
        scores: of calibration rows, (n,); infinities are allowed.
        alpha: the share above 0 and below 1 of new scores that may exceed it.

    Raises:
        ValueError: a score is NaN, or alpha is out of range.

    >>> conformal_quantile([3.0, 1.0, 2.0], 0.25), conformal_quantile([3.0, 1.0, 2.0], 0.2)
    (3.0, inf)
    """
    values, alpha = real_vector("scores", scores, allow_empty=True), check_alpha(alpha)
    rank = conformal_rank(len(values), alpha)
    return float(values.kthvalue(rank).values) if rank <= len(values) else math.inf


def coverage_interval(num_rows: int, alpha: float = 0.1, level: float = 0.95) -> tuple[float, float]:
    """Return the central interval of the coverage that n calibration rows will give, of scores without ties.

    Args:
        num_rows: n.
        alpha: the share of misses that was asked for.
        level: the probability that the interval holds the coverage, over draws of the calibration rows.

    Returns:
        Quantiles of Beta(k, n + 1 - k), k = ceil((n + 1)(1 - alpha)); (1, 1) where the threshold is infinite.

    Raises:
        ValueError: an argument is out of range.

    >>> [round(end, 3) for end in coverage_interval(1000)], coverage_interval(5)
    ([0.881, 0.918], (1.0, 1.0))
    """
    from scipy.stats import beta

    check_count("num_rows", num_rows, 0)
    check_number("level", level, 0.0, 1.0, strict=True)
    rank = conformal_rank(num_rows, check_alpha(alpha))
    if rank > num_rows:
        return 1.0, 1.0
    ends = beta.ppf([0.5 - level / 2, 0.5 + level / 2], rank, num_rows + 1 - rank)
    return float(ends[0]), float(ends[1])


@dataclass(frozen=True)
class Cutoff:
    """The largest score that is let in, and how many calibration rows it rests on."""

    threshold: float
    num_rows: int


class Cutoffs(dict[Hashable, Cutoff]):
    """By group; a group without calibration rows has an infinite threshold: nothing is known of it."""

    @classmethod
    def of(
        cls,
        quantile: Callable[[list[int]], float],
        keys: Sequence[Hashable],
        alpha: float,
        expected: Iterable[Hashable] = (),
    ) -> Cutoffs:
        """Take each group's threshold.

        Args:
            quantile: from the numbers of a group's rows to its threshold.
            keys: the group of each calibration row.
            alpha: the share of misses allowed in each group.
            expected: groups that will be asked for, whether or not they have rows.

        Returns:
            The cutoffs; a warning names groups with too few rows for a finite threshold.
        """
        rows: dict[Hashable, list[int]] = {key: [] for key in expected}
        for number, key in enumerate(keys):
            rows.setdefault(key, []).append(number)
        few = [key for key, own in rows.items() if conformal_rank(len(own), alpha) > len(own)]
        if few:
            whose = "" if few == [ALL] else f" of {few[:5]} ({len(few)} of {len(rows)} groups)"
            logger.warning(
                "Too few calibration rows%s for alpha=%g: it takes %d to leave anything out, so nothing is%s.",
                whose,
                alpha,
                least_rows(alpha),
                "" if few == [ALL] else " there",
            )
        return cls({key: Cutoff(quantile(own), len(own)) for key, own in rows.items()})

    def thresholds(self, keys: Sequence[Hashable]) -> Tensor:
        """Look up the threshold of each key, (len(keys),) in float64."""
        known = {key: self[key].threshold if key in self else math.inf for key in dict.fromkeys(keys)}
        return torch.tensor([known[key] for key in keys], dtype=torch.float64)

    def to_list(self) -> list[list[Any]]:
        """[key, threshold, rows] of every group, as JSON has them: an infinite threshold is null."""
        return [
            [plain(key), cutoff.threshold if math.isfinite(cutoff.threshold) else None, cutoff.num_rows]
            for key, cutoff in self.items()
        ]

    @classmethod
    def from_list(cls, entries: Any) -> Cutoffs:
        """Return what `to_list` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            return cls({
                key: Cutoff(math.inf if value is None else float(value), int(count)) for key, value, count in entries
            })
        except (TypeError, ValueError) as error:
            raise ValueError(f"`cutoffs` must be a list of [key, threshold or null, rows], got {entries!r}.") from error


def check_alpha(alpha: Any) -> float:
    """Return alpha as a float.

    Raises:
        ValueError: it is no number above 0 and below 1.
    """
    if not is_real(alpha) or not 0 < alpha < 1:
        raise ValueError(f"`alpha` is the share of misses allowed, above 0 and below 1 (such as 0.1), got {alpha!r}.")
    return float(alpha)


def real_vector(name: str, values: Any, *, allow_empty: bool = False) -> Tensor:
    """Return numbers (n,) as float64 on the CPU.

    Args:
        name: the argument's, for the message.
        values: a tensor or a sequence; infinities are allowed.
        allow_empty: whether n may be 0.

    Raises:
        ValueError: they are no numbers, have another number of axes, or hold a NaN.
    """
    try:
        vector = torch.as_tensor(values).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`{name}` must be numbers, (n,), got {type(values).__name__}.") from error
    if vector.dim() != 1 or (not allow_empty and len(vector) == 0) or bool(vector.isnan().any()):
        what = f"the shape {tuple(vector.shape)}{' with NaN' if bool(vector.isnan().any()) else ''}"
        raise ValueError(f"`{name}` must be (n,) numbers without NaN{'' if allow_empty else ', n >= 1'}, got {what}.")
    return vector


def group_keys(groups: Any, num_rows: int) -> list[Hashable]:
    """Return the group of every row as a string or an integer, which JSON keeps.

    Args:
        groups: a sequence, array or tensor, (n,).
        num_rows: n.

    Raises:
        ValueError: another number of them, or a group that is no string, integer or bool.
    """
    if isinstance(groups, (str, bytes)) or not hasattr(groups, "__len__"):
        raise ValueError(f"`groups` must be one group per row, {num_rows} of them, got {groups!r}.")
    values = groups.tolist() if isinstance(groups, (Tensor, np.ndarray)) else list(groups)
    if len(values) != num_rows:
        raise ValueError(f"`groups` must be one group per row, {num_rows} of them, got {len(values)}.")
    keys = [plain(value) for value in values]
    wrong = [key for key in keys if not isinstance(key, (str, int))]
    if wrong:
        raise ValueError(f"`groups` must be strings or whole numbers, got {wrong[0]!r} ({type(wrong[0]).__name__}).")
    return keys
