"""The one rank that split conformal prediction rests on (Vovk et al. 2005, ch. 2; Lei et al. 2018, section 2.2).

With n calibration scores exchangeable with a new one, and k = ceil((n + 1)(1 - alpha)), the new score exceeds the k-th
smallest with probability at most alpha, whatever their law; without ties with probability at least alpha - 1/(n + 1).
"""

import math

__all__ = ["conformal_rank", "least_rows"]

_ROUNDING = 1e-9
"""Slack of (n + 1) alpha, so that a whole product of a decimal alpha stays whole."""


def conformal_rank(num_rows: int, alpha: float) -> int:
    """Return k = ceil((n + 1)(1 - alpha)); n + 1 where n rows are too few, and the threshold is infinite.

    >>> [conformal_rank(n, 0.05) for n in (18, 19, 38, 39)], conformal_rank(9, 1 - 0.9)
    ([19, 19, 38, 38], 9)
    """
    return num_rows + 1 - math.floor((num_rows + 1) * alpha + _ROUNDING)


def least_rows(alpha: float) -> int:
    """Return the smallest n whose threshold is finite, ceil(1 / alpha) - 1.

    >>> [least_rows(alpha) for alpha in (0.1, 0.05, 0.3)]
    [9, 19, 3]
    """
    return math.ceil(1 / alpha - _ROUNDING) - 1
