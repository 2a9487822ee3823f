"""`head_loss`: the objective of a model with a VBLL or SNGP head, for a training loop of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_count
from ..forward import labels_of
from ..likelihoods import get_likelihood, resolve_problem_type
from ..posteriors.heads import without_labels
from .base import features_of
from .find import check_likelihood, head_of
from .sngp import RandomFeatureHead

__all__ = ["head_loss"]


def head_loss(model: nn.Module, batch: Mapping[str, Any], num_items: int) -> Tensor:
    """Return mean nll + penalty / N, which `BayesianTrainer` minimises too; a scalar with gradient.

    The nll is VBLL's bound, or that of SNGP at its weights; the penalty VBLL's KL(q || p), or SNGP's -log p(w), with
    that of a learned noise. A loss with gradient is one to train by, so SNGP's head drops the covariance that it has,
    which is that of the weights before: call `fit_covariance` again.

    Args:
        model: with such a head.
        batch: what the model's forward takes, with "labels".
        num_items: N, the number of training examples (of tokens, of labels that count).

    Raises:
        ValueError: the model has no such head, ``num_items`` is no number >= 1, or the labels do not go with the head.
    """
    head = head_of(model)
    check_count("num_items", num_items, 1)
    labels = labels_of(batch)
    likelihood = get_likelihood(resolve_problem_type(model, labels))
    check_likelihood(head, likelihood)
    if isinstance(head, RandomFeatureHead) and head.is_fitted and torch.is_grad_enabled():
        head.forget()
    _, features = features_of(model, head, without_labels(model, batch))
    values, mask = head.item_nll(features, batch, likelihood)
    return values.sum() / mask.sum().clamp_min(1) + head.penalty() / num_items
