"""What the metrics accept: every argument is checked here, once, where it enters.

Each function returns its argument as the float64 or integer NumPy array that the formulas use, or raises an error
that names the argument, the value received and what is allowed.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_api_compat import is_torch_array
from numpy.typing import ArrayLike, NDArray

from ..checks import is_real

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

SUM_TOLERANCE = 1e-3
"""Largest accepted |sum over classes - 1|: float32 softmax outputs pass with room to spare, logits do not."""


class UndefinedMetricError(ValueError):
    """The arguments are well formed, but the metric has no value on them (AUROC with one class only)."""


def to_numpy(array: Any, name: str) -> NDArray[Any]:
    """Any array-like as a NumPy array; torch tensors are detached and brought to the CPU."""
    if is_torch_array(array):
        array = array.detach().cpu()
        array = array.double() if array.is_floating_point() else array  # NumPy has no bfloat16
    try:
        return np.asarray(array)
    except ValueError as error:  # nested lists of different lengths
        raise ValueError(f"`{name}` must be a rectangular array, got rows of different lengths: {error}") from None


def float_array(array: Any, name: str, *, ndim: int) -> FloatArray:
    """Return a finite, non-empty float64 array.

    Args:
        array: the numbers, as anything that NumPy reads, or a tensor.
        name: what an error calls the argument.
        ndim: the number of axes that it must have.

    Raises:
        TypeError: it does not hold real numbers.
        ValueError: it has another number of axes, is empty, or is not finite.
    """
    values = to_numpy(array, name)
    if values.dtype.kind not in "fiub":
        raise TypeError(f"`{name}` must hold real numbers, got dtype {values.dtype}.")
    if values.ndim != ndim:
        raise ValueError(f"`{name}` must have {ndim} axes, got shape {values.shape}.")
    if values.size == 0:
        raise ValueError(f"`{name}` is empty, got shape {values.shape}; at least one example is needed.")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise ValueError(f"`{name}` must be finite, got {values[where]} at index {where}.")
    return values


def probabilities(probs: Any, name: str = "probs") -> FloatArray:
    """Class probabilities (N, C), C >= 2: non-negative, each row summing to one within `SUM_TOLERANCE`."""
    values = float_array(probs, name, ndim=2)
    if values.shape[1] < 2:
        raise ValueError(f"`{name}` needs a column per class and at least 2, got shape {values.shape}.")
    if values.min() < 0:
        raise ValueError(f"`{name}` must be >= 0, got {values.min()}; log-probabilities need np.exp first.")
    sums = values.sum(1)
    worst = int(np.abs(sums - 1).argmax())
    if abs(sums[worst] - 1) > SUM_TOLERANCE:
        raise ValueError(
            f"`{name}` must sum to 1 over classes within {SUM_TOLERANCE}, row {worst} sums to {sums[worst]:.6g}; "
            "logits need a softmax first, and a softmax at least float32."
        )
    return values


def integer_labels(labels: Any, num_examples: int, num_classes: int, name: str = "labels") -> IntArray:
    """Return class indices (N,) in [0, C), as int64.

    Args:
        labels: the class indices, as anything that NumPy reads, or a tensor.
        num_examples: the number N that there must be.
        num_classes: the number C of classes.
        name: what an error calls the argument.

    Raises:
        TypeError: the labels are not integers.
        ValueError: they have another shape, or lie outside [0, C).
    """
    values = to_numpy(labels, name)
    if values.dtype.kind not in "iu":
        raise TypeError(f"`{name}` must be integer class indices, got dtype {values.dtype}.")
    if values.shape != (num_examples,):
        raise ValueError(f"`{name}` must have shape ({num_examples},), one per example, got {values.shape}.")
    outside = values[(values < 0) | (values >= num_classes)]
    if outside.size:
        raise ValueError(
            f"`{name}` must lie in [0, {num_classes}) for {num_classes} classes, got {outside[0]}; "
            "drop ignored positions (such as -100) first."
        )
    return values.astype(np.int64)


def probabilities_and_labels(probs: ArrayLike, labels: ArrayLike) -> tuple[FloatArray, IntArray]:
    """Probabilities (N, C) with their labels (N,)."""
    values = probabilities(probs)
    return values, integer_labels(labels, *values.shape)


def score_and_error(score: ArrayLike, error: ArrayLike, name: str) -> tuple[FloatArray, FloatArray]:
    """Return scores and errors, (N,) each, as float64.

    Args:
        score: one number per example, (N,).
        error: (N,) >= 0: 0/1 for classification, any loss otherwise.
        name: what a message calls the score.

    Raises:
        ValueError: an error is negative.
    """
    scores, errors = float_array(score, name, ndim=1), float_array(error, "error", ndim=1)
    _same_length(scores, errors, name, "error")
    if errors.min() < 0:
        raise ValueError(f"`error` must be >= 0, got {errors.min()}.")
    return scores, errors


def score_and_indicator(
    score: ArrayLike, indicator: ArrayLike, score_name: str, name: str
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Return scores as float64 and indicators as booleans, (N,) each.

    Args:
        score: one number per example, (N,).
        indicator: booleans (N,), given as such or as 0/1.
        score_name: what a message calls the score.
        name: what a message calls the indicator.

    Raises:
        ValueError: an indicator is neither 0 nor 1.
    """
    scores, indicators = float_array(score, score_name, ndim=1), float_array(indicator, name, ndim=1)
    _same_length(scores, indicators, score_name, name)
    other = indicators[(indicators != 0) & (indicators != 1)]
    if other.size:
        raise ValueError(f"`{name}` must be 0/1 or boolean, got {other[0]}.")
    return scores, indicators == 1


def _same_length(first: FloatArray, second: FloatArray, first_name: str, second_name: str) -> None:
    if len(first) != len(second):
        raise ValueError(
            f"`{first_name}` and `{second_name}` must have one entry per example, got {len(first)} and {len(second)}."
        )


def choice(value: str, allowed: Sequence[str], name: str) -> None:
    """Raise ValueError unless a value is one of the allowed strings.

    Args:
        value: the argument's value.
        allowed: what it may be.
        name: what the error calls the argument.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"`{name}` must be one of {list(allowed)}, got {value!r}.")


def positive_integer(value: int, name: str) -> None:
    """An integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be an integer >= 1, got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be >= 1, got {value}.")


def within(value: float, low: float, high: float, name: str) -> None:
    """Raise an error unless a value is a finite number in [low, high].

    Args:
        value: the argument's value.
        low: the least that is allowed.
        high: the most that is allowed; it may be infinite.
        name: what the error calls the argument.

    Raises:
        TypeError: it is no number.
        ValueError: it is not finite, or out of range.
    """
    if not is_real(value):
        raise TypeError(f"`{name}` must be a number in [{low}, {high}], got {value!r}.")
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"`{name}` must lie in [{low}, {high}], got {value!r}.")
