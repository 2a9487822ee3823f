"""`fit_covariance`: the Laplace precision of an SNGP head, exactly, in one pass over the training data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..laplace.data import Batch, Loader
from ..likelihoods import IGNORED, Likelihood, get_likelihood, resolve_problem_type
from ..processes import summed
from ..sampling.views import viewed
from .base import check_way, features_of
from .find import check_likelihood, head_of
from .posterior import HeadPosterior
from .sngp import RandomFeatureHead

__all__ = ["fit_covariance"]


@torch.no_grad()
def fit_covariance(model: nn.Module, dataloader: Iterable[Any], *, progress: bool = False) -> HeadPosterior:
    """Compute P_k = (D / a) I + sum_i h_ik phi_i phi_i^T over the training data, and keep it in the head.

    The model reads in `eval()` mode and stays as it is. Under a launcher every process reads its share, and all end
    with the same precision; what a sampler repeats to make shares equal is left out. Sums are in float64.

    Args:
        model: with an SNGP head.
        dataloader: batches as the model takes them, or (inputs, labels). Labels are needed where they say which tokens
            or examples count, by not being -100.
        progress: whether to show a bar.

    Returns:
        The posterior.

    Raises:
        TypeError: the batches are of another kind.
        ValueError: the model has no SNGP head; the data are empty, or no item of them counts.
    """
    head = head_of(model)
    if not isinstance(head, RandomFeatureHead):
        raise ValueError("`fit_covariance` is for an SNGP head; the covariance of a VBLL head is trained.")
    loader = Loader(model, dataloader, None, None, progress)
    labels = loader.first().labels
    likelihood = get_likelihood(resolve_problem_type(model, labels))
    check_likelihood(head, likelihood)
    total = torch.zeros_like(head.precision, dtype=torch.float64)
    count = torch.zeros((), dtype=torch.int64, device=total.device)
    with viewed(model, training=False) as view:
        for batch in loader.batches("covariance"):
            _, features = features_of(view.model, head_of(view.model), batch.inputs)
            if int(count) == 0:
                check_way(view.model, head_of(view.model), batch.inputs, features)
            items = _items(features, batch, likelihood)
            total += head.curvature(items, is_bernoulli=likelihood.is_bernoulli)
            count += len(items)
    total, count = summed(total), summed(count)
    if int(count) == 0 or not bool(total.isfinite().all()):
        raise ValueError(f"`dataloader` must have items that count, with finite features: it has {int(count)}.")
    head.set_precision(total, int(count))
    return HeadPosterior(model)


def _items(features: Tensor, batch: Batch, likelihood: Likelihood) -> Tensor:
    """The features of the items that count, (n, D)."""
    if likelihood.has_noise or likelihood.is_bernoulli:
        return features
    if batch.labels is not None:
        labels = batch.labels.squeeze(-1) if batch.labels.dim() == features.dim() else batch.labels
        return features[labels != IGNORED]
    attended = likelihood.attended(features, batch.inputs)
    return features.flatten(0, -2) if attended is None else features[attended]
