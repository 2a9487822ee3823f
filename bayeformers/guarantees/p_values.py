"""Conformal p-values of "this input is like the calibration data", and which of many to flag.

Of n calibration scores exchangeable with a new score s, the p-value (1 + #{score >= s}) / (n + 1) is at most t with
probability at most t, for every t (Vovk et al. 2005, section 2.3); ties count in full, which only makes it larger.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_count
from .quantiles import check_alpha, real_vector

__all__ = ["benjamini_hochberg", "conformal_p_values"]


def conformal_p_values(
    calibration_scores: Tensor | Sequence[float],
    scores: Tensor | Sequence[float],
    *,
    smoothed: bool = False,
    seed: int = 0,
) -> Tensor:
    """Return how often calibration rows are at least as unfamiliar, counting the new input itself.

    Flagging an input where its p-value is at most alpha is right as `ood.threshold` is: at most a share alpha of
    inputs of the familiar kind is flagged.

    Args:
        calibration_scores: of familiar rows that nothing was fitted to, (n,), higher for the less familiar, such as
            those of `ood.score_ood` or `FeatureDensity.calibration`.
        scores: of the inputs, (B,).
        smoothed: take (#{score > s} + u (1 + #{score = s})) / (n + 1) with u uniform, exactly uniform on [0, 1] for the
            familiar even with ties, in place of the conservative one.
        seed: of u; give every batch another.

    Returns:
        (B,) in float64, between 1/(n + 1), or 0 where smoothed, and 1.

    Raises:
        ValueError: scores are no numbers (n,), or NaN.

    >>> conformal_p_values([0.0, 1.0, 1.0, 2.0], [3.0, 1.0, -1.0])
    tensor([0.2000, 0.8000, 1.0000], dtype=torch.float64)
    """
    calibration = real_vector("calibration_scores", calibration_scores).sort().values
    values = real_vector("scores", scores, allow_empty=True)
    check_count("seed", seed, 0)
    at_least = len(calibration) - torch.searchsorted(calibration, values, right=False)
    if not smoothed:
        return (1 + at_least).double() / (len(calibration) + 1)
    above = len(calibration) - torch.searchsorted(calibration, values, right=True)
    uniforms = torch.rand(len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (above + uniforms * (1 + at_least - above)) / (len(calibration) + 1)


def benjamini_hochberg(p_values: Tensor | Sequence[float], rate: float = 0.1) -> Tensor:
    """Flag inputs so that at most a share ``rate`` of those flagged is familiar, in expectation.

    The i smallest p-values for the largest i with p_(i) <= i rate / m (Benjamini & Hochberg 1995). It holds for
    conformal p-values of independent inputs, which share their calibration rows (Bates et al. 2023, arXiv 2104.08279,
    theorem 2); take those that are not smoothed.

    Args:
        p_values: of m inputs, (m,).
        rate: the false discovery rate, above 0 and below 1.

    Returns:
        (m,), bool.

    Raises:
        ValueError: p-values lie outside of [0, 1], or the rate is out of range.

    >>> benjamini_hochberg([0.01, 0.04, 0.5, 0.9], 0.1)
    tensor([ True,  True, False, False])
    """
    values, rate = real_vector("p_values", p_values, allow_empty=True), check_alpha(rate)
    if bool(((values < 0) | (values > 1)).any()):
        raise ValueError(f"`p_values` must lie in [0, 1], got {float(values.min())} to {float(values.max())}.")
    ordered = values.sort().values
    limits = rate * torch.arange(1, len(values) + 1, dtype=torch.float64) / max(len(values), 1)
    passed = ordered[ordered <= limits]
    return values <= (passed[-1] if len(passed) else -1.0)
