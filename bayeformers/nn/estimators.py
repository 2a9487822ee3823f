"""Estimators of the ELBO's gradient: how a layer that is linear in its weights sees their noise.

A layer knows shapes, an estimator knows noise: a new estimator is one class here, a new layer needs none.
"""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from .variational import Variational

EstimatorName = Literal["reparameterization"]


class Operation(Protocol):
    """A layer's arithmetic, linear in the input and affine in (weight, bias)."""

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None, /) -> Tensor:
        """The layer's output for these weights."""


class Estimator(Protocol):
    """Gives the output of ``operation`` with random weights."""

    name: EstimatorName

    def affine(self, operation: Operation, input: Tensor, weight: Variational, bias: Variational | None) -> Tensor:
        """The layer's random output, of the shape that ``operation`` gives."""


class Reparameterization:
    """One w = loc + scale * eps, shared by the whole batch (Blundell et al. 2015, arXiv 1505.05424, section 3.2)."""

    name: EstimatorName = "reparameterization"

    def affine(self, operation: Operation, input: Tensor, weight: Variational, bias: Variational | None) -> Tensor:
        """operation(input, w, b) with w and b from the active draw."""
        return operation(input, weight.sample(), None if bias is None else bias.sample())


REPARAMETERIZATION = Reparameterization()
ESTIMATORS: dict[str, Estimator] = {REPARAMETERIZATION.name: REPARAMETERIZATION}


def get_estimator(name: str) -> Estimator:
    """The estimator of that name.

    Raises:
        ValueError: unknown name.
    """
    if not isinstance(name, str) or name not in ESTIMATORS:
        raise ValueError(f"`estimator` must be one of {sorted(ESTIMATORS)}, got {name!r}.")
    return ESTIMATORS[name]
