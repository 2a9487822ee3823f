"""Bayesian `torch.nn.Embedding`: only the rows that are looked up are drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..distributions import Prior
from .base import DEFAULT_DELTA, DEFAULT_PRIOR, BayesianModule


class Embedding(BayesianModule, torch.nn.Embedding):
    """`torch.nn.Embedding` with weights N(weight, scale^2): random in `train()`, the mean in `eval()`.

    A row has one value per draw, at every position and in every batch; the row of ``padding_idx`` has no noise.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: as in `torch.nn.Embedding`; its other options
            (``max_norm``, ``sparse``, ``scale_grad_by_freq``) have no meaning for a random table and are refused.
        prior: prior of every weight.
        delta: initial scale relative to |weight|.
        estimator: how the noise enters; local reparameterization is plain reparameterization here.

    Shape: ids (*) -> (*, embedding_dim).

    >>> table = Embedding(10, 4, padding_idx=0).train()
    >>> a, b = table(torch.tensor([3, 3]))
    >>> bool((a == b).all())
    True
    """

    torch_class = torch.nn.Embedding
    by_row = True

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        device: Any = None,
        dtype: Any = None,
        prior: Prior = DEFAULT_PRIOR,
        delta: float = DEFAULT_DELTA,
        estimator: str = "reparameterization",
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.become_bayesian(prior=prior, delta=delta, estimator=estimator)

    @classmethod
    def refusal(cls, module: torch.nn.Module) -> str | None:
        """Lookup options that a random table cannot honour."""
        return refused_options(module) or super().refusal(module)

    def forward(self, input: Tensor) -> Tensor:
        """Look the ids up in the mean, the held draw or a fresh draw."""
        if not self.is_random:
            return super().forward(input)
        return self.active_estimator.lookup(input, self.variational("weight"))


def refused_options(module: torch.nn.Module) -> str | None:
    """Why a lookup table cannot be random, by its options; None if they allow it."""
    used = [name for name in ("max_norm", "sparse", "scale_grad_by_freq") if getattr(module, name, None)]
    return f"{type(module).__name__} with {', '.join(used)} is not supported" if used else None
