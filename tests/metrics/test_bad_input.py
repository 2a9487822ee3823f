"""Each wrong argument gives one error that names it, and says what was received and what is allowed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from bayeformers import metrics

GOOD = np.array([[0.7, 0.3], [0.4, 0.6]])
LABELS = np.array([0, 1])
LOG_DRAWS = np.log(np.stack([GOOD, GOOD]))
NAN = float("nan")

OF_PROBABILITIES = [
    metrics.negative_log_likelihood,
    metrics.brier_score,
    metrics.accuracy,
    metrics.expected_calibration_error,
    metrics.maximum_calibration_error,
    metrics.classwise_calibration_error,
    metrics.reliability_bins,
]
OF_ERRORS = [metrics.aurc, metrics.e_aurc, metrics.augrc, metrics.prr, metrics.error_auroc, metrics.error_aupr]
OF_DRAWS = [
    metrics.predictive_entropy,
    metrics.expected_entropy,
    metrics.mutual_information,
    metrics.expected_pairwise_kl,
    metrics.variation_ratio,
]

Case = tuple[tuple[Any, ...], type[Exception], str]

BAD_PROBABILITIES: dict[str, Case] = {
    "do not sum to one": (([[0.7, 0.4]], [0]), ValueError, r"`probs` must sum to 1 .* 0.001, row 0 sums to 1.1"),
    "logits": (([[2.0, 3.0]], [0]), ValueError, "`probs` must sum to 1"),
    "log-probabilities": ((np.log(GOOD), LABELS), ValueError, "`probs` must be >= 0"),
    "negative": (([[1.2, -0.2]], [0]), ValueError, r"`probs` must be >= 0, got -0.2"),
    "NaN": (([[0.5, 0.5], [NAN, 0.5]], [0, 1]), ValueError, r"`probs` must be finite, got nan at index \(1, 0\)"),
    "infinite": (([[np.inf, 0.5]], [0]), ValueError, "`probs` must be finite, got inf"),
    "empty": ((np.zeros((0, 2)), np.zeros(0, int)), ValueError, "`probs` is empty"),
    "one axis": (([0.5, 0.5], [0]), ValueError, r"`probs` must have 2 axes, got shape \(2,\)"),
    "draws": ((np.exp(LOG_DRAWS), LABELS), ValueError, r"`probs` must have 2 axes, got shape \(2, 2, 2\)"),
    "one class": (([[1.0]], [0]), ValueError, "`probs` needs a column per class"),
    "ragged": (([[0.5, 0.5], [0.2, 0.3, 0.5]], [0, 1]), ValueError, "`probs` must be a rectangular array"),
    "text": (([["a", "b"]], [0]), TypeError, "`probs` must hold real numbers"),
    "label too large": ((GOOD, [0, 2]), ValueError, r"`labels` must lie in \[0, 2\) for 2 classes, got 2"),
    "ignored label": ((GOOD, [0, -100]), ValueError, "got -100; drop ignored positions"),
    "float labels": ((GOOD, [0.0, 0.5]), TypeError, "`labels` must be integer class indices, got dtype float64"),
    "NaN label": ((GOOD, [0, NAN]), TypeError, "`labels` must be integer"),
    "too few labels": ((GOOD, [0]), ValueError, r"`labels` must have shape \(2,\), .* got \(1,\)"),
    "one-hot labels": ((GOOD, [[1, 0], [0, 1]]), ValueError, r"`labels` must have shape \(2,\)"),
}

BAD_ERRORS: dict[str, Case] = {
    "lengths differ": (([0.1, 0.2], [0, 1, 1]), ValueError, "`confidence` and `error` must have one entry .* 2 and 3"),
    "NaN confidence": (([NAN, 0.2], [0, 1]), ValueError, "`confidence` must be finite"),
    "NaN error": (([0.1, 0.2], [0, NAN]), ValueError, "`error` must be finite"),
    "negative error": (([0.1, 0.2], [0, -1]), ValueError, "`error` must be .*, got -1"),
    "empty": (([], []), ValueError, "`confidence` is empty"),
    "two axes": (([[0.1, 0.2]], [0, 1]), ValueError, "`confidence` must have 1 axes"),
}

BAD_DRAWS: dict[str, tuple[Any, type[Exception], str]] = {
    "probabilities": (np.exp(LOG_DRAWS), ValueError, "`log_probs` must be normalised: .* off 1 by"),
    "logits": (np.ones((3, 2, 4)), ValueError, "`log_probs` must be normalised"),
    "NaN": (LOG_DRAWS * NAN, ValueError, "`log_probs` must not be NaN"),
    "one draw without its axis": (LOG_DRAWS[0], ValueError, r"`log_probs` must have shape \(S draws, N, C\)"),
    "empty": (np.zeros((0, 2, 2)), ValueError, "`log_probs` is empty"),
    "integers": (torch.zeros(2, 2, 2, dtype=torch.int64), TypeError, "`log_probs` must hold floating-point"),
    "infinite": (np.full((1, 1, 2), np.inf), ValueError, "`log_probs` must be normalised"),
}


@pytest.mark.parametrize("metric", OF_PROBABILITIES)
@pytest.mark.parametrize(("arguments", "error", "message"), BAD_PROBABILITIES.values(), ids=BAD_PROBABILITIES)
def test_probabilities_and_labels(
    metric: Callable[..., Any], arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        metric(*arguments)


@pytest.mark.parametrize("metric", OF_ERRORS)
@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ERRORS.values(), ids=BAD_ERRORS)
def test_confidence_and_error(
    metric: Callable[..., Any], arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        metric(*arguments)


@pytest.mark.parametrize("metric", OF_DRAWS)
@pytest.mark.parametrize(("draws", "error", "message"), BAD_DRAWS.values(), ids=BAD_DRAWS)
def test_draws(metric: Callable[..., Any], draws: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), np.errstate(over="ignore"):
        metric(draws)


OTHER: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no bins": (lambda: metrics.reliability_bins(GOOD, LABELS, 0), ValueError, "`num_bins` must be >= 1, got 0"),
    "half a bin": (
        lambda: metrics.reliability_bins(GOOD, LABELS, 2.5),  # type: ignore[arg-type]
        TypeError,
        "`num_bins` must be an integer >= 1, got 2.5",
    ),
    "unknown binning": (
        lambda: metrics.expected_calibration_error(GOOD, LABELS, binning="adaptive"),  # type: ignore[arg-type]
        ValueError,
        r"`binning` must be one of \['width', 'mass'\], got 'adaptive'",
    ),
    "coverage in percent": (
        lambda: metrics.risk_at_coverage([1, 2], [0, 1], 80),
        ValueError,
        r"`coverage` must lie in \[0.0, 1.0\], got 80",
    ),
    "negative risk": (lambda: metrics.coverage_at_risk([1, 2], [0, 1], -0.1), ValueError, "`risk` must lie in"),
    "accuracy in percent": (
        lambda: metrics.refusal_table([1, 2], [0, 1], [95]),
        ValueError,
        "`target_accuracies` must lie in",
    ),
    "losses in a table of accuracies": (
        lambda: metrics.refusal_table([1, 2], [0, 3]),
        ValueError,
        r"`error` must lie in \[0, 1\]",
    ),
    "PRR without errors": (lambda: metrics.prr([1, 2], [0, 0]), ValueError, "`error` is 0.0 for every example"),
    "AUROC without errors": (
        lambda: metrics.error_auroc([1, 2], [0, 0]),
        ValueError,
        "`error` is 0 for all 2 examples; .* at least one example of each",
    ),
    "OOD only": (lambda: metrics.fpr_at_95_tpr([1, 2], [1, 1]), ValueError, "`is_ood` is 1 for all 2 examples"),
    "AUROC of losses": (lambda: metrics.error_auroc([1, 2], [0, 0.5]), ValueError, "`error` must be 0/1 .* got 0.5"),
    "AvU thresholds out of order": (
        lambda: metrics.accuracy_vs_uncertainty([1, 2], [0, 1], [2, 1]),
        ValueError,
        "`thresholds` must be at least 2, strictly increasing",
    ),
    "temperature of one class": (
        lambda: metrics.fit_temperature([[1.0]], [0]),
        ValueError,
        "`logits` needs a column per class",
    ),
    "temperature of infinite logits": (
        lambda: metrics.fit_temperature([[np.inf, 0.0]], [0]),
        ValueError,
        "`logits` must be finite",
    ),
    "temperature with a wrong label": (
        lambda: metrics.fit_temperature([[1.0, 0.0]], [2]),
        ValueError,
        r"`labels` must lie in \[0, 2\)",
    ),
    "Gaussian scale 0": (
        lambda: metrics.gaussian_negative_log_likelihood([[0.0]], 0.0, [0.0]),
        ValueError,
        "`noise_std` must be > 0, got 0.0",
    ),
    "Gaussian scale of another shape": (
        lambda: metrics.gaussian_negative_log_likelihood([[0.0]], [1.0, 2.0], [0.0]),
        ValueError,
        "`noise_std` must be a number or have the shape",
    ),
    "targets of another length": (
        lambda: metrics.gaussian_negative_log_likelihood([[0.0]], 1.0, [0.0, 1.0]),
        ValueError,
        r"`targets` must have shape \(1,\)",
    ),
    "unknown normalization": (
        lambda: metrics.covariance_uncertainty(LOG_DRAWS, "sigmoid"),  # type: ignore[arg-type]
        ValueError,
        "`normalization` must be one of",
    ),
    "NaN logits": (lambda: metrics.covariance_uncertainty(LOG_DRAWS * NAN), ValueError, "`logits` must be finite"),
    "NaN multi-label logits": (lambda: metrics.bernoulli_log_probs(LOG_DRAWS * NAN), ValueError, "must not be NaN"),
    "no arrays": (lambda: metrics.bootstrap_ci(np.mean), ValueError, "`arrays` is empty"),
    "arrays of different lengths": (
        lambda: metrics.bootstrap_ci(metrics.aurc, [1, 2], [0, 1, 1]),
        ValueError,
        r"`arrays` must have one entry per example .* \[\(2,\), \(3,\)\]",
    ),
    "no resamples": (
        lambda: metrics.bootstrap_ci(np.mean, [1, 2], num_resamples=0),
        ValueError,
        "`num_resamples` must be >= 1",
    ),
    "level in percent": (
        lambda: metrics.bootstrap_ci(np.mean, [1, 2], confidence_level=95),
        ValueError,
        r"`confidence_level` must lie in \(0, 1\), got 95",
    ),
    "pairs of different lengths": (
        lambda: metrics.paired_bootstrap(np.mean, ([1, 2],), ([1, 2, 3],)),
        ValueError,
        "`first` and `second` must be about the same examples, got 2 and 3",
    ),
    "a pair of arrays, not of tuples": (
        lambda: metrics.paired_bootstrap(np.mean, np.ones(3), np.ones(3)),  # type: ignore[arg-type]
        TypeError,
        "`first` must be a tuple of the metric's arrays, got ndarray",
    ),
    "unknown module": (lambda: metrics.load("ece"), ValueError, r"`name` must be one of \['uncertainty'\], got 'ece'"),
}


@pytest.mark.parametrize(("call", "error", "message"), OTHER.values(), ids=OTHER)
def test_other_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_float32_and_half_precision_rounding_is_accepted() -> None:
    logits = torch.randn(4, 3, 30_000, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(3, dtype=torch.int64)
    assert metrics.negative_log_likelihood(logits[0].softmax(-1), labels) > 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert metrics.predictive_entropy(logits.to(dtype).log_softmax(-1)).dtype == dtype
