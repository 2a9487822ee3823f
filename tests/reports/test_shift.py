"""Rank correlations of uncertainty and error on known orders, and means over inputs."""

import math

import numpy as np
import pytest

from bayeformers.reports import ClassPredictions
from bayeformers.reports.shift import ShiftCurve, rank_agreement


def test_agreement_of_known_orders() -> None:
    error = np.array([[0.0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 1, 0]])
    rising = np.array([[0.1, 0.1, 0.1, 0.2], [0.1, 0.1, 0.3, 0.3], [0.9, 0.9, 0.9, 0.1]])
    found = rank_agreement(rising, error)
    assert found["angles"] == pytest.approx(1) and found["auroc"] == 1
    assert rank_agreement(-rising, error)["angles"] == pytest.approx(-1)
    # Pearson's correlation of average ranks: tied uncertainties share a rank, as do all right and all wrong images
    ranks = np.array([3.5, 3.5, 3.5, 7, 3.5, 3.5, 8.5, 8.5, 11, 11, 11, 3.5])
    wrong = np.where(error.ravel() == 1, 9.5, 3.5)
    assert found["images"] == pytest.approx(np.corrcoef(ranks, wrong)[0, 1])


def test_agreement_is_nan_where_nothing_varies() -> None:
    found = rank_agreement(np.full((3, 4), 0.5), np.eye(3, 4))
    assert math.isnan(found["angles"]) and math.isnan(found["images"]) and found["auroc"] == 0.5
    assert math.isnan(rank_agreement(np.random.rand(2, 3), np.zeros((2, 3)))["auroc"])


def test_a_curve_holds_means_over_images() -> None:
    sure, unsure = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([[0.6, 0.4], [0.6, 0.4]])
    curve = ShiftCurve.from_predictions(
        [ClassPredictions(sure, np.zeros(2)), ClassPredictions(unsure, np.full(2, 0.1))], np.array([0, 1])
    )
    assert curve.error.tolist() == [0, 0.5] and curve.epistemic.tolist() == pytest.approx([0, 0.1])
    entropy = -(0.6 * math.log(0.6) + 0.4 * math.log(0.4))
    assert curve.entropy[1] == pytest.approx(entropy) and curve.aleatoric[1] == pytest.approx(entropy - 0.1)
