"""Each metric that scikit-learn, torchmetrics or scipy define too, against theirs, on random predictions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from sklearn.metrics import accuracy_score, average_precision_score, brier_score_loss, log_loss, roc_auc_score
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from bayeformers import metrics

CLASSES, ROWS = 4, 500
RNG = np.random.default_rng(0)
PROBS = RNG.dirichlet(np.ones(CLASSES), ROWS)
LABELS = RNG.integers(0, CLASSES, ROWS)
BINARY_LABELS = RNG.integers(0, 2, ROWS)
SCORES = RNG.choice(np.linspace(0, 1, 21), ROWS)  # with ties
FLOAT32 = 1e-6  # torchmetrics computes in it


@pytest.mark.parametrize("num_bins", [1, 7, 15, 100])
@pytest.mark.parametrize(
    ("ours", "norm"), [(metrics.expected_calibration_error, "l1"), (metrics.maximum_calibration_error, "max")]
)
def test_calibration_errors_are_those_of_torchmetrics(ours: object, norm: str, num_bins: int) -> None:
    options = {"num_classes": CLASSES, "n_bins": num_bins, "norm": norm}
    theirs = multiclass_calibration_error(torch.tensor(PROBS), torch.tensor(LABELS), **options)
    assert ours(PROBS, LABELS, num_bins=num_bins) == pytest.approx(float(theirs), abs=FLOAT32)


@pytest.mark.parametrize("num_bins", [1, 15])
def test_classwise_error_is_the_mean_of_the_binary_ones(num_bins: int) -> None:
    binary = [
        float(
            binary_calibration_error(
                torch.tensor(PROBS[:, label]), torch.tensor(label == LABELS).long(), n_bins=num_bins, norm="l1"
            )
        )
        for label in range(CLASSES)
    ]
    ours = metrics.classwise_calibration_error(PROBS, LABELS, num_bins=num_bins)
    assert ours == pytest.approx(np.mean(binary), abs=FLOAT32)


def test_scores_are_those_of_sklearn() -> None:
    assert metrics.accuracy(PROBS, LABELS) == accuracy_score(LABELS, PROBS.argmax(1))
    assert metrics.brier_score(PROBS, LABELS) == pytest.approx(brier_score_loss(LABELS, PROBS, scale_by_half=False))
    assert metrics.negative_log_likelihood(PROBS, LABELS) == pytest.approx(log_loss(LABELS, PROBS))


def test_detection_scores_with_ties_are_those_of_sklearn() -> None:
    assert metrics.ood_auroc(SCORES, BINARY_LABELS) == pytest.approx(roc_auc_score(BINARY_LABELS, SCORES), abs=1e-15)
    theirs = average_precision_score(BINARY_LABELS, SCORES)
    assert metrics.ood_aupr(SCORES, BINARY_LABELS) == pytest.approx(theirs, abs=1e-15)
    assert metrics.error_auroc(-SCORES, BINARY_LABELS) == pytest.approx(roc_auc_score(BINARY_LABELS, SCORES), abs=1e-15)
    assert metrics.error_aupr(-SCORES, BINARY_LABELS) == pytest.approx(theirs, abs=1e-15)


def test_entropies_are_those_of_scipy() -> None:
    draws = RNG.dirichlet(np.ones(CLASSES), (5, ROWS))
    total = metrics.predictive_entropy(np.log(draws))
    np.testing.assert_allclose(total, entropy(draws.mean(0), axis=1), rtol=1e-12)
    expected = entropy(draws, axis=2).mean(0)
    np.testing.assert_allclose(metrics.expected_entropy(np.log(draws)), expected, rtol=1e-12)
    np.testing.assert_allclose(metrics.mutual_information(np.log(draws)), total - expected, atol=1e-12)
