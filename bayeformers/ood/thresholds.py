"""From scores to a decision: the threshold of a false-alarm rate, and what holds of it at a finite number of rows.

With n calibration rows exchangeable with the inputs to come, k = ceil((n + 1)(1 - alpha)) and t the k-th smallest
score, an input of the familiar kind is flagged (score > t) with probability at most alpha over both draws, and at least
alpha - 1/(n + 1) where no two scores are equal (Vovk et al. 2005, ch. 2; split conformal prediction). Given the
calibration rows the false-alarm rate is itself random: without ties it has the law Beta(n + 1 - k, k).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_count, check_number, is_real
from ..metrics.conformal import conformal_rank, least_rows

__all__ = ["false_alarm_interval", "threshold"]


def threshold(scores: Tensor | Sequence[float], false_alarm_rate: float = 0.05) -> float:
    """Return the score above which an input is flagged as unfamiliar.

    It is the ceil((n + 1)(1 - rate))-th smallest of n calibration scores: an input that is exchangeable with the
    calibration rows has a score *greater* than it with probability at most ``false_alarm_rate``, whatever the scores'
    distribution. Equal scores are flagged together or not at all, so ties only lower the rate.

    Args:
        scores: of familiar rows that nothing was fitted to, (n,), higher for the less familiar.
        false_alarm_rate: alpha, above 0 and below 1; n must be at least 1/alpha - 1.

    Returns:
        One of the scores.

    Raises:
        ValueError: a score is NaN, the rate is not above 0 and below 1, or there are too few scores for it.

    >>> threshold([0.1 * i for i in range(19)], 0.05), threshold([0.0, 0.0, 1.0, 0.0], 0.25)
    (1.8, 1.0)
    """
    values, rate = _checked_scores(scores), _checked_rate(false_alarm_rate)
    rank = _rank(len(values), rate)
    return float(values.sort().values[rank - 1])


def false_alarm_interval(num_rows: int, false_alarm_rate: float = 0.05, level: float = 0.95) -> tuple[float, float]:
    """Return the central interval of the false-alarm rate that `threshold` will have, over draws of calibration rows.

    Args:
        num_rows: n, the number of calibration rows.
        false_alarm_rate: alpha that was asked for.
        level: the probability that the interval holds the rate, of scores without ties; with ties the rate is lower.

    Returns:
        Quantiles of Beta(n + 1 - k, k), k = ceil((n + 1)(1 - alpha)).

    Raises:
        ValueError: an argument is out of range, or there are too few rows for the rate.

    >>> [round(end, 3) for end in false_alarm_interval(1000)]
    [0.037, 0.064]
    """
    from scipy.stats import beta

    check_count("num_rows", num_rows, 1)
    check_number("level", level, 0.0, 1.0, strict=True)
    rank = _rank(num_rows, _checked_rate(false_alarm_rate))
    ends = beta.ppf([0.5 - level / 2, 0.5 + level / 2], num_rows + 1 - rank, rank)
    return float(ends[0]), float(ends[1])


def _rank(count: int, rate: float) -> int:
    rank = conformal_rank(count, rate)
    if rank > count:
        raise ValueError(
            f"`scores` has {count} rows, too few for `false_alarm_rate`={rate:g}: no threshold keeps it with fewer "
            f"than {least_rows(rate)}. Of a density they are its calibration rows: give `fit_density` "
            "more `validation` rows."
        )
    return rank


def _checked_rate(rate: float) -> float:
    if not is_real(rate) or not 0 < rate < 1:
        raise ValueError(f"`false_alarm_rate` must be above 0 and below 1, got {rate!r}.")
    return float(rate)


def _checked_scores(scores: Tensor | Sequence[float]) -> Tensor:
    try:
        values = torch.as_tensor(scores, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`scores` must be numbers, (n,), got {type(scores).__name__}.") from error
    if values.dim() != 1 or len(values) == 0 or bool(values.isnan().any()):
        raise ValueError(f"`scores` must be (n,) numbers with n >= 1 and no NaN, got the shape {tuple(values.shape)}.")
    return values
