"""`noise_std="residual"`: how far a trained regression misses its training data."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.convert import is_bayesian
from ..forward import labels_of, logits_of
from ..likelihoods.gaussian import squeezed
from ..posteriors import PointPosterior, VariationalPosterior
from ..sampling.random_state import preserved
from .items import model_inputs

__all__ = ["residual_std"]


@torch.no_grad()
def residual_std(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    gather: Callable[[Tensor], Tensor] = lambda values: values,
) -> float:
    """Measure sqrt(mean (y - f(x; mu))^2) of ``model`` at its posterior mean.

    Args:
        model: the model, whose mode and random state are left as they were.
        batches: the training data, with labels.
        gather: collects a batch's per-example values from all ranks.

    Returns:
        A standard deviation in the labels' unit.

    Raises:
        ValueError: a residual of 0, which is no noise.
    """
    squared = []
    posterior = VariationalPosterior(model, 0) if is_bayesian(model) else PointPosterior(model)
    with preserved(), posterior.recording_view() as view:
        for inputs in batches:
            values = squeezed(logits_of(view.model(**model_inputs(model, inputs)))).double()
            residual = (labels_of(inputs).to(values).reshape(values.shape) - values).reshape(len(values), -1)
            squared.append(gather(residual.square().mean(1)).cpu())
    rmse = float(torch.cat(squared).mean().sqrt())
    if not rmse > 0:
        raise ValueError(f'`noise_std`="residual" is {rmse} on this training data; give a number > 0.')
    return rmse
