r"""Exact bounds on the risk of the answers that are given, over all thresholds at once.

Of n rows with scores and errors in {0, 1}, drawn independently from any distribution, let R(t) = P(error | score >= t),
N(t) the number of rows with score >= t and K(t) their errors. At one t that is fixed in advance K(t) is Binomial(N(t),
R(t)), and R(t) <= a is shown at level d where P(Binomial(N, a) <= K) <= d (Clopper & Pearson 1934). A threshold that
is chosen by the same rows needs a bound over all of them: `error_allowance` gives numbers c_1 .. c_n for which

    P(some t has K(t) <= c_{N(t)} although R(t) > a) <= d,

whatever the distribution of scores and errors, ties included. With them every threshold with K(t) <= c_{N(t)} is
certified, and the one that answers the most may be taken.

*Proof.* Rank rows from the surest on, equal scores by independent uniform numbers; let g(t) = E[error - a; score >= t].
R(t) > a where g(t) > 0; let B be these t, a union of intervals on each of which g rises from 0. Couple the errors of
the rows with a sequence of independent Bernoulli(a) variables F, by blocks between the ends of these intervals. On a
complete block g returns to 0, so that given its number of rows its errors are as many as F's in distribution: let them
be equal. On a block inside of B the errors lie, given their number, higher in the ranking than uniformly, because
g > 0, and the right answers lower; moving them so from F's uniform places only raises the errors among the first m of
the block, for every m. In the last block, where g ends above 0, take errors away until it ends at 0. So
K(t) >= F_{N(t)} for all t in B at once, and P(exists m: F_m <= c_m), which `crossing_probability` computes exactly,
bounds the failure. Equal scores are answered together: their thresholds are some of those of the proof, which is why
ties need nothing.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..checks import check_count, is_real

__all__ = [
    "check_share", "clopper_pearson", "crossing_probability", "error_allowance", "least_examples", "smallest_refusal",
]  # fmt: skip

_STEPS = 22
_TAIL = 1e-13


def clopper_pearson(errors: int, count: int, confidence: float = 0.9) -> float:
    """Return the exact upper bound on a risk, of errors in a number of independent answers that was fixed in advance.

    Args:
        errors: k, how many of the answers are wrong.
        count: n, how many answers there are; 0 gives 1.
        confidence: the probability that the bound holds.

    Returns:
        The largest r with P(Binomial(n, r) <= k) >= 1 - confidence.

    Raises:
        ValueError: a number is out of its range.

    >>> round(clopper_pearson(0, 45, 0.9), 4), round(clopper_pearson(3, 100, 0.95), 4)
    (0.0499, 0.0757)
    """
    from scipy.stats import beta  # here: importing scipy.stats takes longer than most uses

    check_count("count", count, 0)
    check_count("errors", errors, 0)
    if errors > count:
        raise ValueError(f"`errors` must be at most `count`={count}, got {errors}.")
    check_share("confidence", confidence)
    return 1.0 if errors == count else float(beta.ppf(confidence, errors + 1, count - errors))


def least_examples(max_risk: float, confidence: float = 0.9) -> int:
    """Return the fewest rows by which any bound of this kind can be shown: (1 - a)^n <= 1 - confidence.

    With fewer, a model that is wrong a little more often than ``max_risk`` makes no error at all too often.

    >>> least_examples(0.05, 0.9), least_examples(0.01, 0.95)
    (45, 299)
    """
    check_share("max_risk", max_risk)
    check_share("confidence", confidence)
    least = math.ceil(math.log1p(-confidence) / math.log1p(-max_risk) * (1 - 1e-12))
    return max(least, 1)


def smallest_refusal(model_risk: float, max_risk: float) -> float:
    """Return the least share of inputs that a rule must refuse, which knows all errors: (mu - a) / (1 - a), or 0.

    Of all inputs at most a (1 - r) are answered wrongly and r refused, so mu <= a (1 - r) + r.

    Raises:
        ValueError: a number is out of its range.

    >>> round(smallest_refusal(0.2, 0.05), 4), smallest_refusal(0.02, 0.05)
    (0.1579, 0.0)
    """
    if not is_real(model_risk) or not 0 <= model_risk <= 1:
        raise ValueError(f"`model_risk` must be in [0, 1], got {model_risk!r}.")
    check_share("max_risk", max_risk)
    return max(0.0, (model_risk - max_risk) / (1 - max_risk))


def error_allowance(count: int, max_risk: float, confidence: float = 0.9) -> NDArray[np.int64]:
    """Return c_0 .. c_n: the most errors among the m surest rows at which answering these is certified, -1: none.

    All ranks have one level d' of the binomial test, the largest for which a sequence of Bernoulli(max_risk) errors
    reaches a c_m with probability at most 1 - confidence. See the module for what it proves.

    Args:
        count: n, the number of calibration rows.
        max_risk: a, above 0 and below 1.
        confidence: above 0 and below 1.

    Returns:
        (n + 1,).

    Raises:
        ValueError: an argument is out of its range.

    >>> error_allowance(100, 0.05)[[44, 60, 80, 100]]
    array([-1,  0,  0,  1])
    >>> error_allowance(45, 0.05)[45]
    np.int64(0)
    """
    check_count("count", count, 0)
    check_share("max_risk", max_risk)
    check_share("confidence", confidence)
    return _allowance(int(count), float(max_risk), float(confidence)).copy()


@lru_cache(maxsize=64)
def _allowance(count: int, max_risk: float, confidence: float) -> NDArray[np.int64]:
    delta = 1 - confidence
    jumps: dict[int, NDArray[np.float64]] = {}

    def is_valid(log_level: float) -> bool:
        return crossing_probability(_at_level(count, max_risk, math.exp(log_level)), max_risk, jumps) <= delta

    low = high = math.log(delta)
    if not count or is_valid(high):
        return _at_level(count, max_risk, delta)
    while not is_valid(low):
        low -= 3
    for _ in range(_STEPS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if is_valid(middle) else (low, middle)
    return _at_level(count, max_risk, math.exp(low))


def _at_level(count: int, max_risk: float, level: float) -> NDArray[np.int64]:
    """c_m = max{k: P(Binomial(m, a) <= k) <= level}, -1 where there is none."""
    from scipy.stats import binom

    ranks = np.arange(1, count + 1)
    least = binom.ppf(level, ranks, max_risk).astype(np.int64)  # the least k that reaches the level
    is_within = binom.cdf(least, ranks, max_risk) <= level
    return np.concatenate([[-1], np.where(is_within, least, least - 1)]).astype(np.int64)


def crossing_probability(
    allowed: NDArray[np.int64], max_risk: float, jumps: dict[int, NDArray[np.float64]] | None = None
) -> float:
    """Return P(exists m >= 1: F_m <= c_m) of a sum F_m of m independent Bernoulli(a), exact to 1e-12.

    Args:
        allowed: c_0 .. c_n, which do not fall; -1: F cannot reach it.
        max_risk: a.
        jumps: binomial probabilities by number of trials, kept between calls.

    Returns:
        The probability; what lies in cut tails is counted as crossing.
    """
    jumps = {} if jumps is None else jumps
    # F does not fall either: of ranks with one c the first decides
    ranks = [int(m) for m in np.flatnonzero(np.diff(allowed, prepend=-1) > 0) if m > 0]
    crossed, start, first = 0.0, 0, 0
    alive = np.ones(1)  # probabilities of F = first, first + 1, ... at rank `start`, not having crossed
    for rank in ranks:
        alive = np.convolve(alive, _binomial(rank - start, max_risk, jumps))
        cut = min(max(0, int(allowed[rank]) + 1 - first), len(alive))
        crossed += float(alive[:cut].sum())
        alive, first, start = alive[cut:], first + cut, rank
        tails = np.cumsum(alive[::-1])[::-1]
        kept = int((tails > _TAIL / max(len(ranks), 1)).sum())
        crossed += float(alive[kept:].sum())
        alive = alive[:kept]
    return crossed


def _binomial(trials: int, max_risk: float, jumps: dict[int, NDArray[np.float64]]) -> NDArray[np.float64]:
    """P(Binomial(trials, a) = 0, 1, ...), up to where the rest is negligible."""
    from scipy.stats import binom

    if trials not in jumps:
        most = int(binom.isf(_TAIL / 1e3, trials, max_risk))
        jumps[trials] = binom.pmf(np.arange(most + 1), trials, max_risk)
    return jumps[trials]


def check_share(name: str, value: float) -> None:
    """Raise ValueError for anything but a number above 0 and below 1."""
    if not is_real(value) or not 0 < value < 1:
        raise ValueError(f"`{name}` must be above 0 and below 1, got {value!r}.")
