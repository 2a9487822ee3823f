r"""Ordinal regression: classes 0 < 1 < ... < C - 1, of cumulative logits (McCullagh 1980, J. R. Statist. Soc. B 42(2)).

    P(y >= k | f) = sigmoid(g_k),    g_1 = f_1 - f_0,    g_{k+1} = g_k - softplus(f_{k+1}),    k = 1 .. C - 1

Any head of C = `num_labels` outputs will do: softplus keeps the cumulative logits in order whatever they are. Where
only f_1 - f_0 depends on the input this is McCullagh's proportional-odds model, of which f_2 .. f_{C-1} set the
distances between the cut points; a head may also widen them. Two classes are a softmax over (f_0, f_1). A class is the
difference of two sigmoids, and 1 - exp(-softplus(f)) = sigmoid(f) makes its logarithm a sum:

    log p_k = log sigmoid(g_k) + log sigmoid(-g_{k+1}) + log sigmoid(f_{k+1}),    0 < k < C - 1

and log p_0 = log sigmoid(-g_1), log p_{C-1} = log sigmoid(g_{C-1}): no probability is subtracted from another.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Likelihood
from .classes import Categorical

__all__ = ["OrdinalRegression"]


class OrdinalRegression(Categorical):
    """A class of C in order; `config.problem_type = "ordinal_regression"`, with `num_labels` = C >= 2."""

    problem_type = "ordinal_regression"
    family = "ordinal"
    fits_sequences = True
    fits_other = True
    has_stock_loss = False  # transformers has no loss of this kind
    links = ("auto", "mc")
    remedy = "Ordered classes need `num_labels` >= 2."
    _diverged = Likelihood._diverged  # every logit must be finite: differences of two of them are taken

    def check_head(self, config: Any) -> None:
        """At least two classes: one is the answer whatever the model has learned."""
        if getattr(config, "num_labels", None) == 1:
            raise ValueError(f"`config.num_labels` of an ordinal head must be at least 2, got 1. {self.remedy}")

    def class_logits(self, logits: Tensor) -> Tensor:
        """The logarithms of the classes' probabilities, (..., C)."""
        first, gaps = logits[..., 1:2] - logits[..., :1], logits[..., 2:]
        at_least = torch.cat([first, first - F.softplus(gaps).cumsum(-1)], dim=-1)  # g_1 .. g_{C-1}
        above, below = F.logsigmoid(at_least), F.logsigmoid(-at_least)
        inner = above[..., :-1] + below[..., 1:] + F.logsigmoid(gaps)
        return torch.cat([below[..., :1], inner, above[..., -1:]], dim=-1)
