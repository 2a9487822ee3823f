"""Prediction intervals: coverage by enumeration, widths that follow the posterior, several outputs, files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bayeformers.guarantees import INTERVALS_FILE, PredictionIntervals, fit_prediction_intervals
from bayeformers.metrics.conformal import conformal_rank
from bayeformers.predictive import Predictive


def data(n: int = 15, outputs: int = 0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Means, standard deviations, labels."""
    rng = np.random.default_rng(seed)
    shape = (n, outputs) if outputs else (n,)
    mean, deviation = rng.normal(size=shape), rng.random(shape) + 0.1
    parts = mean, deviation, mean + deviation * rng.normal(size=shape)
    return tuple(map(torch.from_numpy, parts))  # type: ignore[return-value]


def inside(ends: Tensor, labels: Tensor) -> Tensor:
    return (ends[..., 0] <= labels) & (labels <= ends[..., 1])


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("scale", ["predictive", "none"])
@pytest.mark.parametrize("by", ["all", "group", "outputs"])
def test_coverage_is_exact_over_all_ways_to_leave_one_out(by: str, scale: Any, alpha: float) -> None:
    mean, deviation, labels = data(20, 2 if by == "outputs" else 0)
    groups = [i % 2 for i in range(20)] if by == "group" else None
    hits = []
    for i in range(20):
        rest = [j for j in range(20) if j != i]
        given = [(m, s) if scale == "predictive" else m for m, s in ((mean[r], deviation[r]) for r in (rest, [i]))]
        own = None if groups is None else [groups[j] for j in rest]
        fitted = fit_prediction_intervals(given[0], labels[rest], alpha=alpha, scale=scale, groups=own)
        ends = fitted.predict(given[1], groups=None if groups is None else [groups[i]])
        hits.append(inside(ends, labels[[i]])[0])
    covered = torch.stack(hits)
    if by == "group":
        assert [int(covered[k::2].sum()) for k in (0, 1)] == [conformal_rank(9, alpha)] * 2
    else:
        assert (covered.sum(0) == conformal_rank(19, alpha)).all()


def test_ends_are_the_threshold_times_the_scale() -> None:
    mean, deviation, labels = data(19)
    fitted = fit_prediction_intervals((mean, deviation), labels, alpha=0.1)
    threshold = sorted(((labels - mean).abs() / deviation).tolist())[17]
    assert fitted.cutoffs["all"].threshold == pytest.approx(threshold)
    expected = torch.stack([mean - threshold * deviation, mean + threshold * deviation], -1)
    assert torch.allclose(fitted.predict((mean, deviation)), expected)


@pytest.mark.parametrize("scale", ["predictive", "epistemic", "none"])
def test_a_predictive_is_its_mean_and_deviation(scale: Any) -> None:
    values = torch.randn(8, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    predictive = Predictive(problem_type="regression", values=values, noise_std=0.5)
    labels = torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    variance = values.var(0, correction=0) + (0.25 if scale == "predictive" else 0)
    numbers = values.mean(0) if scale == "none" else (values.mean(0), variance.sqrt())
    fitted = fit_prediction_intervals(numbers, labels, scale=scale)
    assert torch.allclose(fitted.predict(predictive), fitted.predict(numbers))


def test_inputs_without_scale_and_thresholds_without_end() -> None:
    """0 / 0 is no miss, a miss of scale 0 cannot be covered, and infinity times 0 is the whole line."""
    mean, deviation = torch.zeros(9).double(), torch.ones(9).double()
    deviation[0], labels = 0, torch.linspace(0, 1, 9).double()
    fitted = fit_prediction_intervals((mean, deviation), labels, alpha=0.2)
    assert fitted.cutoffs["all"].threshold == pytest.approx(0.875)
    labels[0] = 1.0
    few = fit_prediction_intervals((mean, deviation), labels, alpha=0.1)
    assert math.isinf(few.cutoffs["all"].threshold)
    ends = few.predict((mean[:2], deviation[:2]))
    assert ends.tolist() == [[-math.inf, math.inf]] * 2
    assert "too few for a finite interval" in few.describe()


@pytest.mark.parametrize(
    "make",
    [
        lambda: fit_prediction_intervals(data(30)[:2], data(30)[2]),
        lambda: fit_prediction_intervals(data(5)[0], data(5)[2], scale="none"),
        lambda: fit_prediction_intervals(data(30, 3)[:2], data(30, 3)[2], groups=["a", "b"] * 15),
    ],
)
def test_files_keep_everything(make: Callable[[], PredictionIntervals], tmp_path: Path) -> None:
    intervals = make()
    intervals.save(tmp_path)
    assert PredictionIntervals.load(tmp_path) == intervals == PredictionIntervals.load(tmp_path / INTERVALS_FILE)
    json.loads((tmp_path / INTERVALS_FILE).read_text(), parse_constant=pytest.fail)
    assert intervals.describe().endswith(".")


def test_an_unseen_group_gets_the_whole_line() -> None:
    mean, deviation, labels = data(30)
    fitted = fit_prediction_intervals((mean, deviation), labels, groups=["a", "b"] * 15)
    ends = fitted.predict((mean[:2], deviation[:2]), groups=["a", "c"])
    assert ends[0].isfinite().all() and ends[1].isinf().all()


MEAN, STD, Y = data(20)
FITTED = fit_prediction_intervals((MEAN, STD), Y)
CLASSES = Predictive(problem_type="single_label_classification", log_probs=torch.zeros(1, 2, 4).log_softmax(-1))
UNKNOWN = Predictive(problem_type="regression", values=torch.zeros(1, 20))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: fit_prediction_intervals((MEAN, STD), Y, alpha=1.0), "`alpha` is the share"),
        (lambda: fit_prediction_intervals((MEAN, STD), Y, scale="std"), "`scale` must be one of"),
        (lambda: fit_prediction_intervals((MEAN, STD)), "`dataset` is missing"),
        (lambda: fit_prediction_intervals(MEAN, Y), "give a pair of means"),
        (lambda: fit_prediction_intervals((MEAN, -STD), Y), "standard deviations >= 0"),
        (lambda: fit_prediction_intervals((MEAN * math.inf, STD), Y), "finite means"),
        (lambda: fit_prediction_intervals((MEAN, STD[:3]), Y), "standard deviations the same"),
        (lambda: fit_prediction_intervals((MEAN, STD * 0), Y), "is 0 for every row"),
        (lambda: fit_prediction_intervals((MEAN, STD), Y[:5]), "`labels` must have the shape of the means"),
        (lambda: fit_prediction_intervals((MEAN, STD), Y * math.nan), "`labels` must be finite"),
        (lambda: fit_prediction_intervals(UNKNOWN, Y), '`scale`="epistemic" or "none"'),
        (lambda: fit_prediction_intervals("means", Y, scale="none"), "Means must be numbers"),
        (lambda: fit_prediction_intervals((MEAN, STD), Y, groups=[1]), "one group per row"),
        (lambda: FITTED.predict(CLASSES), "see `fit_prediction_sets`"),
        (lambda: FITTED.predict(data(3, 2)[:2]), "must have 1 outputs, got 2"),
        (lambda: FITTED.predict((MEAN, STD), groups=[0] * 20), "`groups` are needed where"),
        (lambda: PredictionIntervals.load("/nowhere"), "There is no prediction_intervals.json"),
        (lambda: PredictionIntervals.from_dict({"scale": "none"}), "is damaged"),
        (lambda: PredictionIntervals.from_dict({**FITTED.to_dict(), "scale": "x"}), "`scale` must be"),
    ],
)
def test_bad_input(call: Callable[[], Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()
