"""Whether probabilities mean what they say: reliability bins, calibration errors, temperature.

Probabilities are (N, C), labels (N,). The confidence of an example is its largest probability, c_i = max_k p_ik; it
is correct when that class is its label. Bins are right-closed, (lo, hi], the first also containing its lower edge.
"width" bins split [0, 1] evenly; "mass" bins split the examples evenly at quantiles, equal values never being
separated. Empty bins count nothing. A calibration error depends on the bins: report both together.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._checks import (
    FloatArray,
    IntArray,
    choice,
    float_array,
    integer_labels,
    positive_integer,
    probabilities_and_labels,
)

Binning = Literal["width", "mass"]
BINNINGS = ("width", "mass")

DEFAULT_BINS = 15

TEMPERATURE_RANGE = (1e-3, 1e3)
"""Bounds of the fitted temperature, in units of the logits' root mean square around their row means."""


@dataclass(frozen=True)
class ReliabilityBins:
    """Confidence against accuracy; ``counts``, ``accuracy`` and ``confidence`` are (num_bins,), ``edges`` one longer.

    ``accuracy`` and ``confidence`` are means over each bin's examples, NaN where the bin is empty.
    """

    num_bins: int
    counts: IntArray
    accuracy: FloatArray
    confidence: FloatArray
    edges: FloatArray

    @property
    def gaps(self) -> FloatArray:
        """|accuracy - confidence| per bin; 0 where the bin is empty."""
        return np.nan_to_num(np.abs(self.accuracy - self.confidence), nan=0.0)

    @property
    def expected_error(self) -> float:
        """sum_b (n_b / n) gap_b."""
        return float(self.counts @ self.gaps / self.counts.sum())

    @property
    def maximum_error(self) -> float:
        """max_b gap_b."""
        return float(self.gaps.max())


def reliability_bins(
    probs: ArrayLike, labels: ArrayLike, num_bins: int = DEFAULT_BINS, binning: Binning = "width"
) -> ReliabilityBins:
    """Return the reliability diagram's numbers: counts, accuracy and mean confidence of each confidence bin.

    Args:
        probs: class probabilities, (N, C).
        labels: integer classes, (N,).
        num_bins: the number of bins, >= 1.
        binning: bins of equal "width", or of equal "mass", the number of examples.

    >>> bins = reliability_bins([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8]], [0, 1, 1], num_bins=2)
    >>> bins.counts.tolist(), bins.edges.tolist()
    ([0, 3], [0.0, 0.5, 1.0])
    """
    checked, classes = probabilities_and_labels(probs, labels)
    return bins_of(checked.max(1), checked.argmax(1) == classes, num_bins, binning)


def expected_calibration_error(
    probs: ArrayLike, labels: ArrayLike, num_bins: int = DEFAULT_BINS, binning: Binning = "width"
) -> float:
    """Return ECE = sum_b (n_b / n) |acc_b - conf_b|, in [0, 1]. Guo et al. 2017.

    Args:
        probs: class probabilities, (N, C).
        labels: integer classes, (N,).
        num_bins: the number of bins, >= 1.
        binning: bins of equal "width", or of equal "mass", which gives the adaptive ECE.

    >>> round(expected_calibration_error([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8]], [0, 1, 1], num_bins=2), 4)
    0.1333
    """
    return reliability_bins(probs, labels, num_bins, binning).expected_error


def maximum_calibration_error(
    probs: ArrayLike, labels: ArrayLike, num_bins: int = DEFAULT_BINS, binning: Binning = "width"
) -> float:
    """Return MCE = max_b |acc_b - conf_b| over the bins that are not empty, in [0, 1].

    Args:
        probs: class probabilities, (N, C).
        labels: integer classes, (N,).
        num_bins: the number of bins, >= 1.
        binning: bins of equal "width", or of equal "mass", the number of examples.

    >>> round(maximum_calibration_error([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8]], [0, 1, 1], num_bins=10), 4)
    0.7
    """
    return reliability_bins(probs, labels, num_bins, binning).maximum_error


def classwise_calibration_error(
    probs: ArrayLike, labels: ArrayLike, num_bins: int = DEFAULT_BINS, binning: Binning = "width"
) -> float:
    """Return the mean over classes k of the ECE of p_ik against 1[y_i = k], in [0, 1]. Kull et al. 2019.

    Args:
        probs: class probabilities, (N, C).
        labels: integer classes, (N,).
        num_bins: the number of bins of each class, >= 1.
        binning: bins of equal "width", or of equal "mass", the number of examples.

    >>> round(classwise_calibration_error([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8]], [0, 1, 1], num_bins=2), 4)
    0.2667
    """
    checked, classes = probabilities_and_labels(probs, labels)
    per_class = [bins_of(column, classes == k, num_bins, binning) for k, column in enumerate(checked.T)]
    return float(np.mean([bins.expected_error for bins in per_class]))


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """Return the T > 0 that minimises the held-out NLL of softmax(logits / T). Guo et al. 2017, arXiv 1706.04599.

    Shape: ``logits`` (N, C), ``labels`` (N,). The NLL is convex in 1/T, so the root of its derivative is sought in
    log T, within `TEMPERATURE_RANGE` times the logits' spread; a bound is returned when the optimum lies beyond it
    (logits that are all right, or no better than chance), and 1 when the logits are constant.

    Raises:
        ValueError: there is only one class.

    >>> logits = np.array([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])  # three of four are right
    >>> round(fit_temperature(logits, [0, 0, 0, 1]), 4)  # 2 / log 3
    1.8205
    """
    values = float_array(logits, "logits", ndim=2)
    if values.shape[1] < 2:
        raise ValueError(f"`logits` needs a column per class and at least 2, got shape {values.shape}.")
    classes = integer_labels(labels, *values.shape)
    if (values == values[:, :1]).all():  # before centring, which leaves rounding errors instead of zeros
        return 1.0
    centred = values - values.mean(1, keepdims=True)
    largest = float(np.abs(centred).max())
    spread = largest * math.sqrt(np.square(centred / largest).mean())  # in this order nothing overflows
    return spread * _unit_temperature(centred / spread, classes)


def _unit_temperature(logits: FloatArray, classes: IntArray) -> float:
    """`fit_temperature` for logits of spread one: the root of d NLL / d(1/T) = mean(E_p[z] - z_y) in log T."""
    from scipy.optimize import brentq  # here: importing scipy.optimize takes longer than most uses of this module

    of_label = np.take_along_axis(logits, classes[:, None], axis=1)[:, 0]

    def slope(log_temperature: float) -> float:
        scaled = logits / math.exp(log_temperature)
        weights = np.exp(scaled - scaled.max(1, keepdims=True))
        expected = (weights * logits).sum(1) / weights.sum(1)
        return float((expected - of_label).mean())

    low, high = TEMPERATURE_RANGE
    if slope(math.log(low)) <= 0:  # the NLL still falls towards T = 0
        return low
    if slope(math.log(high)) >= 0:
        return high
    return math.exp(brentq(slope, math.log(low), math.log(high), xtol=1e-12))


def bins_of(confidence: FloatArray, correct: NDArray[np.bool_], num_bins: int, binning: Binning) -> ReliabilityBins:
    """Return the `reliability_bins` of confidences and hits.

    Args:
        confidence: confidences in [0, 1], (N,).
        correct: whether each was right, (N,).
        num_bins: the number of bins, >= 1.
        binning: bins of equal "width", or of equal "mass", the number of examples.
    """
    positive_integer(num_bins, "num_bins")
    choice(binning, BINNINGS, "binning")
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    edges = edges if binning == "width" else np.quantile(confidence, edges)
    index = np.digitize(confidence, edges[1:-1], right=True)
    counts = np.bincount(index, minlength=num_bins)
    total = np.where(counts > 0, counts, np.nan)
    return ReliabilityBins(
        num_bins=int(num_bins),
        counts=counts.astype(np.int64),
        accuracy=np.bincount(index, correct, num_bins) / total,
        confidence=np.bincount(index, confidence, num_bins) / total,
        edges=edges,
    )
