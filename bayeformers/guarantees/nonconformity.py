r"""How badly a class fits an example, (B, C), of the predicted probabilities p: low for the likely.

    "lac":  -log p_y                                                       Sadinle et al. 2019, J. Am. Stat. Assoc. 114
    "aps":  sum_{c: p_c > p_y} p_c  +  u sum_{c: p_c = p_y} p_c            Romano et al. 2020, arXiv 2006.02544, eq. 5
    "raps": that of "aps"  +  lambda (1 + #{c: p_c > p_y} - k_reg)^+       Angelopoulos et al. 2021, arXiv 2009.14193

with u uniform on [0, 1], one per example, or 1. Classes of equal probability have equal scores, so that no order of the
classes matters; for ties the papers leave it to the sort. If p were the truth, the score of "aps" would be uniform.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["METHODS", "SetMethod", "class_scores", "true_scores"]

SetMethod = Literal["lac", "aps", "raps"]
METHODS: tuple[str, ...] = ("lac", "aps", "raps")


def class_scores(
    log_probs: Tensor, method: str, uniforms: Tensor | None = None, penalty: float = 0.0, k_reg: int = 0
) -> Tensor:
    """Score every class.

    Args:
        log_probs: of the classes, (B, C), in float64.
        method: one of `METHODS`.
        uniforms: u of every example, (B,); None: 1, the deterministic version. "lac" has none.
        penalty: lambda of "raps".
        k_reg: of "raps", the number of classes that cost nothing.

    Returns:
        (B, C), higher for what fits worse.

    >>> probs = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    >>> class_scores(probs.log(), "aps"), class_scores(probs.log(), "aps", torch.tensor([0.5]))
    (tensor([[0.5000, 1.0000, 1.0000]], dtype=torch.float64), tensor([[0.2500, 0.7500, 0.7500]], dtype=torch.float64))
    """
    if method == "lac":
        return -log_probs
    probs = log_probs.exp()
    negated = -probs.sort(dim=-1, descending=True).values
    mass = torch.cat([probs.new_zeros(len(probs), 1), (-negated).cumsum(-1)], dim=-1)  # of the i likeliest
    mass = mass / mass[:, -1:]  # all classes together have 1, whatever the rounding: the least likely are ties
    num_above = torch.searchsorted(negated, -probs, right=False)
    above = mass.gather(-1, num_above)
    up_to = mass.gather(-1, torch.searchsorted(negated, -probs, right=True))
    share = probs.new_ones(len(probs), 1) if uniforms is None else uniforms.to(probs)[:, None]
    scores = (1 - share) * above + share * up_to
    return scores if method == "aps" else scores + penalty * (num_above + 1 - k_reg).clamp_min(0).to(scores)


def true_scores(scores: Tensor, labels: Tensor) -> Tensor:
    """Pick the scores of the true classes: (B, C) and (B,) -> (B,)."""
    return scores.gather(-1, labels[:, None]).squeeze(-1)
