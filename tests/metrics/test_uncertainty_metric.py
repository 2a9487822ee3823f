"""The `evaluate` module, loaded both ways, against the pure functions."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bayeformers import metrics

evaluate = pytest.importorskip("evaluate", reason="needs the optional package `evaluate`")


@pytest.fixture
def draws() -> np.ndarray:
    """Probabilities of 40 examples, 5 draws, 3 classes."""
    logits = np.random.default_rng(0).normal(size=(40, 5, 3))
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


@pytest.fixture
def labels() -> np.ndarray:
    return np.random.default_rng(1).integers(3, size=40)


@pytest.fixture(params=["by name", "by path"])
def module(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "by name":
        return metrics.load("uncertainty", keep_in_memory=True)
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = Path(metrics.__file__).with_name("uncertainty_metric.py")
    return evaluate.load(str(path), cache_dir=str(tmp_path / "cache"))


def test_draws_are_averaged_and_taken_apart(module: Any, draws: np.ndarray, labels: np.ndarray) -> None:
    result = module.compute(predictions=draws, references=labels, num_bins=10)
    mean, log_probs = draws.mean(1), np.log(draws.swapaxes(0, 1))
    confidence, error = mean.max(1), mean.argmax(1) != labels
    expected = {
        "accuracy": metrics.accuracy(mean, labels),
        "nll": metrics.negative_log_likelihood(mean, labels),
        "brier": metrics.brier_score(mean, labels),
        "ece": metrics.expected_calibration_error(mean, labels, num_bins=10),
        "ece_num_bins": 10,
        "aurc": metrics.aurc(confidence, error),
        "error_auroc": metrics.error_auroc(confidence, error),
        "predictive_entropy": metrics.predictive_entropy(log_probs).mean(),
        "expected_entropy": metrics.expected_entropy(log_probs).mean(),
        "mutual_information": metrics.mutual_information(log_probs).mean(),
    }
    assert result == pytest.approx(expected, abs=1e-12)


def test_probabilities_have_no_epistemic_part(module: Any, draws: np.ndarray, labels: np.ndarray) -> None:
    mean = draws.mean(1)
    result = module.compute(predictions=mean, references=labels)
    assert result["nll"] == pytest.approx(metrics.negative_log_likelihood(mean, labels))
    assert result["predictive_entropy"] == pytest.approx(metrics.predictive_entropy(np.log(mean)[None]).mean())
    assert "mutual_information" not in result and result["ece_num_bins"] == 15


def test_batches_and_log_probabilities_give_the_same(draws: np.ndarray, labels: np.ndarray) -> None:
    module = metrics.load("uncertainty", keep_in_memory=True)
    for start in range(0, 40, 15):
        chosen = slice(start, start + 15)
        module.add_batch(predictions=np.log(draws[chosen]), references=labels[chosen])
    by_batch = module.compute(log_probs=True)
    at_once = metrics.load("uncertainty", keep_in_memory=True).compute(predictions=draws, references=labels)
    assert by_batch == pytest.approx(at_once, abs=1e-12)


def test_intervals_are_those_of_the_bootstrap(draws: np.ndarray, labels: np.ndarray) -> None:
    module = metrics.load("uncertainty", keep_in_memory=True)
    result = module.compute(predictions=draws, references=labels, num_resamples=50, bootstrap_seed=7)
    interval = metrics.bootstrap_ci(metrics.brier_score, draws.mean(1), labels, num_resamples=50, seed=7)
    assert (result["brier_low"], result["brier_high"]) == pytest.approx((interval.low, interval.high))
    assert result["mutual_information_low"] <= result["mutual_information"] <= result["mutual_information_high"]


def test_without_errors_the_error_auroc_is_nan() -> None:
    module = metrics.load("uncertainty", keep_in_memory=True)
    result = module.compute(predictions=[[1.0, 0.0], [0.0, 1.0]], references=[0, 1], num_resamples=5)
    assert math.isnan(result["error_auroc"]) and math.isnan(result["error_auroc_low"])
    assert result["nll"] == 0 and result["predictive_entropy"] == 0


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([], [], "`predictions` is empty"),
        ([[0.7, 0.4]], [0], "`predictions` must sum to 1"),
        ([[[0.5, 0.5], [1.5, -0.5]]], [0], "`predictions` must be >= 0"),
        ([[[0.5, 0.5], [float("nan"), 0.5]]], [0], "`predictions` must be finite"),
        ([[0.5, 0.5], [0.2, 0.3, 0.5]], [0, 1], "`predictions` must be a rectangular array"),
        ([[0.5, 0.5]], [2], r"`labels` must lie in \[0, 2\)"),
        ([[0.5, 0.5]], [0.5], "`references` must be integer class indices, got 0.5"),
        ([0.5, 0.5], [0, 1], "don't match the expected format"),
        ([[0.5, 0.5]], [0, 1], "Mismatch in the number"),
    ],
)
def test_bad_input(predictions: Any, references: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.load("uncertainty", keep_in_memory=True).compute(predictions=predictions, references=references)


def test_a_missing_evaluate_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(ImportError, match="needs the optional package `evaluate`"):
        metrics.load("uncertainty")
