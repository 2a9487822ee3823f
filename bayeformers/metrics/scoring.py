"""Proper scores of probabilistic predictions: lower is better, averaged over examples.

Class probabilities are (N, C) with labels (N,), integers in [0, C). Regression draws are (S, N) with targets (N,).
"""

import numpy as np
from numpy.typing import ArrayLike

from ._checks import float_array, probabilities_and_labels

PROBABILITY_FLOOR = float(np.finfo(np.float32).tiny)
"""Probabilities are clipped here, 1.2e-38, before the logarithm: all that a float32 softmax can express passes
unchanged, and an exact 0 costs 87.3 nats instead of infinity."""


def negative_log_likelihood(probs: ArrayLike, labels: ArrayLike) -> float:
    """Return NLL = mean_i -log p_{i, y_i}, in nats, >= 0; probabilities are clipped at `PROBABILITY_FLOOR`.

    >>> round(negative_log_likelihood([[0.5, 0.5], [0.8, 0.2]], [0, 0]), 4)
    0.4581
    """
    checked, classes = probabilities_and_labels(probs, labels)
    of_label = np.take_along_axis(checked, classes[:, None], axis=1)
    return float(0.0 - np.log(np.clip(of_label, PROBABILITY_FLOOR, 1.0)).mean())  # 0 - x: certainty scores 0, not -0


def brier_score(probs: ArrayLike, labels: ArrayLike) -> float:
    """Return the Brier score = mean_i sum_k (p_ik - 1[y_i = k])^2, in [0, 2]: summed over classes, not averaged.

    >>> round(brier_score([[0.5, 0.5], [0.8, 0.2]], [0, 0]), 4)
    0.29
    """
    checked, classes = probabilities_and_labels(probs, labels)
    checked[np.arange(len(checked)), classes] -= 1  # its own array; one-hot labels would be another, or C^2 numbers
    return float(np.einsum("nc,nc->n", checked, checked).mean())


def accuracy(probs: ArrayLike, labels: ArrayLike) -> float:
    """Return the share of examples whose largest probability is the label's; ties go to the lower class index.

    >>> accuracy([[0.5, 0.5], [0.8, 0.2]], [0, 1])
    0.5
    """
    checked, classes = probabilities_and_labels(probs, labels)
    return float((checked.argmax(1) == classes).mean())


def gaussian_negative_log_likelihood(means: ArrayLike, noise_std: ArrayLike, targets: ArrayLike) -> float:
    """Return the regression NLL of the mixture over draws: mean_i -log (1/S) sum_s N(y_i | f_s(x_i), noise_std^2).

    Computed by logsumexp over draws, in nats; the density is in units of 1/target, so the value may be negative.

    Args:
        means: f_s(x_i) of S draws, (S, N).
        noise_std: the noise's standard deviation in the targets' unit, > 0: a number or (S, N).
        targets: the values y_i, (N,).

    Raises:
        ValueError: the shapes do not belong together, or a ``noise_std`` is not > 0.

    >>> round(gaussian_negative_log_likelihood([[0.0], [2.0]], 1.0, [1.0]), 4)  # 0.5 log 2 pi + 0.5
    1.4189
    """
    draws, values = float_array(means, "means", ndim=2), float_array(targets, "targets", ndim=1)
    scale = float_array(noise_std, "noise_std", ndim=np.ndim(noise_std))
    if values.shape != draws.shape[1:]:
        raise ValueError(f"`targets` must have shape {draws.shape[1:]} for `means` {draws.shape}, got {values.shape}.")
    if scale.shape not in ((), draws.shape):
        raise ValueError(f"`noise_std` must be a number or have the shape {draws.shape} of `means`, got {scale.shape}.")
    if scale.min() <= 0:
        raise ValueError(f"`noise_std` must be > 0, got {scale.min()}.")
    log_density = -0.5 * np.square((values - draws) / scale) - np.log(scale) - 0.5 * np.log(2 * np.pi)
    return float(-(np.logaddexp.reduce(log_density, axis=0) - np.log(len(draws))).mean())
