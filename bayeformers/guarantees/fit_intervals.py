"""`fit_prediction_intervals`: from labelled rows that nothing was fitted to, to those of `PredictionIntervals`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_count
from ..posteriors import Posterior
from .intervals import SCALES, PredictionIntervals, Scale, keys_of, located
from .labelled import Collator, calibration_rows
from .quantiles import ALL, Cutoffs, check_alpha, conformal_quantile, group_keys

__all__ = ["fit_prediction_intervals"]


def fit_prediction_intervals(
    posterior_or_means: nn.Module | Posterior | Tensor | Sequence[Any],
    dataset: Any = None,
    *,
    alpha: float = 0.1,
    scale: Scale = "predictive",
    groups: str | Sequence[Any] | None = None,
    num_samples: int = 16,
    batch_size: int = 32,
    data_collator: Collator | None = None,
    seed: int = 0,
) -> PredictionIntervals:
    """Calibrate intervals that hold the label of at least 1 - alpha of the inputs to come.

    As `fit_prediction_sets`, whose conditions are the same, for a regression.

    Args:
        posterior_or_means: a posterior or model of a regression; or means (n,) or (n, L), with a scale a pair of means
            and standard deviations.
        dataset: labelled rows, as `fit_prediction_sets` takes them; with means the labels, of their shape.
        alpha: the share of misses allowed, above 0 and below 1; of several outputs, of each.
        scale: what makes an interval wide: "predictive", the standard deviation of weights and noise together, whose
            noise must be known; "epistemic", that of the weights; "none": all intervals have one width.
        groups: hold it for each group by itself: one per row, or the name of a column of ``dataset``.
        num_samples: draws per prediction.
        batch_size: rows per batch.
        data_collator: makes a batch of rows; None: transformers' default.
        seed: of the draws.

    Returns:
        The intervals; a warning says where rows are too few, and the interval is the whole line.

    Raises:
        TypeError: the dataset is none.
        ValueError: an argument is out of range, the head is no regression, or its scale is not known or 0 throughout.

    >>> means, labels = torch.zeros(4), torch.tensor([0.5, -1.0, 2.0, 0.1])
    >>> intervals = fit_prediction_intervals(means, labels, alpha=0.4, scale="none")
    >>> intervals.predict(torch.tensor([10.0]))
    tensor([[ 9., 11.]], dtype=torch.float64)
    """
    alpha = check_alpha(alpha)
    check_choice("scale", scale, SCALES)
    check_count("seed", seed, 0)
    given = calibration_rows(
        posterior_or_means,
        dataset,
        groups,
        num_samples=num_samples,
        batch_size=batch_size,
        data_collator=data_collator,
        seed=seed,
    )
    found = [(*located(one, scale), _checked_labels(labels)) for one, labels in given.parts]
    mean, deviation, labels = (torch.cat(values) for values in zip(*found, strict=True))
    if labels.shape != mean.shape:
        raise ValueError(f"`labels` must have the shape of the means, {tuple(mean.shape)}, got {tuple(labels.shape)}.")
    if not bool((deviation > 0).any()):
        raise ValueError(
            f"`scale`={scale!r} is 0 for every row: a point estimate has no epistemic part. Give a posterior, record "
            'the noise (`config.bayesian["noise_std"]`), or take "none".'
        )
    distance = (labels - mean).abs()
    scores = torch.where(distance == 0, 0.0, distance / deviation)  # 0 / 0 is no miss; a miss of scale 0 is infinite
    keys: list[Hashable] = [ALL] * len(mean) if given.groups is None else group_keys(given.groups, len(mean))
    cutoffs = Cutoffs()
    for output, own_keys in enumerate(keys_of(keys, mean.shape[1])):
        cutoffs |= Cutoffs.of(partial(_quantile, scores[:, output], alpha), own_keys, alpha)
    return PredictionIntervals(
        alpha=alpha,
        scale=scale,
        num_outputs=mean.shape[1],
        by="all" if groups is None else "group",
        cutoffs=cutoffs,
        **given.how,
    )


def _quantile(scores: Tensor, alpha: float, rows: list[int]) -> float:
    return conformal_quantile(scores[rows], alpha)


def _checked_labels(labels: Any) -> Tensor:
    try:
        values = torch.as_tensor(labels).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`labels` must be numbers, got {type(labels).__name__}.") from error
    if values.dim() not in (1, 2) or len(values) == 0 or not bool(values.isfinite().all()):
        raise ValueError(f"`labels` must be finite numbers, (n,) or (n, L), got the shape {tuple(values.shape)}.")
    return values.reshape(len(values), -1)
