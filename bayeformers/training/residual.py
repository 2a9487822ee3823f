"""`noise_std="residual"`: how far a trained regression misses its training data."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.convert import is_bayesian
from ..likelihoods import drawn_values
from ..posteriors import PointPosterior, VariationalPosterior
from ..sampling.random_state import preserved
from .items import labels_of, model_inputs

__all__ = ["residual_std"]


@torch.no_grad()
def residual_std(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    gather: Callable[[Tensor], Tensor] = lambda values: values,
) -> float:
    """sqrt(mean (y - f(x; mu))^2) of ``model`` at its posterior mean, in the labels' unit.

    ``gather`` collects a batch's per-example values from all ranks. Mode and random state are left as they were.

    Errors: ValueError for a residual of 0, which is no noise.
    """
    squared = []
    posterior = VariationalPosterior(model, 0) if is_bayesian(model) else PointPosterior(model)
    with preserved(), posterior.recording_view() as view:
        for inputs in batches:
            values = drawn_values(view.model(**model_inputs(model, inputs)), "regression", inputs).double()
            residual = (labels_of(inputs).to(values).reshape(values.shape) - values).reshape(len(values), -1)
            squared.append(gather(residual.square().mean(1)).cpu())
    rmse = float(torch.cat(squared).mean().sqrt())
    if not rmse > 0:
        raise ValueError(f'`noise_std`="residual" is {rmse} on this training data; give a number > 0.')
    return rmse
