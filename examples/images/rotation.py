"""Images turned by an angle, and whether uncertainty rises with the error that the turning causes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from bayeformers.metrics import UndefinedMetricError, error_auroc
from bayeformers.reports import ClassPredictions


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Images (B, C, H, W) turned counter-clockwise about their centre, by bilinear interpolation.

    What is turned in from outside is 0: black, of images in [0, 1].

    Raises:
        ValueError: `images` have not four axes, or `degrees` is not finite.

    >>> rotate(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), 90)
    tensor([[[[2.0000, 4.0000],
              [1.0000, 3.0000]]]])
    """
    if images.dim() != 4:
        raise ValueError(f"`images` must be (B, C, H, W), got {tuple(images.shape)}.")
    if not math.isfinite(degrees):
        raise ValueError(f"`degrees` must be finite, got {degrees}.")
    height, width = images.shape[-2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # affine_grid's coordinates run from -1 to 1 along each axis: the ratio keeps the angle in an image not square
    where = [[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]
    theta = torch.tensor(where, dtype=images.dtype, device=images.device).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


@dataclass(frozen=True)
class RotationCurve:
    """One method's predictions at A angles: means over the test images, and how they go with the error.

    Attributes:
        error: share of images whose most probable class is wrong, (A,).
        epistemic: mean mutual information of label and weights, in nats, (A,).
        aleatoric: mean expected entropy of a draw's probabilities, in nats, (A,).
        entropy: mean entropy of the averaged probabilities, in nats, (A,): the sum of the two.
        agreement: rank correlations of uncertainty and error; see `agreement`.
    """

    error: np.ndarray
    epistemic: np.ndarray
    aleatoric: np.ndarray
    entropy: np.ndarray
    agreement: dict[str, dict[str, float]]


def rotation_curve(predictions: Sequence[ClassPredictions], labels: np.ndarray) -> RotationCurve:
    """The predictions at each angle, on the same images with `labels` (N,), as one curve."""
    zeros = np.zeros(len(labels))
    epistemic = np.stack([zeros if one.epistemic is None else one.epistemic for one in predictions])
    entropy = np.stack([one.total for one in predictions])
    aleatoric = np.stack([one.aleatoric for one in predictions])
    error = np.stack([one.errors(labels) for one in predictions])
    scores = {"entropy": entropy}
    if predictions[0].epistemic is not None:
        scores |= {"epistemic": epistemic, "aleatoric": aleatoric}
    agreements = {name: agreement(score, error) for name, score in scores.items()}
    return RotationCurve(error.mean(1), epistemic.mean(1), aleatoric.mean(1), entropy.mean(1), agreements)


def agreement(uncertainty: np.ndarray, error: np.ndarray) -> dict[str, float]:
    """Does uncertainty rise with the error? Of two arrays (A angles, N images).

    Returns:
        ``angles``: Spearman's rank correlation of the means over images, between angles;
        ``images``: the same between all A x N turned images, whose errors are 0 or 1;
        ``auroc``: the probability that a wrongly read turned image is the more uncertain one of a wrong and a right.
        NaN where one of the two is constant.
    """
    try:
        auroc = error_auroc(-uncertainty.ravel(), error.ravel())
    except UndefinedMetricError:
        auroc = math.nan
    return {
        "angles": _spearman(uncertainty.mean(1), error.mean(1)),
        "images": _spearman(uncertainty.ravel(), error.ravel()),
        "auroc": auroc,
    }


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    """NaN without scipy's warning where an array is constant."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    result: Any = spearmanr(first, second)
    return float(result.statistic)
