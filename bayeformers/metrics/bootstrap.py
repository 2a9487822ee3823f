"""Percentile bootstrap over examples: how far a metric would move on another test set of the same size.

Examples are resampled with replacement, n at a time, jointly in all arrays of a metric. Nothing is random beyond the
``seed``. On resamples where the metric has no value (an AUROC without a single error), it is left out and counted.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._checks import IntArray, UndefinedMetricError, positive_integer, to_numpy

Metric = Callable[..., float]


@dataclass(frozen=True)
class BootstrapInterval:
    """``estimate`` on the data, and the interval ``low`` .. ``high`` that holds ``confidence_level`` of resamples.

    ``num_undefined`` of the ``num_resamples`` had no value and are not part of the interval.
    """

    estimate: float
    low: float
    high: float
    confidence_level: float
    num_resamples: int
    num_undefined: int

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval: for a difference, whether its sign is settled."""
        return not self.low <= 0.0 <= self.high


def bootstrap_ci(
    metric: Metric,
    *arrays: ArrayLike,
    num_resamples: int = 1000,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> BootstrapInterval:
    """Return the percentile interval of ``metric(*arrays)``. Efron 1979.

    Args:
        metric: a function of the arrays; its further arguments go in by `functools.partial` or a lambda.
        *arrays: what the metric takes, the first axis of each being the examples.
        num_resamples: how many resamples of the examples to take, >= 1.
        confidence_level: the share in (0, 1) of the metric's values on resamples that the interval holds.
        seed: the seed of the resampling.

    >>> from bayeformers.metrics import brier_score
    >>> interval = bootstrap_ci(brier_score, [[0.5, 0.5]] * 10, [0] * 10)
    >>> interval.low, interval.estimate, interval.high
    (0.5, 0.5, 0.5)
    """
    return _interval(metric, [_examples(arrays, "arrays")], num_resamples, confidence_level, seed)


def paired_bootstrap(
    metric: Metric,
    first: Sequence[ArrayLike],
    second: Sequence[ArrayLike],
    *,
    num_resamples: int = 1000,
    confidence_level: float = 0.95,
    seed: int = 0,
) -> BootstrapInterval:
    """Return the interval of ``metric(*first) - metric(*second)``: two methods on one set, resampled together.

    Much narrower than two separate intervals, as the examples' own difficulty cancels.

    Args:
        metric: a function of the arrays.
        first: the arrays of the first method, the first axis of each being the examples.
        second: the arrays of the second method, about the same examples in the same order.
        num_resamples: how many resamples of the examples to take, >= 1.
        confidence_level: the share in (0, 1) of the differences on resamples that the interval holds.
        seed: the seed of the resampling.

    Raises:
        ValueError: the two methods have different numbers of examples.

    >>> from bayeformers.metrics import brier_score
    >>> labels = [0, 1] * 20
    >>> sharp, blunt = [[0.9, 0.1], [0.1, 0.9]] * 20, [[0.6, 0.4], [0.4, 0.6]] * 20
    >>> interval = paired_bootstrap(brier_score, (sharp, labels), (blunt, labels))
    >>> round(interval.estimate, 2), interval.excludes_zero
    (-0.3, True)
    """
    methods = [_examples(first, "first"), _examples(second, "second")]
    if len(methods[0][0]) != len(methods[1][0]):
        raise ValueError(
            "`first` and `second` must be about the same examples, "
            f"got {len(methods[0][0])} and {len(methods[1][0])} of them."
        )
    return _interval(metric, methods, num_resamples, confidence_level, seed)


def _interval(
    metric: Metric, methods: list[list[NDArray[Any]]], num_resamples: int, confidence_level: float, seed: int
) -> BootstrapInterval:
    if not callable(metric):
        raise TypeError(f"`metric` must be a function of the arrays, got {metric!r}.")
    positive_integer(num_resamples, "num_resamples")
    if not 0 < confidence_level < 1:
        raise ValueError(f"`confidence_level` must lie in (0, 1), got {confidence_level!r}.")
    estimate = _value(metric, methods)  # without resampling: its errors are the caller's
    values = [_resampled(metric, methods, index) for index in _indices(len(methods[0][0]), num_resamples, seed)]
    defined = [value for value in values if value is not None]
    if len(defined) < num_resamples / 2:
        raise UndefinedMetricError(
            f"the metric has no value on {num_resamples - len(defined)} of {num_resamples} resamples: "
            "there are too few examples of one kind for an interval."
        )
    tail = (1 - confidence_level) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    undefined = num_resamples - len(defined)
    return BootstrapInterval(estimate, float(low), float(high), confidence_level, num_resamples, undefined)


def _indices(num_examples: int, num_resamples: int, seed: int) -> Iterator[IntArray]:
    generator = np.random.default_rng(seed)
    for _ in range(num_resamples):
        yield generator.integers(num_examples, size=num_examples)


def _value(metric: Metric, methods: list[list[NDArray[Any]]]) -> float:
    values = [float(metric(*arrays)) for arrays in methods]
    return values[0] - values[1] if len(values) == 2 else values[0]


def _resampled(metric: Metric, methods: list[list[NDArray[Any]]], index: IntArray) -> float | None:
    try:
        value = _value(metric, [[array[index] for array in arrays] for arrays in methods])
    except UndefinedMetricError:
        return None
    return None if math.isnan(value) else value


def _examples(arrays: Sequence[ArrayLike], name: str) -> list[NDArray[Any]]:
    """Arrays with the same, non-zero number of examples on their first axis."""
    if not isinstance(arrays, (tuple, list)):
        raise TypeError(f"`{name}` must be a tuple of the metric's arrays, got {type(arrays).__name__}.")
    if not arrays:
        raise ValueError(f"`{name}` is empty: a metric needs at least one array of examples.")
    converted = [to_numpy(array, name) for array in arrays]
    shapes = [array.shape for array in converted]
    if any(array.ndim == 0 for array in converted) or len({array.shape[0] for array in converted}) != 1:
        raise ValueError(f"`{name}` must have one entry per example on their first axis, got shapes {shapes}.")
    if shapes[0][0] == 0:
        raise ValueError(f"`{name}` is empty, got shapes {shapes}; at least one example is needed.")
    return converted
